package spacemap

import (
	"encoding/binary"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/txn"
)

// The overflow tree holds the exact counts, u32, of exactly the blocks whose count is 3 or
// more. Source: format description, section 4.1.

const overflowSize = 4

func overflowTree(tm *txn.Manager) *btree.Tree {
	return btree.New(tm, btree.ValueType{Size: overflowSize})
}

// writeOverflow brings the overflow tree up to date with the counts.
func (c *Counts) writeOverflow(t *btree.Tree, root block.Loc) (block.Loc, error) {
	var v [overflowSize]byte
	for _, b := range sortedKeys(c.dirtyOverflow) {
		delete(c.dirtyOverflow, b)
		var err error
		if n := c.Count(b); n >= 3 {
			binary.LittleEndian.PutUint32(v[:], n)
			root, _, err = t.Insert(root, b, v[:])
		} else {
			root, _, err = t.Remove(root, b)
		}
		if err != nil {
			return 0, err
		}
	}
	return root, nil
}

// loadOverflow loads the counts of the blocks that the bitmaps name, ascending.
func (c *Counts) loadOverflow(r btree.Reader, root block.Loc, want []uint64) error {
	i := 0
	var bad error
	err := r.Walk(root, 0, func(b uint64, v []byte) bool {
		n := binary.LittleEndian.Uint32(v)
		if i >= len(want) || want[i] != b {
			bad = c.corrupt(b, "has an overflow entry, its bitmap says otherwise")
			return false
		}
		if n < 3 {
			bad = c.corrupt(b, "overflow entry with a count below 3")
			return false
		}
		c.load(b, n)
		i++
		return true
	})
	if err != nil {
		return err
	}
	if bad == nil && i < len(want) {
		bad = c.corrupt(want[i], "has no overflow entry, its bitmap wants one")
	}
	return bad
}

// overflowCost bounds the new nodes of the overflow tree if the counts of raised more blocks go
// up and of lowered more go down, by any steps.
func (c *Counts) overflowCost(raised, lowered uint64) uint64 {
	open := uint64(len(c.dirtyOverflow)) // may be in the tree, may get in
	entries := min(c.overflowed+open+raised, c.Len())
	touched := min(raised+lowered+open, c.Len())
	return btree.MaxNew(entries, touched, overflowSize)
}
