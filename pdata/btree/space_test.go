package btree

import (
	"errors"
	"fmt"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/txn"
)

// errFull is what a testSpace without free blocks says.
var errFull = errors.New("test space map: no block left")

// A testSpace counts metadata blocks in plain maps. Blocks that the committed state uses are
// not handed out again before the next commit.
type testSpace struct {
	counts    map[block.Loc]uint32
	committed map[block.Loc]bool
	next      block.Loc
	limit     int // blocks in use at most
}

func newTestSpace(limit int) *testSpace {
	return &testSpace{counts: map[block.Loc]uint32{}, committed: map[block.Loc]bool{}, next: 1, limit: limit}
}

func (s *testSpace) Alloc() (block.Loc, error) {
	if s.limit > 0 && len(s.counts) >= s.limit {
		return 0, errFull
	}
	for s.counts[s.next] > 0 || s.committed[s.next] {
		s.next++
	}
	s.counts[s.next] = 1
	s.next++
	return s.next - 1, nil
}

func (s *testSpace) Inc(b block.Loc) error {
	if s.counts[b] == 0 {
		return fmt.Errorf("inc of free block %d", b)
	}
	s.counts[b]++
	return nil
}

func (s *testSpace) Dec(b block.Loc) (uint32, error) {
	if s.counts[b] == 0 {
		return 0, fmt.Errorf("dec of free block %d", b)
	}
	s.counts[b]--
	n := s.counts[b]
	if n == 0 {
		delete(s.counts, b)
	}
	return n, nil
}

func (s *testSpace) Count(b block.Loc) uint32 { return s.counts[b] }

// A forest is a tree type with several roots over one space, and a model of each.
type forest struct {
	t     testing.TB
	size  int
	space *testSpace
	d     dev.Device
	tm    *txn.Manager
	tree  *Tree
	refs  map[uint64]int // of values, when values are counted
	roots []block.Loc
	model []map[uint64]uint64
}

// newForest makes trees of values of size bytes. Values of 8 bytes refer to things that are
// counted, as those of mappings do.
func newForest(t testing.TB, size, limit int) *forest {
	f := &forest{t: t, size: size, space: newTestSpace(limit), refs: map[uint64]int{}}
	f.d = dev.NewMem(1 << 40)
	f.tm = txn.New(f.d, block.NewCache(f.d, 64<<20))
	f.tm.SetSpaceMap(f.space)
	vt := ValueType{Size: size}
	if size == 8 {
		vt.Inc = func(v []byte) error { f.refs[f.decode(v)]++; return nil }
		vt.Dec = func(v []byte) error {
			k := f.decode(v)
			if f.refs[k]--; f.refs[k] < 0 {
				return fmt.Errorf("value %d dropped too often", k)
			}
			if f.refs[k] == 0 {
				delete(f.refs, k)
			}
			return nil
		}
		vt.Equal = func(a, b []byte) bool { return f.decode(a) == f.decode(b) }
	}
	f.tree = New(f.tm, vt)
	return f
}

func (f *forest) must(err error) {
	if err != nil {
		f.t.Helper()
		f.t.Fatal(err)
	}
}

// encode spreads a number over a value, so that every byte of it counts.
func (f *forest) encode(n uint64) []byte {
	v := make([]byte, f.size)
	for i := range v {
		v[i] = byte(n >> (8 * (i % 4)))
		if i >= 4 {
			v[i] ^= byte(i)
		}
	}
	return v
}

func (f *forest) decode(v []byte) uint64 {
	n := uint64(v[0]) | uint64(v[1])<<8 | uint64(v[2])<<16 | uint64(v[3])<<24
	if want := f.encode(n); string(want) != string(v) {
		f.t.Fatalf("value % x is damaged, want % x", v, want)
	}
	return n
}

// own gives a value that is about to be inserted its reference.
func (f *forest) own(n uint64) []byte {
	if f.size == 8 {
		f.refs[n]++
	}
	return f.encode(n)
}

func (f *forest) add() int {
	root, err := f.tree.Empty()
	f.must(err)
	f.roots = append(f.roots, root)
	f.model = append(f.model, map[uint64]uint64{})
	return len(f.roots) - 1
}

// snap makes another root of the same tree.
func (f *forest) snap(i int) int {
	f.must(f.tm.Inc(f.roots[i]))
	f.roots = append(f.roots, f.roots[i])
	m := make(map[uint64]uint64, len(f.model[i]))
	for k, v := range f.model[i] {
		m[k] = v
	}
	f.model = append(f.model, m)
	return len(f.roots) - 1
}

// forget drops tree i from the lists; its blocks have been released.
func (f *forest) forget(i int) {
	f.roots = append(f.roots[:i], f.roots[i+1:]...)
	f.model = append(f.model[:i], f.model[i+1:]...)
}

// commit writes the transaction and opens the next.
func (f *forest) commit() {
	f.must(f.tm.Close().Write())
	f.space.committed = map[block.Loc]bool{}
	for b := range f.space.counts {
		f.space.committed[b] = true
	}
	f.space.next = 1
}

// verify holds every tree against its model and the invariants of the format, and all counts
// against the pointers in distinct nodes.
func (f *forest) verify() {
	f.t.Helper()
	counts := map[block.Loc]uint32{}
	refs := map[uint64]int{}
	var visit func(loc block.Loc, lo, hi uint64, limited bool, depth int) (height int)
	visit = func(loc block.Loc, lo, hi uint64, limited bool, depth int) int {
		counts[loc]++
		buf, err := f.tm.Read(loc, block.Node)
		f.must(err)
		n := node(buf)
		f.must(checkNode(n, loc, f.size))
		if n.max() != MaxEntries(n.size()) {
			f.t.Fatalf("node %d has max_entries %d", loc, n.max())
		}
		if depth > 0 && n.len() < n.min() {
			f.t.Fatalf("node %d at depth %d has %d entries, fewer than %d", loc, depth, n.len(), n.min())
		}
		if err := (bounds{lo, hi, limited}).check(n, loc); err != nil {
			f.t.Fatal(err)
		}
		height := 1
		for i := 0; i < n.len(); i++ {
			if n.leaf() {
				if counts[loc] == 1 && f.size == 8 {
					refs[f.decode(n.value(i))]++
				}
				continue
			}
			b := bounds{lo, hi, limited}.below(n, i)
			var h int
			if counts[loc] == 1 {
				h = visit(n.child(i), b.lo, b.hi, b.limited, depth+1)
			} else {
				// Counted already; the shape still has to fit here.
				h = f.shape(n.child(i), b, depth+1)
			}
			if height != 1 && h+1 != height {
				f.t.Fatalf("node %d: children of %d and %d levels", loc, height-1, h)
			}
			height = h + 1
		}
		for i := n.len(); i < n.max(); i++ {
			if n.key(i) != 0 || !zero(n.value(i)) {
				f.t.Fatalf("node %d: unused place %d is not zero", loc, i)
			}
		}
		return height
	}
	for i, root := range f.roots {
		visit(root, 0, 0, false, 0)
		n := 0
		last := uint64(0)
		f.must(f.tree.Walk(root, 0, func(k uint64, v []byte) bool {
			if n > 0 && k <= last {
				f.t.Fatalf("tree %d: key %d after %d", i, k, last)
			}
			want, ok := f.model[i][k]
			if !ok || f.decode(v) != want {
				f.t.Fatalf("tree %d: key %d is %d, want %d %v", i, k, f.decode(v), want, ok)
			}
			last = k
			n++
			return true
		}))
		if n != len(f.model[i]) {
			f.t.Fatalf("tree %d: %d entries, want %d", i, n, len(f.model[i]))
		}
		if k, ok, err := f.tree.Last(root); err != nil || ok != (n > 0) || ok && k != last {
			f.t.Fatalf("tree %d: last key %d %v %v, want %d", i, k, ok, err, last)
		}
		if c, err := f.tree.r.count(root, 0, bounds{}); err != nil || c != uint64(n) {
			f.t.Fatalf("tree %d: count %d %v, want %d", i, c, err, n)
		}
	}
	if len(counts) != len(f.space.counts) {
		f.t.Fatalf("%d blocks counted, %d reached", len(f.space.counts), len(counts))
	}
	for b, n := range counts {
		if f.space.counts[b] != n {
			f.t.Fatalf("block %d: count %d, %d pointers", b, f.space.counts[b], n)
		}
	}
	if f.size == 8 {
		if len(refs) != len(f.refs) {
			f.t.Fatalf("%d values counted, %d reached", len(f.refs), len(refs))
		}
		for v, n := range refs {
			if f.refs[v] != n {
				f.t.Fatalf("value %d: count %d, %d pointers", v, f.refs[v], n)
			}
		}
	}
}

// shape checks fill and bounds below a node without counting.
func (f *forest) shape(loc block.Loc, in bounds, depth int) int {
	buf, err := f.tm.Read(loc, block.Node)
	f.must(err)
	n := node(buf)
	if err := in.check(n, loc); err != nil {
		f.t.Fatal(err)
	}
	if depth > 0 && n.len() < n.min() {
		f.t.Fatalf("node %d, shared, has %d entries, fewer than %d", loc, n.len(), n.min())
	}
	if n.leaf() {
		return 1
	}
	h := 0
	for i := 0; i < n.len(); i++ {
		h = f.shape(n.child(i), in.below(n, i), depth+1)
	}
	return h + 1
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
