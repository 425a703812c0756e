package uring

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func ring(t *testing.T, o Options) *Ring {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	r, err := New(o)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skipf("SKIPPED: no io_uring here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// TestPoll: one request, completions for as long as it says so.
func TestPoll(t *testing.T) {
	r := ring(t, Options{Entries: 8})
	fd := eventfd(t)
	if err := r.Poll(fd, unix.POLLIN, 42); err != nil {
		t.Fatal(err)
	}
	if err := r.Enter(0); err != nil || r.Ready() != 0 || r.Pending() != 0 {
		t.Fatalf("before: %v, %d ready, %d pending", err, r.Ready(), r.Pending())
	}
	for i := range 20 {
		go unix.Write(fd, one)
		if err := r.Enter(1); err != nil {
			t.Fatal(err)
		}
		n := r.Reap(func(c Completion) {
			if c.Data != 42 || c.Res != unix.POLLIN || !c.More() {
				t.Errorf("round %d: %+v", i, c)
			}
		})
		if n != 1 {
			t.Fatalf("round %d: %d completions", i, n)
		}
		if _, err := unix.Read(fd, make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCommandRefused: a file that has no commands refuses them, one by one, also when there are more
// of them than entries.
func TestCommandRefused(t *testing.T) {
	for _, wide := range []bool{false, true} {
		r := ring(t, Options{Entries: 4, Wide: wide})
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		limit := 16
		if wide {
			limit = 80
		}
		if err := r.Command(int(f.Fd()), 1, 0, make([]byte, limit+1)); err == nil || r.Pending() != 0 {
			t.Errorf("wide %v: a command of %d bytes was taken", wide, limit+1)
		}
		seen := map[uint64]bool{}
		for i := uint64(0); i < 11; i++ {
			err := r.Command(int(f.Fd()), 1, i, make([]byte, limit))
			if errors.Is(err, ErrFull) {
				if r.Pending() != 4 {
					t.Fatalf("full with %d pending", r.Pending())
				}
				if err := r.Enter(0); err != nil {
					t.Fatal(err)
				}
				r.Reap(func(c Completion) { seen[c.Data] = c.Res == -int32(unix.EOPNOTSUPP) })
				err = r.Command(int(f.Fd()), 1, i, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Enter(1); err != nil {
			t.Fatal(err)
		}
		r.Reap(func(c Completion) { seen[c.Data] = c.Res == -int32(unix.EOPNOTSUPP) })
		for i := uint64(0); i < 11; i++ {
			if !seen[i] {
				t.Errorf("wide %v: command %d: %v", wide, i, seen)
			}
		}
	}
}

// TestReapQueues: completions may queue requests while they are taken.
func TestReapQueues(t *testing.T) {
	r := ring(t, Options{Entries: 2})
	left := 100
	queue := func() {
		if err := r.Command(-1, 0, uint64(left), nil); err != nil {
			t.Fatal(err)
		}
	}
	for queue(); left > 0; {
		if err := r.Enter(1); err != nil {
			t.Fatal(err)
		}
		r.Reap(func(c Completion) {
			if c.Data != uint64(left) || c.Res != -int32(unix.EBADF) {
				t.Fatalf("%+v, %d left", c, left)
			}
			if left--; left > 0 {
				queue()
			}
		})
	}
}

func TestNoAllocations(t *testing.T) {
	r := ring(t, Options{Entries: 8})
	cmd := make([]byte, 16)
	n := 0
	fn := func(Completion) { n++ }
	if a := testing.AllocsPerRun(100, func() {
		if r.Command(-1, 0, 1, cmd) != nil || r.Enter(1) != nil {
			t.Fatal("ring")
		}
		r.Reap(fn)
	}); a != 0 || n != 101 {
		t.Errorf("%v allocations a request, %d completions", a, n)
	}
}

func TestCloseTwice(t *testing.T) {
	r := ring(t, Options{Entries: 2})
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
}
