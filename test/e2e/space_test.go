package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fill starts a process that writes a file of so many MiB, directly and one after the other, and
// syncs it. (Write-back has so many writes under way that not all of them may wait for space.)
func (b *box) fill(path string, mib string) *exec.Cmd {
	b.Helper()
	c := b.tool("dd", "if=/dev/urandom", "of="+path, "bs=1M", "count="+mib, "oflag=direct", "conv=fsync", "status=none")
	c.Stderr = new(bytes.Buffer)
	return b.background(c)
}

// done waits for a process, which must succeed.
func (b *box) done(c *exec.Cmd) {
	b.Helper()
	if err := c.Wait(); err != nil {
		b.Fatalf("%s: %v: %v", c.Path, err, c.Stderr)
	}
}

// waits until a process has to wait for space, and still does after a while.
func (b *box) awaitFull(c *exec.Cmd) {
	b.Helper()
	b.eventually("a write waits for space", func() bool {
		p := b.status().Pool
		return p.Mode == "out_of_data_space" && p.WaitingForSpace > 0
	})
	if !running(c) {
		b.Errorf("the writer ended although nothing was freed: %v", c.Stderr)
	}
}

// TestFullPool: in a full pool writes that need a block wait; reads, overwrites, listing and
// removal go on, a snapshot of what is mounted is refused and leaves nothing; removal wakes
// the writers, and so does growing.
func TestFullPool(t *testing.T) {
	b := newBox(t)
	b.config = "[pool]\nsize = \"64M\"\nno_space_timeout = \"10m\"\n[containers]\nbase_size = \"256M\"\n"
	b.start()
	b.smallImage()
	for _, n := range []string{"a", "b"} {
		b.mica("create", "small", n)
	}
	dir := b.mount("b")
	b.done(b.fill(filepath.Join(dir, "f"), "20"))
	b.mica("umount", "b")
	dir = b.mount("a")
	b.done(b.fill(filepath.Join(dir, "own"), "2"))
	w := b.fill(filepath.Join(dir, "f"), "60")
	b.awaitFull(w)

	// What goes on.
	if !bytes.Equal(b.readFile(filepath.Join(dir, "big")), pattern(1, 8<<20)) {
		t.Error("a file of the image reads wrong")
	}
	b.sh("dd", "if=/dev/zero", "of="+filepath.Join(dir, "own"), "bs=64k", "seek=8", "count=1", "oflag=direct", "conv=notrunc", "status=none")
	for _, args := range [][]string{{"ls"}, {"df"}, {"status"}, {"image", "ls"}, {"pool", "check"}} {
		b.mica(args...)
	}
	before := b.full()
	b.fails([]string{"snapshot", "a", "s"}, `"a"`, "space")
	b.fails([]string{"fork", "a", "c"}, `"a"`, "space")
	if after := b.full(); after != before {
		t.Errorf("what was refused has changed the store: %+v, was %+v", after, before)
	}

	b.mica("rm", "b")
	b.eventually("the writer goes on", func() bool { return b.status().Pool.Mode == "rw" || !running(w) })
	b.awaitFull(w)
	b.mica("pool", "grow", "--size", "256M")
	b.done(w)
	if p := b.status().Pool; p.Mode != "rw" || p.WaitingForSpace != 0 || p.DataSpaceBytes != 256<<20 {
		t.Errorf("after growing: mode %s, %d writers wait, %d bytes", p.Mode, p.WaitingForSpace, p.DataSpaceBytes)
	}
	b.mica("snapshot", "a", "s")
	b.mica("umount", "a")
	node := b.mica("attach", "a")
	b.sh("e2fsck", "-fn", node)
	b.mica("detach", "a")
	events := b.mica("events", "--no-follow", "--kind", "out_of_data_space", "--kind", "data_space_available")
	if strings.Count(events, "out_of_data_space") < 2 || strings.Count(events, "data_space_available") < 2 {
		t.Errorf("events: %s", events)
	}
}

// full is figures for a pool in which writers wait.
func (b *box) full() figure {
	b.Helper()
	st := b.status()
	return figure{0, st.Pool.Devices, st.Store.Images, st.Store.Layers, st.Store.Containers, st.Store.Snapshots}
}

// TestFullHost: the host's file system under a sparse data file runs full. That is the same state
// of the pool: writes wait, reads go on; removal gives space back to the host and wakes them.
func TestFullHost(t *testing.T) {
	b := newBox(t)
	b.config = "[pool]\nsize = \"1G\"\nno_space_timeout = \"10m\"\n[containers]\nbase_size = \"256M\"\n"
	if err := os.Mkdir(b.root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", b.root, "tmpfs", 0, "size=64m,mode=700"); err != nil {
		t.Skipf("SKIPPED: cannot mount a tmpfs: %v", err)
	}
	b.start()
	b.smallImage()
	for _, n := range []string{"a", "b"} {
		b.mica("create", "small", n)
	}
	dir := b.mount("b")
	b.done(b.fill(filepath.Join(dir, "f"), "20"))
	b.mica("umount", "b")
	dir = b.mount("a")
	w := b.fill(filepath.Join(dir, "f"), "40")
	b.awaitFull(w)
	if p := b.status().Pool; p.HostFreeBytes > 2<<20 || p.DataFreeBytes < 512<<20 || p.NeedsCheck {
		t.Errorf("the host has %d bytes left, the pool %d, needs_check %v", p.HostFreeBytes, p.DataFreeBytes, p.NeedsCheck)
	}
	if !bytes.Equal(b.readFile(filepath.Join(dir, "big")), pattern(1, 8<<20)) {
		t.Error("a file of the image reads wrong")
	}
	b.mica("rm", "b")
	b.done(w)
	b.eventually("the pool is well", func() bool { return b.status().Pool.Mode == "rw" })
	b.mica("umount", "a")
	node := b.mica("attach", "a")
	b.sh("e2fsck", "-fn", node)
	b.mica("detach", "a")
	// The host gets room in another way: nobody tells the pool, it finds out.
	dir = b.mount("a")
	w = b.fill(filepath.Join(dir, "g"), "60")
	b.awaitFull(w)
	if err := unix.Mount("tmpfs", b.root, "tmpfs", unix.MS_REMOUNT, "size=256m"); err != nil {
		t.Fatal(err)
	}
	b.done(w)
	b.mica("umount", "a")
}

// TestNoSpaceTimeout: after the time limit writers and imports get ENOSPC, and all can be removed.
func TestNoSpaceTimeout(t *testing.T) {
	b := newBox(t)
	b.config = "[pool]\nsize = \"64M\"\nno_space_timeout = \"2s\"\n[containers]\nbase_size = \"256M\"\n"
	b.start()
	empty := b.figures()
	b.smallImage()
	b.mica("create", "small", "a")
	dir := b.mount("a")
	begin := time.Now()
	w := b.fill(filepath.Join(dir, "f"), "100")
	err := w.Wait()
	if err == nil || !strings.Contains(w.Stderr.(*bytes.Buffer).String(), "No space left") && !strings.Contains(w.Stderr.(*bytes.Buffer).String(), "Input/output error") {
		t.Errorf("100 MiB in a pool of 64: %v %v", err, w.Stderr)
	}
	if d := time.Since(begin); d < 2*time.Second {
		t.Errorf("the writer failed after %v, the limit is 2 s", d)
	}
	if !bytes.Equal(b.readFile(filepath.Join(dir, "big")), pattern(1, 8<<20)) {
		t.Error("a file of the image reads wrong")
	}
	// An import does not fit either, and leaves nothing.
	before := b.figures()
	b.fails([]string{"image", "import", b.archive("two.tar", ociImage{name: "two", layers: [][]byte{
		tarOf(t, file{name: "x", body: pattern(9, 70<<20)})}})}, `"two"`, "space")
	if after := b.figures(); after != before {
		t.Errorf("an import that does not fit left %+v, was %+v", after, before)
	}
	// What the page cache could not write is reported, and the container is unmounted all the same.
	if _, stderr, code := b.try("umount", "a"); code != 0 && !strings.Contains(stderr, "unwritten data") {
		t.Errorf("umount: %s", stderr)
	}
	b.mica("rm", "a")
	b.mica("image", "rm", "small")
	if got := b.figures(); got != empty {
		t.Errorf("at the end %+v, want %+v", got, empty)
	}
}
