package main

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon"
	"mica/daemon/api"
)

// TestExportsOfADeadDaemon: nodes that a daemon has left are listed and cut off without one: what
// waits for them fails, and the next daemon starts without them.
func TestExportsOfADeadDaemon(t *testing.T) {
	b := newBox(t)
	if list := asJSON[[]daemon.LeftExport](b, "exports"); len(list) != 0 {
		t.Errorf("before any daemon: %+v", list)
	}
	b.start()
	if !asJSON[api.Status](b, "status").Exports.Resend {
		t.Skip("SKIPPED: this kernel cannot resend FUSE requests: want Linux 6.9 or later")
	}
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	link := strings.TrimSpace(b.mica("attach", "web"))
	node := attachedNode(b, "web")
	if stderr := b.fails("exports"); !strings.Contains(stderr, "in use by another daemon") {
		t.Errorf("while the daemon runs: %s", stderr)
	}
	b.stop(syscall.SIGKILL)

	list := asJSON[[]daemon.LeftExport](b, "exports")
	if len(list) != 1 || list[0].Node != node || !strings.HasSuffix(link, "/"+list[0].Name) {
		t.Fatalf("%+v; want %s as %s", list, node, link)
	}
	if stderr := b.fails("exports", "drop", "nothing"); !strings.Contains(stderr, `"nothing"`) {
		t.Errorf("drop of nothing: %s", stderr)
	}
	for _, args := range [][]string{{"exports", "drop"}, {"exports", "drop", "--all", list[0].Name}} {
		if _, stderr, code := b.try(args...); code != 2 || !strings.Contains(stderr, "--all") {
			t.Errorf("%q: exit status %d, %s", args, code, stderr)
		}
	}
	waits := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(node, os.O_RDWR|unix.O_DIRECT, 0)
		if err == nil {
			buf, merr := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err = merr; err == nil {
				_, err = f.ReadAt(buf, 8<<20)
				unix.Munmap(buf)
			}
			f.Close()
		}
		waits <- err
	}()
	time.Sleep(100 * time.Millisecond)
	if out := b.mica("exports", "drop", "--all"); strings.TrimSpace(out) != list[0].Name {
		t.Errorf("dropped %q, want %s", out, list[0].Name)
	}
	select {
	case err := <-waits:
		if err == nil {
			t.Error("a read of what nobody serves succeeded")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("a read of what was cut off still waits")
	}
	if list := asJSON[[]daemon.LeftExport](b, "exports"); len(list) != 0 {
		t.Errorf("afterwards: %+v", list)
	}
	if _, err := os.Lstat(link); err == nil {
		t.Error("the link is still there")
	}
	b.start()
	if dir := b.mica("mount", "web"); b.read(strings.TrimSpace(dir)+"/etc/hostname") == "" {
		t.Error("nothing in the container")
	}
	b.mica("umount", "web")
}
