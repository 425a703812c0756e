package repair

import (
	"encoding/binary"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// A Range is a range of virtual blocks, or of device ids: Begin to End, exclusive. An End of 0 is
// no end.
type Range struct {
	Begin uint64 `json:"begin"`
	End   uint64 `json:"end,omitempty"`
}

func (r Range) has(k uint64) bool { return k >= r.Begin && (r.End == 0 || k < r.End) }

// A gap is a range of keys of a tree that could not be read.
type gap struct {
	Range
	why string
}

// walkTree calls fn for every entry of a tree that can be read, ascending, and returns the gaps.
func walkTree(b btree.Blocks, root block.Loc, size int, fn func(key uint64, v []byte)) []gap {
	var gaps []gap
	var visit func(loc block.Loc, in Range, depth int)
	visit = func(loc block.Loc, in Range, depth int) {
		n, err := readNode(b, loc, size)
		switch {
		case err == nil && depth > btree.MaxDepth:
			err = block.Corruptf(loc, "b-tree deeper than %d", btree.MaxDepth)
		case err == nil && n.Len() > 0 && (!in.has(n.Key(0)) || !in.has(n.Key(n.Len()-1))):
			err = block.Corruptf(loc, "keys %d to %d are not what the parent admits", n.Key(0), n.Key(n.Len()-1))
		}
		if err != nil {
			gaps = append(gaps, gap{in, err.Error()})
			return
		}
		for i := range n.Len() {
			if n.Leaf() {
				fn(n.Key(i), n.Value(i))
			} else {
				visit(n.Child(i), childRange(n, i, in), depth+1)
			}
		}
	}
	visit(root, Range{}, 0)
	return gaps
}

// childRange is what entry i of a node that covers in admits.
func childRange(n btree.Node, i int, in Range) Range {
	r := Range{n.Key(i), in.End}
	if i+1 < n.Len() {
		r.End = n.Key(i + 1)
	}
	return r
}

// A deviceTree is what the device tree says: the roots of mapping trees.
type deviceTree struct {
	roots map[thin.DevID]block.Loc
	gaps  []gap
}

func readDeviceTree(b btree.Blocks, root block.Loc) deviceTree {
	t := deviceTree{roots: map[thin.DevID]block.Loc{}}
	t.gaps = walkTree(b, root, 8, func(k uint64, v []byte) {
		if k <= uint64(thin.MaxDevID) {
			t.roots[thin.DevID(k)] = block.Loc(binary.LittleEndian.Uint64(v))
		}
	})
	return t
}

// A detailsTree is what the details tree says.
type detailsTree struct {
	details map[thin.DevID]thin.Details
	gaps    []gap
}

func readDetailsTree(b btree.Blocks, root block.Loc) detailsTree {
	t := detailsTree{details: map[thin.DevID]thin.Details{}}
	t.gaps = walkTree(b, root, thin.DetailsSize, func(k uint64, v []byte) {
		if k <= uint64(thin.MaxDevID) {
			t.details[thin.DevID(k)] = thin.DecodeDetails(v)
		}
	})
	return t
}

// empty reports whether nothing at all could be read of a tree.
func empty[V any](m map[thin.DevID]V, gaps []gap) bool { return len(m) == 0 && len(gaps) > 0 }
