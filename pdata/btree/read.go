package btree

import (
	"mica/pdata/block"
)

// Blocks is where a Reader finds its nodes: a transaction manager or a block cache.
type Blocks interface {
	Read(loc block.Loc, k block.Kind) ([]byte, error)
}

// A Reader reads trees. Safe for concurrent use if its Blocks are.
type Reader struct {
	Blocks    Blocks
	ValueSize int // of the leaves, in bytes
}

func (r Reader) node(loc block.Loc) (node, error) {
	buf, err := r.Blocks.Read(loc, block.Node)
	if err != nil {
		return nil, err
	}
	n := node(buf)
	return n, checkNode(n, loc, r.ValueSize)
}

// Lookup returns the value of a key. It must not be changed.
func (r Reader) Lookup(root block.Loc, key uint64) ([]byte, bool, error) {
	loc := root
	for d := 0; d <= MaxDepth; d++ {
		n, err := r.node(loc)
		if err != nil {
			return nil, false, err
		}
		if n.leaf() {
			i, ok := n.search(key)
			if !ok {
				return nil, false, nil
			}
			return n.value(i), true, nil
		}
		i := n.childFor(key)
		if i < 0 {
			return nil, false, nil
		}
		loc = n.child(i)
	}
	return nil, false, block.Corruptf(root, "b-tree deeper than %d", MaxDepth)
}

// Walk calls fn for every entry with a key >= begin, ascending, until fn returns false. A tree
// whose keys do not ascend is corrupt; so a walk ends, whatever is on the medium.
func (r Reader) Walk(root block.Loc, begin uint64, fn func(key uint64, v []byte) bool) error {
	_, err := r.walk(root, begin, 0, bounds{}, fn)
	return err
}

// bounds are the keys that a parent admits below one of its entries: lo and above, below hi if
// limited. No two entries admit the same key.
type bounds struct {
	lo, hi  uint64
	limited bool
}

// below is what entry i of n admits.
func (in bounds) below(n node, i int) bounds {
	b := bounds{lo: n.key(i), hi: in.hi, limited: in.limited}
	if i+1 < n.len() {
		b.hi, b.limited = n.key(i+1), true
	}
	return b
}

// check returns an error unless the keys of n ascend within bounds.
func (in bounds) check(n node, loc block.Loc) error {
	l := n.len()
	if l == 0 {
		return nil
	}
	last := n.key(0)
	for i := 1; i < l; i++ {
		k := n.key(i)
		if k <= last {
			return block.Corruptf(loc, "key %d follows key %d", k, last)
		}
		last = k
	}
	if n.key(0) < in.lo || in.limited && last >= in.hi {
		return block.Corruptf(loc, "keys %d to %d are not what the parent admits", n.key(0), last)
	}
	return nil
}

func (r Reader) walk(loc block.Loc, begin uint64, depth int, in bounds, fn func(uint64, []byte) bool) (bool, error) {
	if depth > MaxDepth {
		return false, block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	n, err := r.node(loc)
	if err != nil {
		return false, err
	}
	if err := in.check(n, loc); err != nil {
		return false, err
	}
	if n.leaf() {
		i, _ := n.search(begin)
		for l := n.len(); i < l; i++ {
			if !fn(n.key(i), n.value(i)) {
				return false, nil
			}
		}
		return true, nil
	}
	for i, l := max(n.childFor(begin), 0), n.len(); i < l; i++ {
		if more, err := r.walk(n.child(i), begin, depth+1, in.below(n, i), fn); err != nil || !more {
			return false, err
		}
	}
	return true, nil
}

// Last returns the highest key of a tree.
func (r Reader) Last(root block.Loc) (key uint64, ok bool, err error) {
	loc := root
	for d := 0; d <= MaxDepth; d++ {
		n, err := r.node(loc)
		if err != nil {
			return 0, false, err
		}
		if n.leaf() {
			if n.len() == 0 {
				return 0, false, nil
			}
			return n.key(n.len() - 1), true, nil
		}
		loc = n.child(n.len() - 1)
	}
	return 0, false, block.Corruptf(root, "b-tree deeper than %d", MaxDepth)
}

// count returns the number of entries of a tree, reading every node once.
func (r Reader) count(loc block.Loc, depth int, in bounds) (uint64, error) {
	if depth > MaxDepth {
		return 0, block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	n, err := r.node(loc)
	if err != nil {
		return 0, err
	}
	if err := in.check(n, loc); err != nil {
		return 0, err
	}
	if n.leaf() {
		return uint64(n.len()), nil
	}
	total := uint64(0)
	for i := 0; i < n.len(); i++ {
		c, err := r.count(n.child(i), depth+1, in.below(n, i))
		if err != nil {
			return 0, err
		}
		total += c
	}
	return total, nil
}

// height is the number of levels of a tree.
func (r Reader) height(root block.Loc) (int, error) {
	loc := root
	for d := 1; d <= MaxDepth+1; d++ {
		n, err := r.node(loc)
		if err != nil {
			return 0, err
		}
		if n.leaf() {
			return d, nil
		}
		loc = n.child(0)
	}
	return 0, block.Corruptf(root, "b-tree deeper than %d", MaxDepth)
}
