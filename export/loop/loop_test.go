package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: loop devices need root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("SKIPPED: no loop devices here: %v", err)
	}
}

// backingFile makes a sparse file on memory.
func backingFile(t *testing.T, size int64) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "mica-loop-")
	if err != nil {
		dir = t.TempDir()
	} else {
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	path := filepath.Join(dir, "file")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func attach(t *testing.T, c Config) Device {
	t.Helper()
	d, err := Attach(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := Detach(context.Background(), d, DetachOptions{Backing: c.Backing})
		if err != nil && !errors.Is(err, ErrNotBound) {
			t.Error(err)
		}
		if d.Created {
			Remove(d.Number)
		}
	})
	return d
}

func queue(t *testing.T, d Device, name string) string {
	t.Helper()
	b, err := os.ReadFile(sysfs(d.Number) + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestAttach(t *testing.T) {
	needRoot(t)
	for _, c := range []Config{
		{}, {ReadOnly: true}, {SectorSize: 4096}, {SectorSize: 1024, ReadOnly: true}, {Buffered: true},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			c.Backing = backingFile(t, 1<<20)
			d := attach(t, c)
			if b := Backing(d.Number); b != c.Backing {
				t.Errorf("backing %q, want %q", b, c.Backing)
			}
			for name, want := range map[string]string{
				"ro": boolDigit(c.ReadOnly), "loop/dio": boolDigit(!c.Buffered), "loop/partscan": "0", "loop/autoclear": "0",
				"queue/logical_block_size": strconv.Itoa(max(c.SectorSize, 512)), "size": "2048",
			} {
				if got := queue(t, d, name); got != want {
					t.Errorf("%s is %s, want %s", name, got, want)
				}
			}
			if found := Find(func(b string) bool { return b == c.Backing }); len(found) != 1 || found[0] != d.Number {
				t.Errorf("found %v", found)
			}
			if err := Detach(context.Background(), d, DetachOptions{Backing: c.Backing}); err != nil {
				t.Fatal(err)
			}
			if b := Backing(d.Number); b == c.Backing {
				t.Error("still bound")
			}
		})
	}
}

func boolDigit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

func TestAttachRefused(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	for _, c := range []Config{
		{Backing: path, SectorSize: 100}, {Backing: path, SectorSize: 8192}, {Backing: path + "no"}, {Backing: filepath.Dir(path)},
	} {
		if d, err := Attach(context.Background(), c); err == nil {
			t.Errorf("%+v: attached %s", c, d.Node)
			Detach(context.Background(), d, DetachOptions{Backing: c.Backing})
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Attach(ctx, Config{Backing: path}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// TestRace: many attach at once, more than there are devices, and nobody gets another's.
func TestRace(t *testing.T) {
	needRoot(t)
	before := devices()
	var wg sync.WaitGroup
	for i := range 24 {
		path := backingFile(t, int64(i+1)<<20)
		wg.Go(func() {
			for range 4 {
				d, err := Attach(context.Background(), Config{Backing: path})
				if err != nil {
					t.Error(err)
					return
				}
				if b := Backing(d.Number); b != path {
					t.Errorf("%s is on %q, want %q", d.Node, b, path)
				}
				if err := Detach(context.Background(), d, DetachOptions{Backing: path}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for n := range devices() {
		if !before[n] {
			if err := Remove(n); err != nil {
				t.Errorf("remove loop%d: %v", n, err)
			}
		}
	}
}

func TestResize(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	d := attach(t, Config{Backing: path})
	if err := os.Truncate(path, 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := Resize(d.Node); err != nil {
		t.Fatal(err)
	}
	if got := queue(t, d, "size"); got != "6144" {
		t.Errorf("%s sectors, want 6144", got)
	}
}

// TestDetachForeign: a device that somebody else put on another file meanwhile is left alone.
func TestDetachForeign(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	d := attach(t, Config{Backing: path})
	for _, o := range []DetachOptions{{Backing: path + "x"}, {Backing: ""}} {
		if err := Detach(context.Background(), d, o); !errors.Is(err, ErrNotBound) {
			t.Errorf("detach from %q: %v", o.Backing, err)
		}
	}
	if err := Abandon(d, path+"x"); !errors.Is(err, ErrNotBound) {
		t.Errorf("abandon: %v", err)
	}
	if Backing(d.Number) != path {
		t.Error("detached all the same")
	}
	if err := Detach(context.Background(), Device{Number: 1 << 19, Node: "/dev/loop524288"}, DetachOptions{Backing: path}); !errors.Is(err, ErrNotBound) {
		t.Errorf("detach of nothing: %v", err)
	}
}

func TestBusy(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 16<<20)
	d := attach(t, Config{Backing: path})
	detach := func(wait time.Duration) error {
		released, restored := 0, 0
		err := Detach(context.Background(), d, DetachOptions{Backing: path, Wait: wait,
			Release: func() error { released++; return nil }, Restore: func() { restored++ }})
		if err != nil && released != restored {
			t.Errorf("released %d times, restored %d times", released, restored)
		}
		if err == nil && released != restored+1 {
			t.Errorf("released %d times, restored %d times for a detach", released, restored)
		}
		return err
	}
	check := func(err error, want string) {
		t.Helper()
		var busy *BusyError
		if !errors.Is(err, ErrBusy) || !errors.As(err, &busy) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want busy, %q", err, want)
		}
		if queue(t, d, "loop/autoclear") != "0" {
			t.Error("the kernel will clear it at the last close")
		}
	}
	// Open, exclusively and not, in another process and in this one.
	for _, mode := range []int{unix.O_RDONLY, unix.O_RDONLY | unix.O_EXCL} {
		f, err := os.OpenFile(d.Node, mode, 0)
		if err != nil {
			t.Fatal(err)
		}
		check(detach(100*time.Millisecond), "cannot be seen")
		c := exec.Command("sleep", "30")
		c.Stdin = f
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		f.Close()
		check(detach(100*time.Millisecond), fmt.Sprintf("open in process %d (sleep)", c.Process.Pid))
		c.Process.Kill()
		c.Wait()
	}
	// Swap, where this kernel has it.
	if out, err := exec.Command("mkswap", d.Node).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := exec.Command("swapon", d.Node).Run(); err == nil {
		check(detach(10*time.Second), "swap")
		if out, err := exec.Command("swapoff", d.Node).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	f, err := os.Open(d.Node)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	check(Detach(ctx, d, DetachOptions{Backing: path, Wait: time.Minute}), "")
	if time.Since(begin) > 20*time.Second {
		t.Error("did not stop with its context")
	}
	time.AfterFunc(100*time.Millisecond, func() { f.Close() })
	if err := detach(10 * time.Second); err != nil {
		t.Error(err)
	}
}

// TestMountElsewhere: a process that starts in a mount namespace of its own has a copy of every
// mount until it drops it or ends; a detach waits for that, and names it if it stays.
func TestMountElsewhere(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 16<<20)
	d := attach(t, Config{Backing: path})
	dir := filepath.Dir(path) + "/mnt"
	for _, c := range [][]string{{"mkfs.ext4", "-q", d.Node}, {"mkdir", dir}, {"mount", d.Node, dir}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", c, err, out)
		}
	}
	other := exec.Command("sleep", "30")
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Process.Kill(); other.Wait(); unix.Unmount(dir, unix.MNT_DETACH) })
	detach := func(wait time.Duration) error {
		return Detach(context.Background(), d, DetachOptions{Backing: path, Wait: wait})
	}
	begin := time.Now()
	if err := detach(time.Minute); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "mounted on "+dir) {
		t.Errorf("mounted here: %v", err)
	}
	if time.Since(begin) > 30*time.Second {
		t.Error("waited for a mount of its own namespace")
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("in the mount namespace of process %d (sleep)", other.Process.Pid)
	if err := detach(100 * time.Millisecond); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), want) {
		t.Errorf("mounted elsewhere: %v, want %q", err, want)
	}
	time.AfterFunc(200*time.Millisecond, func() { other.Process.Kill() })
	if err := detach(30 * time.Second); err != nil {
		t.Errorf("it has left: %v", err)
	}
}

// TestAbandon: a device in use goes with its last user.
func TestAbandon(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	d := attach(t, Config{Backing: path})
	f, err := os.Open(d.Node)
	if err != nil {
		t.Fatal(err)
	}
	if err := Abandon(d, path); err != nil {
		t.Fatal(err)
	}
	if Backing(d.Number) != path {
		t.Error("gone while it was open")
	}
	// A detach that is refused does not save it.
	if err := Detach(context.Background(), d, DetachOptions{Backing: path, Wait: time.Millisecond}); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	if err := Abandon(d, path+"x"); !errors.Is(err, ErrNotBound) {
		t.Errorf("abandon on another file: %v", err)
	}
	f.Close()
	for range 200 {
		if Backing(d.Number) != path {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("still there")
}

// TestAbandonAgainstDetach: a detach in another process that takes its mark back must not leave
// an abandoned device behind.
func TestAbandonAgainstDetach(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	for range 20 {
		d := attach(t, Config{Backing: path})
		f, err := os.Open(d.Node)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil && Backing(d.Number) == path {
				Detach(ctx, d, DetachOptions{Backing: path, Wait: 5 * time.Millisecond})
			}
		}()
		time.Sleep(3 * time.Millisecond)
		if err := Abandon(d, path); err != nil {
			t.Fatal(err)
		}
		cancel()
		<-done
		f.Close()
		for i := 0; Backing(d.Number) == path; i++ {
			if i == 200 {
				t.Fatal("still bound")
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// TestMissingNode: a container's /dev may lack the device files.
func TestMissingNode(t *testing.T) {
	needRoot(t)
	path := backingFile(t, 1<<20)
	d := attach(t, Config{Backing: path})
	if err := Detach(context.Background(), d, DetachOptions{Backing: path}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.Node); err != nil {
		t.Fatal(err)
	}
	node, err := ensureNode(d.Number)
	if err != nil || node != d.Node {
		t.Fatalf("%q, %v", node, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || unix.Major(st.Rdev) != 7 {
		t.Fatalf("made %o %d:%d, %v", st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev), err)
	}
	if _, err := ensureNode(1 << 19); !errors.Is(err, ErrNotBound) {
		t.Errorf("node of nothing: %v", err)
	}
}

// TestCreated: a minor counts as made for us the first time only, until it is removed.
func TestCreated(t *testing.T) {
	minors.mu.Lock()
	old := minors.seen
	minors.seen = map[int]bool{3: true}
	minors.mu.Unlock()
	defer func() {
		minors.mu.Lock()
		minors.seen = old
		minors.mu.Unlock()
	}()
	for _, c := range []struct {
		n    int
		want bool
	}{{3, false}, {4, true}, {4, false}} {
		if got := newMinor(c.n); got != c.want {
			t.Errorf("minor %d: made for us: %v, want %v", c.n, got, c.want)
		}
	}
	forgetMinor(4)
	if !newMinor(4) {
		t.Error("a minor that was removed and is there again does not count as made for us")
	}
}
