package btree

import (
	"math"

	"mica/pdata/block"
)

// A split is the new right-hand neighbour of a node that was full.
type split struct {
	key uint64
	loc block.Loc
}

// A cursor remembers the leaf of the last insert, so that a sorted batch descends once a leaf.
type cursor struct {
	leaf  node   // nil: unknown
	bound uint64 // the leaf takes keys below this
	last  bool   // the leaf is the last of the tree
}

// Insert stores one entry; inserted is false if the key was there and its value was replaced.
// The reference of the new value belongs to the caller before and to the tree after; the one
// of a replaced value is dropped.
func (t *Tree) Insert(root block.Loc, key uint64, v []byte) (newRoot block.Loc, inserted bool, err error) {
	var c cursor
	return t.insert(root, key, v, &c)
}

// InsertSorted stores entries with ascending keys; value(i) is read once and not kept. It
// returns how many keys were new.
func (t *Tree) InsertSorted(root block.Loc, keys []uint64, value func(i int) []byte) (newRoot block.Loc, inserted int, err error) {
	var c cursor
	for i, k := range keys {
		v := value(i)
		if c.leaf != nil && k < c.bound {
			j, found := c.leaf.search(k)
			if found {
				if err := t.overwrite(c.leaf, j, v); err != nil {
					return 0, 0, err
				}
				continue
			}
			if c.leaf.len() < c.leaf.max() {
				c.leaf.insert(j, k, v)
				inserted++
				continue
			}
		}
		isNew := false
		if root, isNew, err = t.insert(root, k, v, &c); err != nil {
			return 0, 0, err
		}
		if isNew {
			inserted++
		}
	}
	return root, inserted, nil
}

func (t *Tree) overwrite(n node, i int, v []byte) error {
	old := n.value(i)
	if t.vt.Equal == nil || !t.vt.Equal(old, v) {
		if err := t.decValue(old); err != nil {
			return err
		}
	}
	copy(old, v)
	return nil
}

func (t *Tree) insert(root block.Loc, key uint64, v []byte, c *cursor) (block.Loc, bool, error) {
	*c = cursor{bound: math.MaxUint64, last: true}
	nl, sp, isNew, err := t.insertAt(root, key, v, 0, c)
	if err != nil {
		return 0, false, err
	}
	if sp != nil {
		c.leaf = nil
		rl, buf, err := t.tm.Alloc(block.Node)
		if err != nil {
			return 0, false, err
		}
		left, err := t.r.node(nl)
		if err != nil {
			return 0, false, err
		}
		n := newNode(buf, false, internalSize)
		n.setLen(2)
		n.setKey(0, left.key(0))
		n.setChild(0, nl)
		n.setKey(1, sp.key)
		n.setChild(1, sp.loc)
		nl = rl
	}
	return nl, isNew, nil
}

func (t *Tree) insertAt(loc block.Loc, key uint64, v []byte, depth int, c *cursor) (block.Loc, *split, bool, error) {
	if depth > MaxDepth {
		return 0, nil, false, block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	nl, n, err := t.shadow(loc)
	if err != nil {
		return 0, nil, false, err
	}
	if n.leaf() {
		i, found := n.search(key)
		if found {
			c.leaf = n
			return nl, nil, false, t.overwrite(n, i, v)
		}
		if n.len() < n.max() {
			n.insert(i, key, v)
			c.leaf = n
			return nl, nil, true, nil
		}
		c.leaf = nil
		sp, err := t.splitInsert(n, i, key, v, c.last)
		return nl, sp, true, err
	}
	i := n.childFor(key)
	if i < 0 {
		i = 0
		n.setKey(0, key)
	}
	if i+1 < n.len() {
		c.bound = min(c.bound, n.key(i+1))
		c.last = false
	}
	cl, csp, isNew, err := t.insertAt(n.child(i), key, v, depth+1, c)
	if err != nil {
		return 0, nil, false, err
	}
	n.setChild(i, cl)
	if csp == nil {
		return nl, nil, isNew, nil
	}
	var cv [internalSize]byte
	putLoc(cv[:], csp.loc)
	if n.len() < n.max() {
		n.insert(i+1, csp.key, cv[:])
		return nl, nil, isNew, nil
	}
	sp, err := t.splitInsert(n, i+1, csp.key, cv[:], c.last)
	return nl, sp, isNew, err
}

// splitInsert divides the full node n in two and puts the entry at i into one of them. At the
// right end of a tree that is filled in order the left node keeps all it can, so that it ends
// up two thirds full and not half.
func (t *Tree) splitInsert(n node, i int, key uint64, v []byte, last bool) (*split, error) {
	rl, buf, err := t.tm.Alloc(block.Node)
	if err != nil {
		return nil, err
	}
	l := n.len()
	at := l / 2
	if last && i == l {
		at = l - n.min()
	}
	r := newNode(buf, n.leaf(), n.size())
	r.appendFrom(n, at, l)
	n.truncate(at)
	if i <= at && i != l {
		n.insert(i, key, v)
	} else {
		r.insert(i-at, key, v)
	}
	return &split{r.key(0), rl}, nil
}
