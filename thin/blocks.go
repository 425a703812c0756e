package thin

import (
	"encoding/binary"
	"fmt"

	"mica/pdata/block"
	"mica/pdata/btree"
)

// EachMapping calls fn for every mapping of every device until fn returns false. What devices
// share through a common node comes once, with the first of them.
func (v *View) EachMapping(fn func(DevID, Entry) bool) error {
	devs, err := v.Devices()
	if err != nil {
		return err
	}
	n := uint64(v.d.Size() / block.Size)
	w := onceWalk{r: v.reader(8), seen: make([]bool, n), fn: fn}
	for _, d := range devs {
		root, err := v.root(d.ID)
		if err == nil {
			err = w.visit(d.ID, root, 0)
		}
		if err != nil {
			return fmt.Errorf("mappings of thin %d: %w", d.ID, err)
		}
	}
	return nil
}

type onceWalk struct {
	r    btree.Reader
	seen []bool // by metadata block
	fn   func(DevID, Entry) bool
	end  bool
}

func (w *onceWalk) visit(id DevID, loc block.Loc, depth int) error {
	if loc >= block.Loc(len(w.seen)) {
		return block.Corruptf(loc, "mapping node lies beyond the %d metadata blocks", len(w.seen))
	}
	if w.seen[loc] || w.end {
		return nil
	}
	w.seen[loc] = true
	if depth > btree.MaxDepth {
		return block.Corruptf(loc, "b-tree deeper than %d", btree.MaxDepth)
	}
	buf, err := w.r.Blocks.Read(loc, block.Node)
	if err != nil {
		return err
	}
	n, err := btree.ParseNode(buf, loc, w.r.ValueSize)
	if err != nil {
		return err
	}
	for i, l := 0, n.Len(); i < l && !w.end; i++ {
		if n.Leaf() {
			w.end = !w.fn(id, Entry{VBlock(n.Key(i)), UnpackMapping(binary.LittleEndian.Uint64(n.Value(i)))})
		} else if err := w.visit(id, n.Child(i), depth+1); err != nil {
			return err
		}
	}
	return nil
}

// Lookup returns where a virtual block lives.
func (v *View) Lookup(id DevID, vb VBlock) (Mapping, bool, error) {
	root, err := v.root(id)
	if err != nil {
		return Mapping{}, false, err
	}
	b, ok, err := v.reader(8).Lookup(root, uint64(vb))
	if err != nil || !ok {
		return Mapping{}, false, err
	}
	return UnpackMapping(binary.LittleEndian.Uint64(b)), true, nil
}
