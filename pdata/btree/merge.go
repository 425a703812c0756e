package btree

import (
	"mica/pdata/block"
)

// A mergeSide is the rest of one tree in a Merge: nodes that are not opened yet, and the entries
// of the leaf that is.
type mergeSide struct {
	r     Reader
	stack []pending // the next one last
	leaf  node      // nil: the next thing is a pending node, or nothing
	i     int       // next entry of leaf
}

// A pending is a subtree that is not opened yet.
type pending struct {
	loc    block.Loc
	height int // levels below this one, by the height of the tree
	in     bounds
}

func newMergeSide(r Reader, root block.Loc) (*mergeSide, error) {
	h, err := r.height(root)
	if err != nil {
		return nil, err
	}
	return &mergeSide{r: r, stack: []pending{{loc: root, height: h - 1}}}, nil
}

// node returns the subtree that comes next, or nil if an entry or nothing does.
func (s *mergeSide) node() *pending {
	if s.leaf == nil && len(s.stack) > 0 {
		return &s.stack[len(s.stack)-1]
	}
	return nil
}

// head is the smallest key that the rest can hold.
func (s *mergeSide) head() (key uint64, ok bool) {
	if s.leaf != nil {
		return s.leaf.key(s.i), true
	}
	if p := s.node(); p != nil {
		return p.in.lo, true
	}
	return 0, false
}

// skip drops the subtree that comes next.
func (s *mergeSide) skip() { s.stack = s.stack[:len(s.stack)-1] }

// open replaces the subtree that comes next by its children, or by its entries.
func (s *mergeSide) open() error {
	p := *s.node()
	s.skip()
	n, err := s.r.node(p.loc)
	if err != nil {
		return err
	}
	if err := p.in.check(n, p.loc); err != nil {
		return err
	}
	if n.leaf() {
		if n.len() > 0 {
			s.leaf, s.i = n, 0
		}
		return nil
	}
	if p.height <= 0 {
		return block.Corruptf(p.loc, "internal node at the depth of the leaves")
	}
	for i := n.len() - 1; i >= 0; i-- {
		s.stack = append(s.stack, pending{n.child(i), p.height - 1, p.in.below(n, i)})
	}
	return nil
}

// next moves past the current entry.
func (s *mergeSide) next() {
	if s.i++; s.i == s.leaf.len() {
		s.leaf = nil
	}
}

// Merge walks two trees of one committed state together: fn gets every key that is in either,
// ascending, with its values (nil where it is missing), until it returns an error. Subtrees
// that both trees share are read once; with skipShared they are not read at all and fn does not
// see their keys.
//
// Two subtrees are the same if they are the same block. A shared subtree may be missed when
// the trees have grown apart around it: its keys then come one by one, with equal values.
func (r Reader) Merge(left, right block.Loc, skipShared bool, fn func(key uint64, left, right []byte) error) error {
	l, err := newMergeSide(r, left)
	if err != nil {
		return err
	}
	s, err := newMergeSide(r, right)
	if err != nil {
		return err
	}
	for {
		lk, lok := l.head()
		rk, rok := s.head()
		if !lok && !rok {
			return nil
		}
		ln, rn := l.node(), s.node()
		if ln != nil && rn != nil && ln.loc == rn.loc {
			if !skipShared {
				var ferr error
				if _, err := r.walk(ln.loc, 0, MaxDepth-ln.height, ln.in, func(k uint64, v []byte) bool {
					ferr = fn(k, v, v)
					return ferr == nil
				}); err != nil || ferr != nil {
					return firstError(err, ferr)
				}
			}
			l.skip()
			s.skip()
			continue
		}
		// The side whose next thing is first goes on; where both begin with the same key, a
		// subtree is opened before an entry is taken, and the higher subtree first.
		first := l
		switch {
		case !lok, rok && rk < lk:
			first = s
		case rok && rk == lk && rn != nil && (ln == nil || rn.height > ln.height):
			first = s
		}
		if first.node() != nil {
			err = first.open()
		} else {
			err = mergeEntry(l, s, lok && l.leaf != nil, rok && s.leaf != nil, fn)
		}
		if err != nil {
			return err
		}
	}
}

// mergeEntry hands the entry with the smallest key to fn; a side without an entry at hand has
// nothing as small.
func mergeEntry(l, r *mergeSide, hasL, hasR bool, fn func(uint64, []byte, []byte) error) error {
	if hasL && hasR {
		lk, rk := l.leaf.key(l.i), r.leaf.key(r.i)
		hasL, hasR = lk <= rk, rk <= lk
	}
	var key uint64
	var lv, rv []byte
	if hasL {
		key, lv = l.leaf.key(l.i), l.leaf.value(l.i)
	}
	if hasR {
		key, rv = r.leaf.key(r.i), r.leaf.value(r.i)
	}
	if err := fn(key, lv, rv); err != nil {
		return err
	}
	if hasL {
		l.next()
	}
	if hasR {
		r.next()
	}
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
