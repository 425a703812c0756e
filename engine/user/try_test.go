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
