package txn

import (
	"errors"
	"testing"

	"mica/dev"
	"mica/pdata/block"
)

// counts is the plainest space map.
type counts struct {
	n    map[block.Loc]uint32
	next block.Loc
}

func (c *counts) Alloc() (block.Loc, error) {
	c.next++
	c.n[c.next] = 1
	return c.next, nil
}
func (c *counts) Inc(b block.Loc) error           { c.n[b]++; return nil }
func (c *counts) Dec(b block.Loc) (uint32, error) { c.n[b]--; return c.n[b], nil }
func (c *counts) Count(b block.Loc) uint32        { return c.n[b] }

func newTest(d dev.Device) (*Manager, *counts) {
	m := New(d, block.NewCache(d, 1<<20))
	c := &counts{n: map[block.Loc]uint32{}}
	m.SetSpaceMap(c)
	return m, c
}

func TestShadow(t *testing.T) {
	d := dev.NewMem(100 * block.Size)
	m, c := newTest(d)
	loc, buf, err := m.Alloc(block.Node)
	if err != nil {
		t.Fatal(err)
	}
	buf[100] = 1
	// New in this transaction and not shared: changed in place.
	if n, b, shared, err := m.Shadow(loc, block.Node); err != nil || n != loc || shared || &b[0] != &buf[0] {
		t.Fatalf("shadow of a new block: %d %v %v, want itself", n, shared, err)
	}
	// New but shared: copied.
	c.n[loc] = 2
	n, b, shared, err := m.Shadow(loc, block.Node)
	if err != nil || n == loc || !shared || b[100] != 1 || c.n[loc] != 1 || c.n[n] != 1 {
		t.Fatalf("shadow of a shared block: %d %v %v, counts %v", n, shared, err, c.n)
	}
	b[100] = 2
	if err := m.Close().Write(); err != nil {
		t.Fatal(err)
	}
	if len(m.dirty) != 0 {
		t.Errorf("%d dirty blocks after Close", len(m.dirty))
	}
	// Committed: copied, the old one stays as it is.
	s, b, shared, err := m.Shadow(n, block.Node)
	if err != nil || s == n || shared || b[100] != 2 || c.n[n] != 0 {
		t.Fatalf("shadow of a committed block: %d %v %v, counts %v", s, shared, err, c.n)
	}
	b[100] = 3
	got, err := m.Read(n, block.Node)
	if err != nil || got[100] != 2 {
		t.Errorf("committed block reads %d %v, want 2", got[100], err)
	}
	if _, err := m.Read(s, block.Bitmap); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("dirty block read as another kind: %v, want ErrCorrupt", err)
	}
	if _, _, _, err := m.Shadow(s, block.Bitmap); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("dirty block shadowed as another kind: %v, want ErrCorrupt", err)
	}
	// A block that loses its last reference is not written.
	if err := m.Dec(s); err != nil || m.dirty[s] != nil {
		t.Errorf("dropped block: %v, dirty %v", err, m.dirty[s] != nil)
	}
}

// TestReadersSeeClosedBlocks: between Close and Write the blocks are not on the medium, but
// readers find them, and changes of the next transaction do not reach them.
func TestReadersSeeClosedBlocks(t *testing.T) {
	d := dev.NewMem(1000 * block.Size)
	m, _ := newTest(d)
	var locs []block.Loc
	for i := range 300 {
		loc, buf, err := m.Alloc(block.Node)
		if err != nil {
			t.Fatal(err)
		}
		buf[100] = byte(i)
		locs = append(locs, loc)
	}
	c := m.Close()
	if len(c.blocks) != 300 {
		t.Errorf("%d blocks closed, want 300", len(c.blocks))
	}
	for i, loc := range locs {
		if b, err := m.Read(loc, block.Node); err != nil || b[100] != byte(i) {
			t.Fatalf("closed block %d: %d %v", loc, b[100], err)
		}
	}
	if _, b, _, err := m.Shadow(locs[7], block.Node); err != nil {
		t.Fatal(err)
	} else {
		b[100] = 99
	}
	if err := c.Write(); err != nil {
		t.Fatal(err)
	}
	for i, loc := range locs {
		b := make([]byte, block.Size)
		if err := block.ReadInto(d, b, loc, block.Node); err != nil || b[100] != byte(i) {
			t.Fatalf("block %d on the medium: %d %v, want %d", loc, b[100], err, byte(i))
		}
	}
}

func TestWriteErrors(t *testing.T) {
	f := dev.NewFault(dev.NewMem(100 * block.Size))
	m, _ := newTest(f)
	for _, op := range []dev.Op{dev.OpWrite, dev.OpFlush} {
		if _, _, err := m.Alloc(block.Node); err != nil {
			t.Fatal(err)
		}
		f.Add(dev.Rule{Ops: op})
		if err := m.Close().Write(); !errors.Is(err, dev.ErrInjected) {
			t.Errorf("%v fails: %v, want the device's error", op, err)
		}
		f.Clear()
	}
}
