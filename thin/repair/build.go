package repair

import (
	"encoding/binary"
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

var (
	mostEntries  = btree.MaxEntries(8)
	leastEntries = btree.MinEntries(8)
)

// A builder makes mapping trees of what is left of others. Nodes that are taken over keep their
// place; new ones go between them.
type builder struct {
	f      *forest
	c      *claims
	out    dev.Device // nil: nothing is written, new nodes stay in memory
	mem    map[block.Loc][]byte
	kept   []bool // by metadata block: taken over, perhaps
	fresh  map[block.Loc]bool
	next   block.Loc
	built  map[block.Loc]tree      // by damaged root
	redone map[block.Loc]block.Loc // leaves that lost entries, by their old place
}

// A tree is one mapping tree as it will be.
type tree struct {
	root    block.Loc // 0: nothing is left
	entries uint64
	lost    []LostRange
}

func newBuilder(f *forest, c *claims, out dev.Device) *builder {
	return &builder{f: f, c: c, out: out, mem: map[block.Loc][]byte{}, kept: make([]bool, f.n), fresh: map[block.Loc]bool{}, next: 1,
		built: map[block.Loc]tree{}, redone: map[block.Loc]block.Loc{}}
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
		if p.asIs {
			b.kept[p.loc] = true
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

// A part is a leaf of a damaged tree, or a range without one.
type part struct {
	loc   block.Loc
	asIs  bool  // the leaf can be taken over
	lost  Range // no leaf
	why   string
	first uint64
}

// each calls fn for the leaves of a damaged tree that can be used, and for the ranges between
// them that cannot, ascending.
func (b *builder) each(loc block.Loc, in Range, fn func(part)) {
	x := b.f.look(loc)
	if x.height == 1 {
		fn(part{loc: loc, first: x.first, asIs: !x.odd && !x.underfull})
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

// A mapped is one entry of a leaf.
type mapped struct {
	key uint64
	val uint64
}

// A child is a node under construction's entry of the node above.
type child struct {
	key  uint64
	loc  block.Loc
	asIs bool
}

// rebuild gathers the leaves of a damaged tree below new nodes. Leaves that have lost entries are
// written anew, together with a neighbour where they have too few.
func (b *builder) rebuild(root block.Loc) (t tree, err error) {
	var leaves []child
	var open []mapped // entries that are not in a leaf yet
	flush := func(least int) {
		for err == nil && len(open) > 0 && len(open) >= least {
			n := len(open)
			if n > mostEntries {
				n = min(mostEntries, n-leastEntries)
			}
			var loc block.Loc
			loc, err = b.leaf(open[:n])
			leaves = append(leaves, child{open[0].key, loc, false})
			open = append(open[:0:0], open[n:]...)
		}
	}
	b.each(root, Range{}, func(p part) {
		if err != nil {
			return
		}
		if p.loc == 0 {
			t.lost = append(t.lost, LostRange{p.lost, p.why})
			return
		}
		if p.asIs && (len(open) == 0 || len(open) >= leastEntries) {
			flush(leastEntries)
			leaves = append(leaves, child{p.first, p.loc, true})
			t.entries += b.f.look(p.loc).entries
			return
		}
		es, lost := b.entries(p.loc)
		t.lost = append(t.lost, lost...)
		t.entries += uint64(len(es))
		if len(open) == 0 && len(es) >= leastEntries {
			// By itself, so that devices that share the old leaf share the new one.
			loc, ok := b.redone[p.loc]
			if !ok {
				if loc, err = b.leaf(es); err == nil {
					b.redone[p.loc] = loc
				}
			}
			leaves = append(leaves, child{es[0].key, loc, false})
			return
		}
		open = append(open, es...)
		flush(mostEntries + 1)
	})
	if n := len(leaves); err == nil && len(open) > 0 && len(open) < leastEntries && n > 0 {
		var es []mapped
		if es, err = b.last(leaves[n-1]); err == nil {
			leaves, open = leaves[:n-1], append(es, open...)
		}
		if len(open) > mostEntries {
			half := len(open) / 2
			rest := append([]mapped(nil), open[half:]...)
			open = open[:half]
			flush(1)
			open = rest
		}
	}
	flush(1)
	if err != nil {
		return tree{}, err
	}
	if len(leaves) == 0 {
		return t, nil
	}
	t.root, err = b.above(leaves)
	return t, err
}

// entries returns what can be kept of a leaf.
func (b *builder) entries(loc block.Loc) (es []mapped, lost []LostRange) {
	n, err := b.f.read(loc)
	if err != nil {
		return nil, nil
	}
	for i := range n.Len() {
		k := n.Key(i)
		m, ok := b.f.mapping(n, i)
		switch {
		case !ok:
			lost = append(lost, LostRange{Range{k, k + 1}, fmt.Sprintf("metadata block %d: mapped to data block %d of %d", loc, m.Block, b.f.dataBlocks)})
		case !b.c.keeps(m):
			lost = append(lost, LostRange{Range{k, k + 1}, fmt.Sprintf("data block %d was given to somebody else later", m.Block)})
		default:
			es = append(es, mapped{k, m.Pack()})
		}
	}
	return es, lost
}

// last returns the entries of a leaf that is in the new tree already.
func (b *builder) last(c child) ([]mapped, error) {
	if c.asIs {
		es, _ := b.entries(c.loc)
		return es, nil
	}
	n, err := readNode(newNodes{b}, c.loc, 8)
	if err != nil {
		return nil, err
	}
	es := make([]mapped, n.Len())
	for i := range es {
		es[i] = mapped{n.Key(i), raw(n, i)}
	}
	return es, nil
}

func (b *builder) leaf(es []mapped) (block.Loc, error) {
	return b.node(true, len(es), func(i int) (uint64, uint64) { return es[i].key, es[i].val })
}

// above puts internal nodes over nodes until there is one.
func (b *builder) above(list []child) (block.Loc, error) {
	for len(list) > 1 {
		nodes := (len(list) + mostEntries - 1) / mostEntries
		var up []child
		for i := range nodes {
			part := list[i*len(list)/nodes : (i+1)*len(list)/nodes]
			loc, err := b.node(false, len(part), func(j int) (uint64, uint64) { return part[j].key, uint64(part[j].loc) })
			if err != nil {
				return 0, err
			}
			up = append(up, child{part[0].key, loc, false})
		}
		list = up
	}
	return list[0].loc, nil
}

// node writes a new node to a place where nothing is taken over.
func (b *builder) node(leaf bool, n int, entry func(i int) (key, val uint64)) (block.Loc, error) {
	size := b.f.n
	if b.out != nil {
		size = block.Loc(b.out.Size() / block.Size)
	}
	for b.next < size && b.next < b.f.n && b.kept[b.next] {
		b.next++
	}
	if b.next >= size {
		return 0, fmt.Errorf("the new metadata device of %d blocks is too small: %w", size, thin.ErrNoMetaSpace)
	}
	loc := b.next
	b.next++
	b.fresh[loc] = true
	buf := make([]byte, block.Size)
	var v [8]byte
	btree.EncodeNode(buf, leaf, 8, n, func(i int) (uint64, []byte) {
		k, x := entry(i)
		binary.LittleEndian.PutUint64(v[:], x)
		return k, v[:]
	})
	block.Seal(buf, loc, block.Node)
	if b.out == nil {
		b.mem[loc] = buf
		return loc, nil
	}
	if _, err := b.out.WriteAt(buf, int64(loc)*block.Size); err != nil {
		return 0, fmt.Errorf("write metadata block %d: %w", loc, err)
	}
	return loc, nil
}

// newNodes reads the nodes that a builder has written.
type newNodes struct{ b *builder }

func (r newNodes) Read(loc block.Loc, k block.Kind) ([]byte, error) {
	if r.b.out == nil {
		return r.b.mem[loc], nil
	}
	buf := make([]byte, block.Size)
	return buf, block.ReadInto(r.b.out, buf, loc, k)
}
