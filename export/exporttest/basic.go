package exporttest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

func testSizes(t *testing.T, d Driver) {
	r := newRig(t, d)
	for i, c := range []struct {
		size   int64
		sector int
	}{{4096, 0}, {1<<20 + 512, 512}, {64 << 20, 1024}, {1<<20 + 4096, 4096}, {10 << 40, 4096}} {
		t.Run(fmt.Sprintf("%d by %d", c.size, c.sector), func(t *testing.T) {
			m := newDisk(c.size)
			a, err := r.e.Attach(within(t, time.Minute), fmt.Sprint("d", i), m, export.AttachOptions{SectorSize: c.sector})
			if err != nil {
				t.Fatal(err)
			}
			defer r.detach(a)
			f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got := sizeOf(t, f); got != c.size {
				t.Errorf("the node has %d bytes, want %d", got, c.size)
			}
			sector := max(c.sector, 512)
			if got, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil || got != sector {
				t.Errorf("sectors of %d bytes (%v), want %d", got, err, sector)
			}
			if a.Name() != fmt.Sprint("d", i) {
				t.Errorf("name %q", a.Name())
			}
			// The last sector can be written, and read back from the device.
			b := fill(aligned(t, sector), uint64(i))
			if _, err := f.WriteAt(b, c.size-int64(sector)); err != nil {
				t.Fatal(err)
			}
			same(t, "last sector", contents(t, m, c.size-int64(sector), sector), b)
		})
	}
}

// testDirtyBytes: what waits for write-back is bounded as asked for, and not for who gets the minor next.
func testDirtyBytes(t *testing.T, d Driver) {
	r := newRig(t, d)
	for i, want := range []int64{32 << 20, 0, 64 << 20} {
		a := r.attach(fmt.Sprint("d", i), newDisk(1<<20), export.AttachOptions{DirtyBytes: want})
		real, err := filepath.EvalSymlinks(a.Node())
		if err != nil {
			t.Fatal(err)
		}
		bdi := filepath.Join("/sys/block", filepath.Base(real), "bdi")
		strict, err := os.ReadFile(filepath.Join(bdi, "strict_limit"))
		if err != nil {
			t.Skipf("SKIPPED: no bound of dirty pages for a device (before Linux 6.2): %v", err)
		}
		if got := strings.TrimSpace(string(strict)) == "1"; got != (want > 0) {
			t.Errorf("%d bytes asked for: a bound of its own is %v", want, got)
		}
		// The kernel keeps a share of all memory, in millionths.
		var has int64
		if b, err := os.ReadFile(filepath.Join(bdi, "max_bytes")); err != nil {
			t.Error(err)
		} else if fmt.Sscan(string(b), &has); want > 0 && (has < want/2 || has > want*2) {
			t.Errorf("%d bytes asked for, the bound is %d", want, has)
		}
		r.detach(a)
	}
}

func testRefused(t *testing.T, d Driver) {
	r := newRig(t, d)
	for _, c := range []struct {
		name string
		size int64
		o    export.AttachOptions
	}{
		{"empty", 0, export.AttachOptions{}}, {"odd", 1000, export.AttachOptions{}}, {"odd4k", 1<<20 + 512, export.AttachOptions{SectorSize: 4096}},
		{"sector100", 1 << 20, export.AttachOptions{SectorSize: 100}}, {"sector8k", 1 << 20, export.AttachOptions{SectorSize: 8192}},
		{"", 1 << 20, export.AttachOptions{}}, {"../up", 1 << 20, export.AttachOptions{}}, {".hidden", 1 << 20, export.AttachOptions{}},
	} {
		if a, err := r.e.Attach(within(t, time.Minute), c.name, newDisk(c.size), c.o); err == nil {
			t.Errorf("%q: attached as %s", c.name, a.Node())
			r.detach(a)
		}
	}
	r.attach("x", newDisk(1<<20), export.AttachOptions{})
	if _, err := r.e.Attach(within(t, time.Minute), "x", newDisk(1<<20), export.AttachOptions{}); !errors.Is(err, export.ErrExists) {
		t.Errorf("attach twice: %v", err)
	}
	if _, err := r.e.Adopt(within(t, time.Minute), "none", newDisk(1<<20)); !errors.Is(err, export.ErrNotFound) {
		t.Errorf("adopt nothing: %v", err)
	}
	if err := r.e.Drop(within(t, time.Minute), "none"); !errors.Is(err, export.ErrNotFound) {
		t.Errorf("drop nothing: %v", err)
	}
	if l, err := r.e.Survivors(within(t, time.Minute)); err != nil || len(l) > 0 {
		t.Errorf("survivors %q, %v", l, err)
	}
}

func testAlignment(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(4 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
	buf := fill(aligned(t, 2<<20), 1)
	for _, c := range []struct{ off, n int64 }{{0, 512}, {512, 512}, {1536, 3584}, {1<<20 - 512, 1024}, {4<<20 - 512, 512}, {64<<10 - 512, 1<<20 + 1024}} {
		b := buf[:c.n]
		if _, err := f.WriteAt(b, c.off); err != nil {
			t.Fatalf("write [%d, +%d): %v", c.off, c.n, err)
		}
		same(t, fmt.Sprintf("[%d, +%d) in the device", c.off, c.n), contents(t, m, c.off, int(c.n)), b)
		got := aligned(t, int(c.n))
		if _, err := f.ReadAt(got, c.off); err != nil {
			t.Fatal(err)
		}
		same(t, fmt.Sprintf("[%d, +%d) read", c.off, c.n), got, b)
	}
	_, err := f.WriteAt(buf[:100], 0)
	wantErrno(t, "write 100 bytes", err, unix.EINVAL)
	_, err = f.WriteAt(buf[:512], 100)
	wantErrno(t, "write at byte 100", err, unix.EINVAL)
	_, err = unix.Pwrite(int(f.Fd()), buf[:512], 4<<20)
	wantErrno(t, "write past the end", err, unix.ENOSPC)
	if n, err := unix.Pread(int(f.Fd()), buf[:512], 4<<20); n != 0 || err != nil {
		t.Errorf("read past the end: %d, %v", n, err)
	}
	// Through the page cache any byte can be written.
	g := openNode(t, a.Node(), os.O_RDWR)
	if _, err := g.WriteAt([]byte("odd"), 12345); err != nil {
		t.Fatal(err)
	}
	if err := g.Sync(); err != nil {
		t.Fatal(err)
	}
	same(t, "odd bytes", contents(t, m, 12345, 3), []byte("odd"))
	f.Close()
	g.Close()
}

func testResize(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(4 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR)
	if err := a.Resize(within(t, time.Minute)); err != nil {
		t.Errorf("to the same size: %v", err)
	}
	if err := m.Resize(12 << 20); err != nil {
		t.Fatal(err)
	}
	err := a.Resize(within(t, time.Minute))
	if d.NoResize {
		if !errors.Is(err, dev.ErrUnsupported) {
			t.Errorf("resize: %v, want an error that says it is not supported", err)
		}
		f.Close()
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := sizeOf(t, f); got != 12<<20 {
		t.Errorf("%d bytes after growing to 12 MiB", got)
	}
	b := fill(make([]byte, 4096), 3)
	if _, err := f.WriteAt(b, 12<<20-4096); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	same(t, "new space", contents(t, m, 12<<20-4096, 4096), b)
	if err := m.Resize(4 << 20); err != nil {
		t.Fatal(err)
	}
	if err := a.Resize(within(t, time.Minute)); err == nil {
		t.Error("a node became shorter")
	}
	if err := m.Resize(12 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func testReadOnly(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(1 << 20)
	want := fill(make([]byte, 1<<20), 4)
	if _, err := m.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	a := r.attach("x", m, export.AttachOptions{ReadOnly: true})
	f := openNode(t, a.Node(), os.O_RDONLY)
	if ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET); err != nil || ro != 1 {
		t.Errorf("BLKROGET: %d, %v", ro, err)
	}
	got := make([]byte, 1<<20)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	same(t, "contents", got, want)
	if g, err := os.OpenFile(a.Node(), os.O_RDWR, 0); err == nil { // kernels refuse the open, or the write
		if _, err := unix.Pwrite(int(g.Fd()), got[:512], 0); err == nil {
			if err = g.Sync(); err == nil {
				t.Error("written")
			}
		}
		g.Close()
	}
	if err := blkZeroout(f, 0, 4096); err == nil {
		t.Error("zeroed")
	}
	if err := blkDiscard(f, 0, 4096); err == nil {
		t.Error("discarded")
	}
	f.Close()
	same(t, "contents in the end", contents(t, m, 0, 1<<20), want)
	if m.unflushed(0, 0) || m.zeroed > 0 || m.unmapped > 0 {
		t.Error("a change came through")
	}
}

func testZeroes(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(8 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
	all := fill(aligned(t, 8<<20), 5)
	if _, err := f.WriteAt(all, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		off, n int64
		fn     func(off, n int64) error
	}{
		{"BLKZEROOUT", 0, 4096, func(off, n int64) error { return blkZeroout(f, off, n) }},
		{"BLKZEROOUT of odd sectors", 1<<20 + 512, 64<<10 + 1024, func(off, n int64) error { return blkZeroout(f, off, n) }},
		{"PUNCH_HOLE", 2 << 20, 192 << 10, func(off, n int64) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		}},
		{"ZERO_RANGE", 3<<20 + 4096, 1 << 20, func(off, n int64) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE, off, n)
		}},
	} {
		if err := c.fn(c.off, c.n); err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		clear(all[c.off : c.off+c.n])
		got := aligned(t, 8<<20)
		if _, err := f.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		same(t, c.what, got, all)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		same(t, c.what+" in the device", contents(t, m, 0, 8<<20), all)
		if m.unflushed(c.off, c.n) {
			t.Errorf("%s: not durable after fsync", c.what)
		}
	}
	// A discard changes nothing but what was discarded.
	if err := blkDiscard(f, 5<<20, 1<<20); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("discard: %v", err)
	}
	got := aligned(t, 8<<20)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	same(t, "before what was discarded", got[:5<<20], all[:5<<20])
	same(t, "after what was discarded", got[6<<20:], all[6<<20:])
	if !d.DiscardIs0 && m.unmapped != 1<<20 {
		t.Errorf("the device was told of %d discarded bytes, want 1 MiB", m.unmapped)
	}
	f.Close()
}

// testReuse: a node that gets the minor of another shows nothing of that one's, not even what the
// kernel had read before.
func testReuse(t *testing.T, d Driver) {
	r := newRig(t, d)
	node := ""
	for i := range 8 {
		m := newDisk(1 << 20)
		want := make([]byte, 1<<20)
		if i%2 == 0 {
			fill(want, uint64(i))
			if _, err := m.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
		}
		a, err := r.e.Attach(within(t, time.Minute), fmt.Sprint("d", i), m, export.AttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(a.Link())
		if err != nil {
			t.Error(err)
		}
		same(t, fmt.Sprintf("device %d on %s (the one before was %s)", i, a.Node(), node), got, want)
		node = a.Node()
		r.detach(a)
	}
}
