package btree

import (
	"encoding/binary"

	"mica/pdata/block"
)

func putLoc(b []byte, l block.Loc) { binary.LittleEndian.PutUint64(b, uint64(l)) }

// Remove drops one entry; removed is false if the key was not there.
func (t *Tree) Remove(root block.Loc, key uint64) (newRoot block.Loc, removed bool, err error) {
	if _, ok, err := t.Lookup(root, key); err != nil || !ok {
		return root, false, err
	}
	root, n, err := t.removeRun(root, key, key+1, 1)
	return root, n > 0, err
}

// RemoveRange drops the entries with keys in [begin, end), at most limit of them (0: all). It
// returns how many went and, if it stopped at the limit, where to go on (done is then false).
func (t *Tree) RemoveRange(root block.Loc, begin, end uint64, limit int) (newRoot block.Loc, removed int, next uint64, done bool, err error) {
	for {
		key, found := uint64(0), false
		if err := t.Walk(root, begin, func(k uint64, _ []byte) bool { key, found = k, true; return false }); err != nil {
			return 0, removed, begin, false, err
		}
		if !found || key >= end {
			return root, removed, end, true, nil
		}
		if limit > 0 && removed >= limit {
			return root, removed, key, false, nil
		}
		most := MaxEntries(4) // more than any leaf holds
		if limit > 0 {
			most = min(most, limit-removed)
		}
		var n int
		if root, n, err = t.removeRun(root, key, end, most); err != nil {
			return 0, removed, key, false, err
		}
		removed += n
		begin = key
	}
}

// removeRun drops entries from key, which exists, up to end within one leaf, at most limit.
func (t *Tree) removeRun(root block.Loc, key, end uint64, limit int) (block.Loc, int, error) {
	nl, n, removed, err := t.removeAt(root, key, end, limit, 0)
	if err != nil {
		return 0, 0, err
	}
	nl, _, err = t.collapse(nl, n)
	return nl, removed, err
}

func (t *Tree) removeAt(loc block.Loc, key, end uint64, limit, depth int) (block.Loc, node, int, error) {
	if depth > MaxDepth {
		return 0, nil, 0, block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	nl, n, err := t.shadow(loc)
	if err != nil {
		return 0, nil, 0, err
	}
	if n.leaf() {
		i, _ := n.search(key)
		j := i
		for j < n.len() && j-i < limit && n.key(j) < end {
			if err := t.decValue(n.value(j)); err != nil {
				return 0, nil, 0, err
			}
			j++
		}
		n.remove(i, j)
		return nl, n, j - i, nil
	}
	i := max(n.childFor(key), 0)
	cl, c, removed, err := t.removeAt(n.child(i), key, end, limit, depth+1)
	if err != nil {
		return 0, nil, 0, err
	}
	n.setChild(i, cl)
	if c.len() < c.min() && n.len() > 1 {
		if err := t.refill(n, i); err != nil {
			return 0, nil, 0, err
		}
	}
	return nl, n, removed, nil
}

// refill brings child i of n, which has too few entries, together with a neighbour: one node if
// all fits, else two with half each.
func (t *Tree) refill(n node, i int) error {
	if i == n.len()-1 {
		i--
	}
	ll, left, err := t.shadow(n.child(i))
	if err != nil {
		return err
	}
	n.setChild(i, ll)
	rl, right, err := t.shadow(n.child(i + 1))
	if err != nil {
		return err
	}
	n.setChild(i+1, rl)
	a, b := left.len(), right.len()
	if a+b <= left.max() {
		left.appendFrom(right, 0, b)
		n.remove(i+1, i+2)
		return t.tm.Dec(rl) // its values have moved, their counts stay
	}
	want := (a + b) / 2
	if a < want {
		left.appendFrom(right, 0, want-a)
		right.remove(0, want-a)
	} else {
		right.prependFrom(left, want, a)
		left.truncate(want)
	}
	n.setKey(i+1, right.key(0))
	return nil
}
