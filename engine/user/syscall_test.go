package user

import (
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/thin"
)

// calls counts the read and write calls that this thread makes while do runs.
func calls(t *testing.T, do func()) (reads, writes int64) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := unix.Open("/proc/thread-self/io", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("SKIPPED: this kernel does not count system calls: %v", err)
	}
	defer unix.Close(fd)
	var text [512]byte
	look := func() (r, w int64) {
		n, err := unix.Pread(fd, text[:], 0)
		must(t, err)
		for line := range strings.Lines(string(text[:n])) {
			fmt.Sscanf(line, "syscr: %d", &r)
			fmt.Sscanf(line, "syscw: %d", &w)
		}
		return r, w
	}
	r0, w0 := look()
	r1, w1 := look()
	do()
	r2, w2 := look()
	return r2 - r1 - (r1 - r0), w2 - w1 - (w1 - w0)
}

// TestSystemCalls: what a request costs on files, counted by the kernel: one call for each contiguous
// run, one more to read what a write does not cover of a shared block, and none for the journal.
func TestSystemCalls(t *testing.T) {
	l := Location{Dir: filepath.Join(shm(t), "pool")}
	must(t, Format(ctx, l, FormatOptions{DataBytes: 1 << 30}))
	p, err := Open(ctx, l, Options{CommitInterval: time.Hour, JournalDirs: []string{shm(t)}, Logger: quiet})
	must(t, err)
	defer func() { must(t, p.Close()) }()
	if s, err := p.Status(ctx); err != nil || s.Journal.Path == "" {
		t.Errorf("there is no journal: %+v, %v", s.Journal, err)
	}
	var hs []*Thin
	for id := range 3 {
		must(t, p.CreateThin(ctx, thin.DevID(id)))
		h, err := p.Open(ctx, thin.DevID(id), engine.OpenOptions{SizeBytes: 64 << 20})
		must(t, err)
		defer h.Close()
		hs = append(hs, h.(*Thin))
	}
	// Several devices allocate at once, in small writes.
	for off := int64(0); off < 8<<20; off += block {
		for _, h := range hs {
			write(t, h, fill(1, block), off)
		}
	}
	h, small, big := hs[1], make([]byte, 4096), make([]byte, 1<<20)
	steps := []struct {
		what          string
		do            func() error
		reads, writes int64
	}{
		{"read of 4 KiB", func() error { _, err := h.ReadAt(small, 2<<20+8192); return err }, 1, 0},
		{"write of 4 KiB", func() error { _, err := h.WriteAt(small, 2<<20+8192); return err }, 0, 1},
		{"inline read of 4 KiB", func() error { return h.TryReadAt(small, 2<<20+8192) }, 1, 0},
		{"inline write of 4 KiB", func() error { return h.TryWriteAt(small, 2<<20+8192) }, 0, 1},
		{"read of 1 MiB", func() error { _, err := h.ReadAt(big, 4<<20); return err }, 1, 0},
		{"write of 1 MiB", func() error { _, err := h.WriteAt(big, 4<<20); return err }, 0, 1},
		{"inline read of 1 MiB", func() error { return h.TryReadAt(big, 4<<20) }, 1, 0},
		{"inline write of 1 MiB", func() error { return h.TryWriteAt(big, 4<<20) }, 0, 1},
		{"read of a hole", func() error { _, err := h.ReadAt(big, 16<<20); return err }, 0, 0},
		{"first write of 4 KiB", func() error { _, err := h.WriteAt(small, 20<<20+8192); return err }, 0, 1},
		{"first write of 1 MiB", func() error { _, err := h.WriteAt(big, 24<<20); return err }, 0, 1},
		{"write of 4 KiB into a shared block", func() error { _, err := hs[0].WriteAt(small, 2<<20); return err }, 1, 1},
		{"write of 4 KiB into a shared block, in the middle", func() error { _, err := hs[0].WriteAt(small, 3<<20+8192); return err }, 1, 1},
		{"write over a shared block", func() error { _, err := hs[0].WriteAt(big[:block], 4<<20); return err }, 0, 1},
		{"write over 16 shared blocks", func() error { _, err := hs[0].WriteAt(big, 5<<20); return err }, 0, 1},
	}
	must(t, p.CreateSnap(ctx, 100, 0))
	for _, s := range steps {
		var err error
		r, w := calls(t, func() { err = s.do() })
		must(t, err)
		if r != s.reads || w != s.writes {
			t.Errorf("%s: %d reads and %d writes, want %d and %d", s.what, r, w, s.reads, s.writes)
		}
	}
}

// TestIdleDeviceMemory: a thousand open devices that nobody uses, of 1 TiB each.
func TestIdleDeviceMemory(t *testing.T) {
	const devices = 1000
	tp := newPool(t, poolSize{metaBlocks: 4096}, still)
	for id := range devices {
		tp.create(thin.DevID(id))
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	before := heap()
	for id := range devices {
		tp.thin(thin.DevID(id), 1<<40)
	}
	each := (heap() - before) / devices
	t.Logf("%d bytes for each", each)
	if each > 8<<10 {
		t.Errorf("an idle device costs %d bytes, want 8 KiB at most", each)
	}
}
