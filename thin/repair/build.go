package repair

import (
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
)

var (
	mostEntries  = btree.MaxEntries(8)
	leastEntries = btree.MinEntries(8)
)

// A builder makes mapping trees of what is left of others. Nodes that are taken over keep their
// place; new ones go between them.
type builder struct {
	f     *forest
	c     *claims
	out   dev.Device // nil: nothing is written, new nodes stay in memory
	mem   map[block.Loc][]byte
	kept  []bool // by metadata block: taken over, perhaps
	fresh map[block.Loc]bool
	same  map[[32]byte]block.Loc // new nodes by their contents
	next  block.Loc
	built map[block.Loc]tree // by damaged root
}

// A tree is one mapping tree as it will be.
type tree struct {
	root    block.Loc // 0: nothing is left
	entries uint64
	lost    []LostRange
}

func newBuilder(f *forest, c *claims, out dev.Device) *builder {
	return &builder{f: f, c: c, out: out, mem: map[block.Loc][]byte{}, kept: make([]bool, f.n), fresh: map[block.Loc]bool{},
		same: map[[32]byte]block.Loc{}, next: 1, built: map[block.Loc]tree{}}
}

// Values of nodeInfo.whole.
const (
	notWhole = 1
	isWhole  = 2
)

// whole reports whether a tree can be taken over as it is.
func (b *builder) whole(loc block.Loc) bool {
	x := b.f.look(loc)
	if x.whole == 0 {
		x.whole = notWhole
		if b.wholeNode(loc, x) {
			x.whole = isWhole
		}
	}
	return x.whole == isWhole
}

func (b *builder) wholeNode(loc block.Loc, x *nodeInfo) bool {
	if x.state != usable || x.odd {
		return false
	}
	if x.height == 1 {
		return true
	}
	n, err := b.f.read(loc)
	if err != nil {
		return false
	}
	for i := range n.Len() {
		if c, ok := b.f.child(n, x, i); !ok || c.underfull || !b.whole(n.Child(i)) {
			return false
		}
	}
	return true
}

// reserve marks what will be taken over below a root, so that nothing new is put there.
func (b *builder) reserve(root block.Loc) {
	x := b.f.look(root)
	if x.state != usable {
		return
	}
	if b.whole(root) {
		b.keep(root)
		return
	}
	b.each(root, Range{}, func(p part) {
		if p.whole {
			b.keep(p.loc)
		}
	})
}

func (b *builder) keep(loc block.Loc) {
	if b.kept[loc] {
		return
	}
	b.kept[loc] = true
	n, err := b.f.read(loc)
	if err != nil || n.Leaf() {
		return
	}
	for i := range n.Len() {
		b.keep(n.Child(i))
	}
}

// A part is a piece of a damaged tree: a subtree that can be taken over, a leaf of which some
// mappings can, or a range of which nothing is left.
type part struct {
	loc   block.Loc
	whole bool
	lost  Range // if loc is 0
	why   string
}

// each calls fn for the pieces of a damaged tree, ascending.
func (b *builder) each(loc block.Loc, in Range, fn func(part)) {
	x := b.f.look(loc)
	if whole := b.whole(loc) && !x.underfull; whole || x.height == 1 {
		fn(part{loc: loc, whole: whole})
		return
	}
	n, err := b.f.read(loc)
	if err != nil {
		fn(part{lost: in, why: err.Error()})
		return
	}
	for i := range n.Len() {
		r := childRange(n, i, in)
		if _, ok := b.f.child(n, x, i); ok {
			b.each(n.Child(i), r, fn)
		} else {
			fn(part{lost: r, why: b.f.why(n, x, i)})
		}
	}
}

// tree makes the tree that has root now. All roots have been reserved before.
func (b *builder) tree(root block.Loc) (tree, error) {
	x := b.f.look(root)
	if x.state != usable {
		return tree{lost: []LostRange{{Range: Range{}, Why: b.f.whyUnusable(root)}}}, nil
	}
	if b.whole(root) {
		return tree{root: root, entries: x.entries}, nil
	}
	if t, ok := b.built[root]; ok {
		return t, nil
	}
	t, err := b.rebuild(root)
	b.built[root] = t
	return t, err
}

// rebuild puts what is left of a damaged tree together.
func (b *builder) rebuild(root block.Loc) (t tree, err error) {
	var items []item
	b.each(root, Range{}, func(p part) {
		x := b.f.look(p.loc)
		switch {
		case p.loc == 0:
			t.lose(LostRange{p.lost, p.why})
		case p.whole:
			items = append(items, item{x.first, uint64(p.loc), int(x.height)})
			t.entries += x.entries
		default:
			es := b.entries(p.loc, &t)
			items = append(items, es...)
			t.entries += uint64(len(es))
		}
	})
	if len(items) == 0 {
		return t, nil
	}
	t.root, err = b.pack(items)
	return t, err
}

// lose notes a range that is lost, together with the one before if it goes on there.
func (t *tree) lose(l LostRange) {
	if n := len(t.lost); n > 0 && t.lost[n-1].Why == l.Why && t.lost[n-1].End == l.Begin && l.Begin != 0 {
		t.lost[n-1].End = l.End
		return
	}
	t.lost = append(t.lost, l)
}

// entries returns the mappings of a leaf that are kept, and notes the others.
func (b *builder) entries(loc block.Loc, t *tree) (es []item) {
	n, err := b.f.read(loc)
	if err != nil {
		return nil
	}
	for i := range n.Len() {
		k := n.Key(i)
		m, ok := b.f.mapping(n, i)
		switch {
		case !ok:
			t.lose(LostRange{Range{k, k + 1}, fmt.Sprintf("metadata block %d: mapped to data blocks beyond the %d that there are", loc, b.f.dataBlocks)})
		case b.c.refusal(loc, i) != "":
			t.lose(LostRange{Range{k, k + 1}, b.c.refusal(loc, i)})
		case !b.c.keeps(m):
			t.lose(LostRange{Range{k, k + 1}, "the data blocks were given to somebody else later"})
		default:
			es = append(es, item{k, m.Pack(), 0})
		}
	}
	return es
}
