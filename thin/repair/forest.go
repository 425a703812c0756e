package repair

import (
	"encoding/binary"
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// States of a node.
const (
	unknown  = iota
	entered  // being looked at: who meets it now has a cycle
	unusable // cannot be read, or nothing below can
	usable
)

// A nodeInfo is what is known of a node of a mapping tree.
type nodeInfo struct {
	first, last uint64 // first key of the node, last key below; only if keys
	entries     uint64 // usable mappings below
	maxTime     uint32 // of those
	dev         uint32 // claims: 1 + the index of the device that reached it first
	height      uint8  // 1 for leaves
	state       uint8
	keys        bool
	lossless    bool // everything below can be used
	underfull   bool // has too few entries, unless it is a root
	odd         bool // cannot be taken over as it is
	whole       uint8
}

const infoPage = 1024

// A forest is the mapping trees of a damaged metadata device, whose nodes are looked at once.
type forest struct {
	d          dev.Device
	n          block.Loc // blocks of the device
	cache      *block.Cache
	dataBlocks uint64 // mappings beyond are not usable
	time       uint32 // mappings of a later time get this one
	info       [][]nodeInfo
	bad        nodeInfo // of what does not exist
}

const cacheBytes = 32 << 20

func newForest(d dev.Device) *forest {
	n := block.Loc(d.Size() / block.Size)
	return &forest{d: d, n: n, cache: block.NewCache(d, cacheBytes), dataBlocks: 1 << 40, time: thin.MaxTime - 1,
		info: make([][]nodeInfo, (n+infoPage-1)/infoPage), bad: nodeInfo{state: unusable}}
}

// read returns a node of a mapping tree, or of the device tree, which has the same form.
func (f *forest) read(loc block.Loc) (btree.Node, error) { return readNode(f.cache, loc, 8) }

// readNode reads a node whose header is sound and whose keys ascend.
func readNode(b btree.Blocks, loc block.Loc, size int) (btree.Node, error) {
	buf, err := b.Read(loc, block.Node)
	if err != nil {
		return btree.Node{}, err
	}
	n, err := btree.ParseNode(buf, loc, size)
	if err != nil {
		return n, err
	}
	for i := 1; i < n.Len(); i++ {
		if n.Key(i) <= n.Key(i-1) {
			return n, block.Corruptf(loc, "key %d follows key %d", n.Key(i), n.Key(i-1))
		}
	}
	return n, nil
}

func (f *forest) at(loc block.Loc) *nodeInfo {
	if loc == 0 || loc >= f.n {
		return &f.bad
	}
	p := &f.info[loc/infoPage]
	if *p == nil {
		*p = make([]nodeInfo, infoPage)
	}
	return &(*p)[loc%infoPage]
}

// look finds out about the node at loc and everything below it.
func (f *forest) look(loc block.Loc) *nodeInfo { return f.lookAt(loc, 0) }

func (f *forest) lookAt(loc block.Loc, depth int) *nodeInfo {
	x := f.at(loc)
	if x.state != unknown {
		return x
	}
	x.state = entered
	n, err := f.read(loc)
	if err != nil || depth > btree.MaxDepth {
		x.state = unusable
		return x
	}
	x.lossless, x.odd = true, !n.Sound()
	x.underfull = n.Len() < btree.MinEntries(8)
	if n.Len() > 0 {
		x.keys, x.first, x.last = true, n.Key(0), n.Key(n.Len()-1)
	}
	if n.Leaf() {
		x.height = 1
		for i := range n.Len() {
			m, ok := f.mapping(n, i)
			if !ok {
				x.odd, x.lossless = true, false
				continue
			}
			x.odd = x.odd || m.Pack() != raw(n, i)
			x.entries++
			x.maxTime = max(x.maxTime, m.Time)
		}
		x.state = usable
		return x
	}
	for i := range n.Len() {
		f.lookAt(n.Child(i), depth+1)
		c, ok := f.child(n, x, i)
		if !ok {
			x.lossless = false
			continue
		}
		x.height = c.height + 1
		x.entries += c.entries
		x.maxTime = max(x.maxTime, c.maxTime)
		x.lossless = x.lossless && c.lossless
		if c.keys {
			x.last = max(x.last, c.last)
		}
	}
	x.state = usable
	if x.height == 0 {
		x.state = unusable
	}
	return x
}

// child returns child i of a node with what is known of it, and whether it can be used there: it
// is readable, as high as the ones before, and its keys are what this node admits.
func (f *forest) child(n btree.Node, x *nodeInfo, i int) (*nodeInfo, bool) {
	c := f.at(n.Child(i))
	switch {
	case c.state != usable, x.height != 0 && c.height+1 != x.height:
		return c, false
	case c.keys && (c.first < n.Key(i) || i+1 < n.Len() && c.last >= n.Key(i+1)):
		return c, false
	}
	return c, true
}

// why says what is wrong with a node that cannot be used as child i of n.
func (f *forest) why(n btree.Node, x *nodeInfo, i int) string {
	loc := n.Child(i)
	c := f.at(loc)
	switch {
	case loc == 0 || loc >= f.n:
		return fmt.Sprintf("metadata block %d does not exist", loc)
	case c.state == entered:
		return fmt.Sprintf("metadata block %d is below itself", loc)
	case c.state == unusable:
		return f.whyUnusable(loc)
	case x.height != 0 && c.height+1 != x.height:
		return fmt.Sprintf("metadata block %d: %d levels high, want %d", loc, c.height, x.height-1)
	}
	return fmt.Sprintf("metadata block %d: keys %d to %d are not what the parent admits", loc, c.first, c.last)
}

func (f *forest) whyUnusable(loc block.Loc) string {
	if loc == 0 || loc >= f.n {
		return fmt.Sprintf("metadata block %d does not exist", loc)
	}
	if _, err := f.read(loc); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("metadata block %d: nothing below it can be read", loc)
}

func raw(n btree.Node, i int) uint64 { return binary.LittleEndian.Uint64(n.Value(i)) }

// mapping returns entry i of a leaf as it is to be taken over.
func (f *forest) mapping(n btree.Node, i int) (thin.Mapping, bool) {
	m := thin.UnpackMapping(raw(n, i))
	m.Time = min(m.Time, f.time)
	return m, uint64(m.Block) < f.dataBlocks
}
