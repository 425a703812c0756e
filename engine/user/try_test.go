package user

import (
	"errors"
	"testing"

	"mica/dev"
	"mica/engine"
)

func TestTry(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	p := make([]byte, 4096)
	wouldBlock := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, dev.ErrWouldBlock) {
			t.Errorf("%s: %v, want ErrWouldBlock", what, err)
		}
	}
	wouldBlock("read before the table is filled", h.TryReadAt(p, 0))
	read(t, h, 1, 0)
	copy(p, "junk")
	must(t, h.TryReadAt(p, 0))
	if p[0] != 0 {
		t.Error("an unmapped block does not read as zeros")
	}
	d, m := tp.counting(func() { wouldBlock("write to an unmapped block", h.TryWriteAt(p, 0)) })
	if d != (dev.OpCounts{}) || m != (dev.OpCounts{}) {
		t.Errorf("a write that would block cost %+v, %+v", d, m)
	}
	write(t, h, fill(1, 128<<10), 0)
	must(t, h.TryWriteAt(fill(2, 4096), 62<<10))
	wantBytes(t, h, 2, 4096, 62<<10)
	d, _ = tp.counting(func() { wouldBlock("write that ends in an unmapped block", h.TryWriteAt(fill(3, 8192), 124<<10)) })
	if d.Writes != 0 {
		t.Error("a write that would block wrote something")
	}
	tp.snap(2, 1)
	wouldBlock("write to a shared block", h.TryWriteAt(p, 0))
	must(t, h.TryReadAt(p, 0))
	wouldBlock("read past the end", h.TryReadAt(p, 1<<20-1))
	wouldBlock("write past the end", h.TryWriteAt(p, 1<<20-1))

	h.d.w.shutGate()
	wouldBlock("write at a closed gate", h.TryWriteAt(p, 0))
	must(t, h.TryReadAt(p, 0)) // reads are never stopped
	h.d.w.openGate()

	o := tp.thinWith(2, engine.OpenOptions{SizeBytes: 1 << 20, ExternalOrigin: dev.NewMem(1 << 20), ReadOnly: true})
	read(t, o, 1, 0)
	wouldBlock("read of the external origin", o.TryReadAt(p, 512<<10))
	wouldBlock("write to a read-only handle", o.TryWriteAt(p, 0))
	h.Close()
	wouldBlock("read of a closed device", h.TryReadAt(p, 0))
	wouldBlock("write to a closed device", h.TryWriteAt(p, 0))
}

// TestTryFlush: what has no new mappings is flushed with one sync of the data, and nothing else; what
// has some would have to commit.
func TestTryFlush(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	tp.create(2)
	h, other := tp.thin(1, 1<<20), tp.thin(2, 1<<20)
	must(t, h.Flush())
	write(t, h, fill(1, 8192), 0)
	try := func(what string, h *Thin, would bool, syncs int64) {
		t.Helper()
		var err error
		d, m := tp.counting(func() { err = h.TryFlush() })
		if would != errors.Is(err, dev.ErrWouldBlock) || !would && err != nil {
			t.Errorf("%s: %v, want ErrWouldBlock %v", what, err, would)
		}
		if int64(d.Flushes) != syncs || m != (dev.OpCounts{}) {
			t.Errorf("%s: data %+v, metadata %+v, want %d syncs", what, d, m, syncs)
		}
	}
	try("new mappings", h, true, 0)
	must(t, h.Flush())
	try("nothing written", h, false, 0)
	write(t, h, fill(2, 4096), 0)
	write(t, other, fill(3, 4096), 0)
	try("overwritten, beside another device's new mappings", h, false, 1)
	try("the other one", other, true, 0)
	if n := testing.AllocsPerRun(100, func() {
		must(t, h.TryWriteAt(zeroBuf[:4096], 0))
		must(t, h.TryFlush())
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	h.Close()
	try("closed", h, true, 0)
}

// TestTryFlushFails: a sync that fails is final here, too.
func TestTryFlushFails(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.dirty = true
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 8192), 0)
	must(t, h.Flush())
	write(t, h, fill(2, 8192), 0)
	tp.data.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Err: errIO})
	if err := h.TryFlush(); !errors.Is(err, engine.ErrFailed) || !errors.Is(err, errIO) {
		t.Fatalf("flush: %v, want ErrFailed and the cause", err)
	}
	if err := h.TryFlush(); !errors.Is(err, dev.ErrWouldBlock) {
		t.Errorf("again: %v, want that Flush says it", err)
	}
	if err := h.Flush(); !errors.Is(err, engine.ErrFailed) {
		t.Errorf("flush of the failed pool: %v", err)
	}
	if _, err := h.WriteAt([]byte{1}, 0); !errors.Is(err, engine.ErrFailed) {
		t.Errorf("write: %v", err)
	}
}

// TestNoAllocations: mapped reads and writes, and reads of holes, make no garbage.
func TestNoAllocations(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 4<<20)
	write(t, h, fill(1, 1<<20), 0)
	p := make([]byte, 200<<10)
	for _, c := range []struct {
		name string
		do   func()
	}{
		{"TryReadAt", func() { h.TryReadAt(p[:4096], 8192) }},
		{"TryReadAt, several blocks", func() { h.TryReadAt(p, 8192) }},
		{"TryReadAt, hole", func() { h.TryReadAt(p[:4096], 2<<20) }},
		{"TryWriteAt", func() { h.TryWriteAt(p[:4096], 8192) }},
		{"TryWriteAt, several blocks", func() { h.TryWriteAt(p, 8192) }},
		{"ReadAt", func() { h.ReadAt(p[:4096], 8192) }},
		{"WriteAt", func() { h.WriteAt(p[:4096], 8192) }},
	} {
		if n := testing.AllocsPerRun(200, c.do); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
	if err := h.TryWriteAt(p, 8192); err != nil {
		t.Errorf("what was measured fails: %v", err)
	}
}
