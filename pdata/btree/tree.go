package btree

import (
	"fmt"

	"mica/pdata/block"
	"mica/pdata/txn"
)

// A ValueType describes the values in the leaves of a tree.
type ValueType struct {
	Size int // bytes
	// Inc and Dec count what a value refers to; nil where it refers to nothing. Inc is called
	// when a shared leaf is copied, Dec when a value is removed or overwritten.
	Inc func(v []byte) error
	Dec func(v []byte) error
	// Equal reports whether two values refer to the same thing; overwriting one with the other
	// then changes no count. nil: never.
	Equal func(a, b []byte) bool
}

// A Tree is the way to change and read trees with one type of value. It holds no root: roots
// go in and come out. It has no lock: changes need the exclusive lock of the transaction's
// owner. When a change fails, the transaction is in an undefined state and must be given up.
type Tree struct {
	tm *txn.Manager
	vt ValueType
	r  Reader
}

// New makes a tree over a transaction manager.
func New(tm *txn.Manager, vt ValueType) *Tree {
	return &Tree{tm: tm, vt: vt, r: Reader{Blocks: tm, ValueSize: vt.Size}}
}

// Empty allocates an empty tree.
func (t *Tree) Empty() (block.Loc, error) {
	loc, buf, err := t.tm.Alloc(block.Node)
	if err != nil {
		return 0, err
	}
	newNode(buf, true, t.vt.Size)
	return loc, nil
}

// Lookup returns the value of a key; it must not be changed and is valid until the next change.
func (t *Tree) Lookup(root block.Loc, key uint64) ([]byte, bool, error) { return t.r.Lookup(root, key) }

// Walk calls fn for every entry from begin on, in order, until fn returns false.
func (t *Tree) Walk(root block.Loc, begin uint64, fn func(key uint64, v []byte) bool) error {
	return t.r.Walk(root, begin, fn)
}

// Last returns the highest key.
func (t *Tree) Last(root block.Loc) (uint64, bool, error) { return t.r.Last(root) }

// shadow returns a copy of the node at loc that may be changed.
func (t *Tree) shadow(loc block.Loc) (block.Loc, node, error) {
	nl, buf, shared, err := t.tm.Shadow(loc, block.Node)
	if err != nil {
		return 0, nil, err
	}
	n := node(buf)
	if err := checkNode(n, loc, t.vt.Size); err != nil {
		return 0, nil, err
	}
	if shared {
		if err := t.incValues(n); err != nil {
			return 0, nil, fmt.Errorf("unshare b-tree node %d: %w", loc, err)
		}
	}
	return nl, n, nil
}

func (t *Tree) incValues(n node) error {
	for i, l := 0, n.len(); i < l; i++ {
		var err error
		if !n.leaf() {
			err = t.tm.Inc(n.child(i))
		} else if t.vt.Inc != nil {
			err = t.vt.Inc(n.value(i))
		} else {
			break
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *Tree) decValue(v []byte) error {
	if t.vt.Dec == nil {
		return nil
	}
	return t.vt.Dec(v)
}

// Touch shadows the path to key without changing anything, so that everything below a shared
// node on it is counted as shared.
func (t *Tree) Touch(root block.Loc, key uint64) (block.Loc, error) {
	nl, n, err := t.shadow(root)
	if err != nil {
		return 0, err
	}
	newRoot := nl
	for d := 0; !n.leaf(); d++ {
		if d > MaxDepth {
			return 0, block.Corruptf(nl, "b-tree deeper than %d", MaxDepth)
		}
		i := max(n.childFor(key), 0)
		cl, c, err := t.shadow(n.child(i))
		if err != nil {
			return 0, err
		}
		n.setChild(i, cl)
		nl, n = cl, c
	}
	return newRoot, nil
}
