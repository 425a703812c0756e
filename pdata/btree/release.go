package btree

import (
	"mica/pdata/block"
)

// Release drops the caller's reference on a whole tree: what nobody else refers to is freed.
func (t *Tree) Release(root block.Loc) error { return t.release(root, 0) }

func (t *Tree) release(loc block.Loc, depth int) error {
	if depth > MaxDepth {
		return block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	if t.tm.Count(loc) > 1 {
		return t.tm.Dec(loc)
	}
	n, err := t.r.node(loc)
	if err != nil {
		return err
	}
	for i, l := 0, n.len(); i < l; i++ {
		if n.leaf() {
			err = t.decValue(n.value(i))
		} else {
			err = t.release(n.child(i), depth+1)
		}
		if err != nil {
			return err
		}
	}
	return t.tm.Dec(loc)
}

// ReleaseStep drops a bounded part of a tree that nobody will change any more, from its end:
// all of it if at most budget of its nodes are its own, else at most budget leaves. It returns
// the root that is left, a legal tree, and how many entries went; with done the tree is gone
// and entries is not counted. At most budget leaves of values lose a reference.
func (t *Tree) ReleaseStep(root block.Loc, budget int) (newRoot block.Loc, entries uint64, done bool, err error) {
	if t.tm.Count(root) > 1 {
		return 0, 0, true, t.tm.Dec(root)
	}
	h, err := t.r.height(root)
	if err != nil {
		return 0, 0, false, err
	}
	left := budget
	if err := t.own(root, h, &left); err != nil {
		return 0, 0, false, err
	}
	if left >= 0 || h == 1 {
		return 0, 0, true, t.release(root, 0)
	}
	nl, n, entries, err := t.dropTail(root, h, budget)
	if err != nil {
		return 0, 0, false, err
	}
	if n.len() == 0 {
		return 0, 0, true, t.tm.Dec(nl)
	}
	newRoot, _, err = t.collapse(nl, n)
	return newRoot, entries, false, err
}

// own takes the nodes below loc, itself included, that nobody else refers to off left, until
// that is negative. Leaves are not read.
func (t *Tree) own(loc block.Loc, height int, left *int) error {
	if *left--; *left < 0 || height <= 1 {
		return nil
	}
	n, err := t.r.node(loc)
	if err != nil {
		return err
	}
	for i, l := 0, n.len(); i < l && *left >= 0 && !n.leaf(); i++ {
		if t.tm.Count(n.child(i)) > 1 {
			continue
		}
		if err := t.own(n.child(i), height-1, left); err != nil {
			return err
		}
	}
	return nil
}

// dropTail drops leaves at the end of the tree at loc, of so many levels: at most budget, or
// one node just above the leaves that others share. The node that is returned may be empty.
func (t *Tree) dropTail(loc block.Loc, height, budget int) (block.Loc, node, uint64, error) {
	nl, n, err := t.shadow(loc)
	if err != nil {
		return 0, nil, 0, err
	}
	if n.leaf() || height < 2 {
		return 0, nil, 0, block.Corruptf(loc, "leaf above the depth of the leaves")
	}
	last, entries := n.len()-1, uint64(0)
	child := n.child(last)
	switch {
	case height == 2:
		from := max(n.len()-budget, 0)
		for i := from; i < n.len(); i++ {
			e, err := t.dropCounted(n.child(i))
			if err != nil {
				return 0, nil, 0, err
			}
			entries += e
		}
		n.truncate(from)
		return nl, n, entries, nil
	case height == 3 && t.tm.Count(child) > 1:
		if entries, err = t.dropCounted(child); err != nil {
			return 0, nil, 0, err
		}
		n.truncate(last)
		return nl, n, entries, nil
	}
	cl, c, entries, err := t.dropTail(child, height-1, budget)
	if err != nil {
		return 0, nil, 0, err
	}
	n.setChild(last, cl)
	switch {
	case c.len() == 0:
		n.truncate(last)
		err = t.tm.Dec(cl)
	case c.len() < c.min() && last > 0:
		err = t.refill(n, last)
	}
	return nl, n, entries, err
}

// dropCounted releases a subtree of at most two levels and returns how many entries it had.
func (t *Tree) dropCounted(loc block.Loc) (uint64, error) {
	entries, err := t.r.count(loc, MaxDepth-1, bounds{})
	if err != nil {
		return 0, err
	}
	return entries, t.release(loc, MaxDepth-1)
}

// collapse makes the only child of an internal root the root, as often as that is so.
func (t *Tree) collapse(loc block.Loc, n node) (block.Loc, node, error) {
	for !n.leaf() && n.len() == 1 {
		child := n.child(0)
		if err := t.tm.Dec(loc); err != nil {
			return 0, nil, err
		}
		loc = child
		var err error
		if n, err = t.r.node(child); err != nil {
			return 0, nil, err
		}
	}
	return loc, n, nil
}
