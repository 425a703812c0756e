package btree

import (
	"mica/pdata/block"
)

// A Rewriter changes values of the leaves of trees that share nodes. Every leaf is changed once,
// and what is shared stays shared: the copy of a shared node takes its place in every tree.
//
// Between two steps trees may be in part rewritten; all are legal. Nodes that go are to be
// forgotten (Forget), whoever drops them.
type Rewriter struct {
	t      *Tree
	change func(v []byte)
	done   []uint64                // bit by node: it and everything below is as it must be
	moved  map[block.Loc]block.Loc // shared nodes -> their copies
	from   map[block.Loc]block.Loc // the inverse
}

// NewRewriter makes a rewriter for trees in the given number of blocks. change changes a value in
// place, or leaves it; it must not change what the value refers to.
func (t *Tree) NewRewriter(blocks uint64, change func(v []byte)) *Rewriter {
	return &Rewriter{t: t, change: change, done: make([]uint64, (blocks+63)/64),
		moved: map[block.Loc]block.Loc{}, from: map[block.Loc]block.Loc{}}
}

// Forget is told that a block was freed.
func (w *Rewriter) Forget(loc block.Loc) {
	if i := uint64(loc) / 64; i < uint64(len(w.done)) {
		w.done[i] &^= 1 << (loc % 64)
	}
	if n, ok := w.moved[loc]; ok {
		delete(w.moved, loc)
		delete(w.from, n)
	}
	if o, ok := w.from[loc]; ok {
		delete(w.from, loc)
		delete(w.moved, o)
	}
}

// move notes the copy of a shared node.
func (w *Rewriter) move(loc, n block.Loc) { w.moved[loc], w.from[n] = n, loc }

func (w *Rewriter) isDone(loc block.Loc) bool {
	i := uint64(loc) / 64
	return i < uint64(len(w.done)) && w.done[i]&(1<<(loc%64)) != 0
}

func (w *Rewriter) setDone(loc block.Loc) {
	for uint64(loc)/64 >= uint64(len(w.done)) { // the device has grown
		w.done = append(w.done, 0)
	}
	w.done[loc/64] |= 1 << (loc % 64)
}

// Step rewrites the tree at root from the leaf that key from belongs to, about budget leaves. It
// returns the new root, whose reference the caller has in place of the old one's, and where to go
// on, unless the tree is done.
func (w *Rewriter) Step(root block.Loc, from uint64, budget int) (newRoot block.Loc, next uint64, done bool, err error) {
	s := rewriteStep{w: w, from: from, budget: budget}
	newRoot, err = s.node(root, false, 0)
	return newRoot, s.next, !s.cut, err
}

type rewriteStep struct {
	w      *Rewriter
	from   uint64
	budget int
	cut    bool   // the budget was too small
	next   uint64 // if cut
}

// node rewrites what is at loc and below. With share the pointer to loc stays, and another one is
// to be made: to what is returned, whose reference it has, unless that is loc itself. Otherwise
// what is returned takes the place of loc with its reference.
func (s *rewriteStep) node(loc block.Loc, share bool, depth int) (block.Loc, error) {
	w, tm := s.w, s.w.t.tm
	if w.isDone(loc) {
		return loc, nil
	}
	if depth > MaxDepth {
		return 0, block.Corruptf(loc, "b-tree deeper than %d", MaxDepth)
	}
	if m, ok := w.moved[loc]; ok {
		return s.again(loc, m, share, depth)
	}
	n, err := w.t.r.node(loc)
	if err != nil {
		return 0, err
	}
	shared := share || tm.Count(loc) > 1
	var nl block.Loc
	if n.leaf() {
		nl, err = s.leaf(loc, n, shared)
	} else {
		nl, err = s.internal(loc, n, shared, depth)
	}
	if err != nil || nl == loc || !shared {
		return nl, err
	}
	w.move(loc, nl)
	if !share {
		err = tm.Dec(loc)
	}
	return nl, err
}

// again puts the copy of a shared node in place of the node.
func (s *rewriteStep) again(loc, copied block.Loc, share bool, depth int) (block.Loc, error) {
	if err := s.w.t.tm.Inc(copied); err != nil {
		return 0, err
	}
	if !share {
		if err := s.w.t.Release(loc); err != nil {
			return 0, err
		}
	}
	return s.node(copied, false, depth)
}

// leaf rewrites a leaf. A shared one is copied.
func (s *rewriteStep) leaf(loc block.Loc, n node, shared bool) (block.Loc, error) {
	w, t := s.w, s.w.t
	s.budget--
	buf := append([]byte(nil), n...)
	same := true
	for i, l := 0, n.len(); i < l; i++ {
		v := node(buf).value(i)
		w.change(v)
		same = same && string(v) == string(n.value(i))
	}
	if same {
		w.setDone(loc)
		return loc, nil
	}
	if shared {
		nl, nb, err := t.tm.Alloc(block.Node)
		if err != nil {
			return 0, err
		}
		copy(nb, buf)
		w.setDone(nl)
		return nl, t.incValues(nb)
	}
	nl, m, err := t.shadow(loc)
	if err != nil {
		return 0, err
	}
	copy(m[headerSize:], buf[headerSize:])
	w.setDone(nl)
	return nl, nil
}

// internal rewrites the children of a node, and the node if one of them has moved.
func (s *rewriteStep) internal(loc block.Loc, n node, shared bool, depth int) (block.Loc, error) {
	w, t := s.w, s.w.t
	l := n.len()
	at := make([]block.Loc, l)
	for i := range at {
		at[i] = n.child(i)
	}
	same, all := true, true
	for i := max(n.childFor(s.from), 0); i < l; i++ {
		if s.budget <= 0 {
			if !s.cut {
				s.cut, s.next = true, n.key(i)
			}
			break
		}
		nc, err := s.node(at[i], shared, depth+1)
		if err != nil {
			return 0, err
		}
		same = same && nc == at[i]
		at[i] = nc
		if s.cut {
			break
		}
		s.from = 0
	}
	for _, c := range at {
		all = all && w.isDone(c)
	}
	if same {
		if all {
			w.setDone(loc)
		}
		return loc, nil
	}
	var nl block.Loc
	var m node
	var err error
	first, copied := w.from[loc]
	if shared {
		var buf []byte
		if nl, buf, err = t.tm.Alloc(block.Node); err != nil {
			return 0, err
		}
		copy(buf, n)
		m = node(buf)
		for i, c := range at {
			if c == n.child(i) {
				if err := t.tm.Inc(c); err != nil {
					return 0, err
				}
			}
		}
	} else if nl, m, err = t.shadow(loc); err != nil {
		return 0, err
	} else if copied && nl != loc {
		w.move(first, nl)
	}
	for i, c := range at {
		m.setChild(i, c)
	}
	if all {
		w.setDone(nl)
	}
	return nl, nil
}
