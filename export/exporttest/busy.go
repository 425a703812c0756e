package exporttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/export"

	"golang.org/x/sys/unix"
)

// hold is a process that has files open until its standard input ends.
func hold(args []string) error {
	for _, a := range args {
		path, excl := strings.CutPrefix(a, "excl:")
		flags := os.O_RDONLY
		if excl {
			flags |= unix.O_EXCL
		}
		if _, err := unix.Open(path, flags, 0); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	fmt.Println("open")
	_, err := os.Stdin.Read(make([]byte, 1))
	_ = err // its end
	return nil
}

// holder starts such a process; the returned function ends it.
func holder(t *testing.T, path string) (pid int, end func()) {
	t.Helper()
	c := exec.Command("/proc/self/exe", "suite-hold", path)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		in.Close()
		c.Wait()
	})
	t.Cleanup(end)
	return c.Process.Pid, end
}

// testBusy: what is open is not detached, the error says by whom, and nothing has changed.
func testBusy(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(4 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	for _, how := range []string{"", "excl:"} {
		pid, end := holder(t, how+a.Node())
		begin := time.Now()
		err := a.Detach(within(t, time.Minute))
		if !errors.Is(err, export.ErrBusy) {
			t.Fatalf("%sopen: %v", how, err)
		}
		if want := fmt.Sprintf("process %d", pid); !strings.Contains(err.Error(), want) {
			t.Errorf("%sopen: %v; want it to name %s", how, err, want)
		}
		if took := time.Since(begin); took > 30*time.Second {
			t.Errorf("refused after %v", took)
		}
		if to, err := os.Readlink(a.Link()); err != nil || to != a.Node() {
			t.Errorf("link to %q, %v", to, err)
		}
		f, err := os.OpenFile(a.Link(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("still here"), 4096); err != nil {
			t.Error(err)
		}
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
		f.Close()
		same(t, "after the refusal", contents(t, m, 4096, 10), []byte("still here"))
		end()
	}
	select {
	case <-a.Done():
		t.Error("done after a refusal")
	default:
	}
	r.detach(a)
	select {
	case <-a.Done():
	default:
		t.Error("not done after the detach")
	}
	if err := a.Detach(within(t, time.Minute)); err != nil {
		t.Errorf("detach twice: %v", err)
	}
	if !missing(a.Link()) {
		t.Error("the link is still there")
	}
}

// testMounted: what is mounted is not detached.
func testMounted(t *testing.T, d Driver) {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("SKIPPED: mkfs.ext4 is not installed")
	}
	r := newRig(t, d)
	m := newDisk(16 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", a.Node()).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := filepath.Join(r.o.Dir, "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(a.Link(), dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := a.Detach(within(t, time.Minute))
	if !errors.Is(err, export.ErrBusy) || !strings.Contains(err.Error(), "mounted on "+dir) {
		t.Errorf("%v; want busy, mounted on %s", err, dir)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != "contents" {
		t.Errorf("after the refusal: %q, %v", b, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	r.detach(a)
}

// testDetachGoesOn: a detach whose caller no longer waits goes on, and another call waits for it.
func testDetachGoesOn(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(1 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	_, end := holder(t, a.Node())
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := a.Detach(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("detach of what is open, for 50 ms: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, end)
	if err := a.Detach(within(t, time.Minute)); err != nil {
		t.Error(err)
	}
	end()
}

// testLinks: a link leads to its device or is not there.
func testLinks(t *testing.T, d Driver) {
	r := newRig(t, d)
	stale := map[string]string{}
	a := r.attach("alive", newDisk(1<<20), export.AttachOptions{})
	if to, err := os.Readlink(a.Link()); err != nil || to != a.Node() || a.Link() != filepath.Join(r.o.Links(), "alive") {
		t.Fatalf("link %s to %q, %v; want %s", a.Link(), to, err, a.Node())
	}
	// A predecessor's links that lead to this device now, or to nothing of ours.
	stale["other-name"] = a.Node()
	stale["gone"] = strings.TrimRight(a.Node(), "0123456789") + "977"
	foreign := map[string]string{"disk": "/dev/null", "text": "nowhere"}
	for _, links := range []map[string]string{stale, foreign} {
		for name, to := range links {
			if err := os.Symlink(to, filepath.Join(r.o.Links(), name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.e.Close(); err != nil {
		t.Fatal(err)
	}
	r.open()
	for name := range stale {
		if !missing(filepath.Join(r.o.Links(), name)) {
			t.Errorf("stale link %s is still there", name)
		}
	}
	for name := range foreign {
		if missing(filepath.Join(r.o.Links(), name)) {
			t.Errorf("link %s of somebody else is gone", name)
		}
	}
	if missing(a.Link()) {
		t.Error("the link of a survivor is gone")
	}
	b, err := r.e.Adopt(within(t, time.Minute), "alive", newDisk(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	// While it is taken away, the link goes before the node can lead elsewhere: whoever opens it all
	// the time never sees anything but this device or nothing.
	stop, seen := make(chan struct{}), make(chan string, 1)
	go func() {
		defer close(seen)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if to, err := os.Readlink(b.Link()); err == nil && missing(to) && !missing(b.Link()) {
				seen <- to
				return
			}
		}
	}()
	r.detach(b)
	close(stop)
	if to, bad := <-seen; bad {
		t.Errorf("the link led to %s, which was gone", to)
	}
	// A name whose place is taken by something else cannot be attached, and leaves nothing.
	if err := os.Symlink("/dev/null", filepath.Join(r.o.Links(), "taken")); err != nil {
		t.Fatal(err)
	}
	if c, err := r.e.Attach(within(t, time.Minute), "taken", newDisk(1<<20), export.AttachOptions{}); err == nil {
		t.Error("attached where another link is")
		r.detach(c)
	}
}

// testTakenAway: somebody else ends the device.
func testTakenAway(t *testing.T, d Driver) {
	r := newRig(t, d)
	a := r.attach("x", newDisk(1<<20), export.AttachOptions{})
	b := r.attach("y", newDisk(1<<20), export.AttachOptions{})
	if err := d.TakeAway(a.Node()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("nobody noticed")
	}
	select {
	case <-b.Done():
		t.Error("the other one has ended, too")
	default:
	}
	// It may say that data was lost, but it is gone.
	if err := a.Detach(within(t, time.Minute)); err != nil {
		t.Logf("clear away: %v", err)
	}
	if !missing(a.Link()) {
		t.Error("the link is still there")
	}
	c := r.attach("x", newDisk(1<<20), export.AttachOptions{})
	if _, err := os.ReadFile(c.Link()); err != nil {
		t.Error(err)
	}
}
