package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// TestCycles attaches and detaches 200 times, 4 at a time, and looks for anything left.
func TestCycles(t *testing.T) {
	for _, holder := range []bool{false, true} {
		t.Run(fmt.Sprintf("holder=%v", holder), func(t *testing.T) {
			s := newSetup(t, holder)
			d := dev.NewMem(64 << 20)
			cycle := func(name string) {
				a, err := s.e.Attach(ctx(t), name, d, export.AttachOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				f, err := os.OpenFile(a.Link(), os.O_RDWR, 0)
				if err != nil {
					t.Error(err)
				} else {
					if _, err := f.WriteAt(make([]byte, 4096), 1<<20); err != nil {
						t.Error(err)
					}
					f.Close()
				}
				if err := a.Detach(ctx(t)); err != nil {
					t.Error(err)
				}
				select {
				case <-a.Done():
				default:
					t.Error("not done after detach")
				}
			}
			cycle("warm")
			loops := len(loopNames(t))
			// Threads without work that are kept are not left behind.
			routines, fds := runtime.NumGoroutine()-s.e.crew.threads()+spareHands, countFDs(t)
			begin := time.Now()
			var wg sync.WaitGroup
			for w := range 4 {
				wg.Go(func() {
					for i := range 50 {
						cycle(fmt.Sprintf("w%d-%d", w, i))
					}
				})
			}
			wg.Wait()
			t.Logf("200 cycles in %v", time.Since(begin))
			s.nothingLeft(t)
			if n := settled(routines, runtime.NumGoroutine); n > routines {
				buf := make([]byte, 1<<16)
				t.Errorf("%d goroutines, %d before\n%s", n, routines, buf[:runtime.Stack(buf, true)])
			}
			if n := settled(fds, func() int { return countFDs(t) }); n > fds {
				t.Errorf("%d descriptors, %d before", n, fds)
			}
			if err := s.e.Close(); err != nil {
				t.Error(err)
			}
			if n := len(loopNames(t)); n > loops {
				t.Errorf("%d loop devices, %d before", n, loops)
			}
		})
	}
}

// nothingLeft checks that no mount, loop device, link or directory of the exporter is there.
func (s *setup) nothingLeft(t *testing.T) {
	t.Helper()
	if l := boundTo(s.dir + "/"); len(l) > 0 {
		t.Errorf("loop devices left: %v", l)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), s.dir) {
		t.Errorf("mounts left:\n%s", b)
	}
	for _, dir := range []string{filepath.Join(s.dir, "run", "fuse"), filepath.Join(s.dir, "links")} {
		if l, _ := os.ReadDir(dir); len(l) > 0 {
			t.Errorf("%s: left: %v", dir, l)
		}
	}
}

func loopNames(t *testing.T) []string {
	l, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func countFDs(t *testing.T) int {
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

// settled waits up to 3 seconds for a count to come down to want.
func settled(want int, count func() int) int {
	for range 300 {
		if count() <= want {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return count()
}

func TestBusy(t *testing.T) {
	needTool(t, "mkfs.ext4", "sleep", "unshare")
	s := newSetup(t, false)
	d := dev.NewMem(64 << 20)
	a := s.attach("busy", d, export.AttachOptions{})
	run(t, "mkfs.ext4", "-q", a.Node())
	mnt := filepath.Join(s.dir, "m nt")
	mount(t, a.Node(), mnt)
	refused := func(want string) {
		t.Helper()
		begin := time.Now()
		err := a.Detach(ctx(t))
		if !errors.Is(err, export.ErrBusy) || !strings.Contains(err.Error(), want) {
			t.Fatalf("detach: %v; want ErrBusy naming %q", err, want)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("busy after %v", took)
		}
		if to, err := os.Readlink(a.Link()); err != nil || to != a.Node() {
			t.Fatalf("link after a refused detach: %q, %v", to, err)
		}
		f, err := os.Open(a.Node())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Fatalf("read after a refused detach: %v", err)
		}
	}
	refused("mounted on " + mnt)
	unmountFS(t, mnt)

	// Mounted in another mount namespace.
	c := exec.Command("unshare", "-m", "sh", "-c", `mount "$0" "$1" && echo up && read x`, a.Node(), mnt)
	in, _ := c.StdinPipe()
	out, _ := c.StdoutPipe()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	out.Read(make([]byte, 3))
	refused("in the mount namespace of process")
	in.Close()
	c.Wait()

	// Open in a process.
	c = exec.Command("sleep", "60")
	f, err := os.Open(a.Node())
	if err != nil {
		t.Fatal(err)
	}
	c.Stdin = f
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	refused(fmt.Sprintf("open in process %d (sleep)", c.Process.Pid))
	c.Process.Kill()
	c.Wait()

	// An opener that goes away in time, as udev does, is waited for.
	f, err = os.Open(a.Node())
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { f.Close() })
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	s.nothingLeft(t)
}

// TestDetachFlushes: what was written through the page cache of the node is in the device.
func TestDetachFlushes(t *testing.T) {
	s := newSetup(t, false)
	d := dev.NewMem(64 << 20)
	f := dev.NewFault(d)
	a := s.attach("flush", f, export.AttachOptions{})
	node, err := os.OpenFile(a.Node(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.WriteAt([]byte("hello"), 12345); err != nil {
		t.Fatal(err)
	}
	node.Close()
	before := f.Counts()
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := d.ReadAt(got, 12345); err != nil || string(got) != "hello" {
		t.Fatalf("device holds %q, %v", got, err)
	}
	if n := f.Counts().Sub(before); n.Flushes == 0 {
		t.Fatalf("no flush in detach: %+v", n)
	}
}

// TestAttachRefused: bad arguments leave nothing behind.
func TestAttachRefused(t *testing.T) {
	s := newSetup(t, false)
	a := s.attach("one", dev.NewMem(1<<20), export.AttachOptions{})
	for _, c := range []struct {
		name string
		size int64
		o    export.AttachOptions
		want error
	}{
		{"one", 1 << 20, export.AttachOptions{}, export.ErrExists},
		{"../x", 1 << 20, export.AttachOptions{}, nil},
		{"", 1 << 20, export.AttachOptions{}, nil},
		{"empty", 0, export.AttachOptions{}, nil},
		{"odd", 1<<20 + 1, export.AttachOptions{}, nil},
		{"sector", 1<<20 + 512, export.AttachOptions{SectorSize: 4096}, nil},
		{"sector3", 3 << 20, export.AttachOptions{SectorSize: 768}, nil},
	} {
		_, err := s.e.Attach(ctx(t), c.name, dev.NewMem(c.size), c.o)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("attach %q of %d bytes: %v, want %v", c.name, c.size, err, c.want)
		}
	}
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatalf("second detach: %v", err)
	}
	s.nothingLeft(t)
}

// A blocked device answers nothing until it is let go.
type blocked struct {
	dev.Device
	gate chan struct{}
}

func (b blocked) ReadAt(p []byte, off int64) (int, error) {
	<-b.gate
	return b.Device.ReadAt(p, off)
}

func (b blocked) WriteAt(p []byte, off int64) (int, error) {
	<-b.gate
	return b.Device.WriteAt(p, off)
}

// TestDetachSlowDevice: a caller that no longer waits leaves a detach that ends by itself.
func TestDetachSlowDevice(t *testing.T) {
	s := newSetup(t, false)
	b := blocked{dev.NewMem(16 << 20), make(chan struct{})}
	a, err := s.e.Attach(ctx(t), "slow", b, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Written by a process of its own: the last close writes back, and waits.
	c := exec.Command("dd", "if=/dev/zero", "of="+a.Node(), "bs=4096", "count=1", "conv=notrunc")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	short, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := a.Detach(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("detach of a stuck device: %v", err)
	}
	close(b.gate)
	c.Wait()
	if err := a.Detach(ctx(t)); err != nil {
		// The first detach may have seen dd as an opener.
		if !errors.Is(err, export.ErrBusy) {
			t.Fatal(err)
		}
		if err := a.Detach(ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	s.nothingLeft(t)
}

// TestUnmountedByHand: an administrator's umount -f ends the attachment, and the next attach of
// the same name works.
func TestUnmountedByHand(t *testing.T) {
	s := newSetup(t, false)
	d := dev.NewMem(16 << 20)
	a, err := s.e.Attach(ctx(t), "hand", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.dir, "run", "fuse", "hand")
	unix.Unmount(dir, unix.MNT_FORCE)
	select {
	case <-a.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("attachment does not notice that its connection has ended")
	}
	// It cannot be synced any more, which is said, but it goes.
	if err := a.Detach(ctx(t)); err == nil || errors.Is(err, export.ErrBusy) {
		t.Fatalf("detach of a lost connection: %v", err)
	}
	s.nothingLeft(t)
	a = s.attach("hand", d, export.AttachOptions{})

	// A lazy unmount leaves everything working, and the loop device is still known as ours.
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(a.Node(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(ctx(t)); !errors.Is(err, export.ErrBusy) {
		t.Fatalf("detach of an open device: %v", err)
	}
	f.Close()
	loops := filepath.Join("/sys/block", filepath.Base(a.Node()), "loop")
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(loops); !os.IsNotExist(err) {
		t.Errorf("loop device still bound: %v", err)
	}
	s.nothingLeft(t)
}
