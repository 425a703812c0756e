package user

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"

	"mica/engine"

	"golang.org/x/sys/unix"
)

// filePool is a pool on files, whose data can be read by their descriptor.
func filePool(t *testing.T) *Pool {
	t.Helper()
	l := Location{Dir: filepath.Join(shm(t), "pool")}
	must(t, Format(ctx, l, FormatOptions{DataBytes: 64 << 20}))
	p, err := Open(ctx, l, Options{CommitInterval: time.Hour, JournalDirs: []string{shm(t)}, Logger: quiet})
	must(t, err)
	return p
}

// TestPlaceRead: what is mapped in one piece is found on the medium, the rest is not.
func TestPlaceRead(t *testing.T) {
	p := filePool(t)
	defer func() { must(t, p.Close()) }()
	must(t, p.CreateThin(ctx, 1))
	e, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 4 << 20})
	must(t, err)
	h := e.(*Thin)
	defer h.Close()
	read(t, h, 1, 0)
	write(t, h, fill(3, 64<<10), 192<<10) // first, so that the others do not join it
	write(t, h, fill(1, 128<<10), 0)
	for _, c := range []struct {
		what   string
		off, n int64
		seed   uint64 // 0: not found
	}{
		{"a part of a block", 4096, 8192, 1},
		{"two blocks in one piece", 32 << 10, 64 << 10, 1},
		{"another block", 200 << 10, 4096, 3},
		{"a hole", 1 << 20, 4096, 0},
		{"the end of what is mapped", 124 << 10, 8192, 0},
		{"beyond the end", 4<<20 - 4096, 8192, 0},
		{"nothing", 0, 0, 0},
	} {
		place, ok := h.PlaceRead(c.off, c.n)
		if ok != (c.seed != 0) {
			t.Errorf("%s: %v", c.what, ok)
		}
		if !ok {
			continue
		}
		got, want := make([]byte, c.n), make([]byte, c.n)
		if _, err := unix.Pread(place.FD, got, place.Off); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		place.Release()
		if _, err := h.ReadAt(want, c.off); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes than a read of the device has (%v)", c.what, err)
		}
	}
	if n := testing.AllocsPerRun(100, func() {
		place, ok := h.PlaceRead(4096, 4096)
		if !ok {
			t.Fatal("not found")
		}
		place.Release()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if a, b := h.d.r.n[0].Load(), h.d.r.n[1].Load(); a != 0 || b != 0 {
		t.Errorf("%d and %d reads are still counted", a, b)
	}
}

// TestPlaceIsPinned: a handle is not closed, and a block that was discarded is not handed out again,
// before its place is released.
func TestPlaceIsPinned(t *testing.T) {
	p := filePool(t)
	defer func() { must(t, p.Close()) }()
	must(t, p.CreateThin(ctx, 1))
	e, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 4 << 20})
	must(t, err)
	h := e.(*Thin)
	write(t, h, fill(1, 64<<10), 0)
	must(t, h.Flush())
	place, ok := h.PlaceRead(0, 4096)
	if !ok {
		t.Fatal("not found")
	}
	must(t, h.Discard(0, 64<<10))
	must(t, h.Flush())
	want, got := fill(1, 4096), make([]byte, 4096)
	time.Sleep(20 * time.Millisecond) // for what should not happen
	if _, err := unix.Pread(place.FD, got, place.Off); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a block was given away under a read of it (%v)", err)
	}
	closed := make(chan struct{})
	go func() { h.Close(); close(closed) }()
	select {
	case <-closed:
		t.Error("a handle closes under a read")
	case <-time.After(20 * time.Millisecond):
	}
	if _, ok := h.PlaceRead(0, 4096); ok {
		t.Error("a handle that closes still tells places")
	}
	place.Release()
	<-closed
}
