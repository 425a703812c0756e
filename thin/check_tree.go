package thin

import (
	"encoding/binary"
	"math"

	"mica/pdata/block"
	"mica/pdata/btree"
)

// A use is what a metadata block is reached as. A block with two uses is corrupt.
type use uint8

const (
	useNone use = iota
	useSuper
	useHeld
	useMetaIndex
	useMetaBitmap
	useMetaOver
	useDataBitmap
	useDataIndex
	useDataOver
	useTop
	useDetails
	useMapping
)

var useNames = [...]string{"nothing", "superblock", "metadata snapshot", "metadata index", "metadata bitmap",
	"node of the metadata overflow tree", "data bitmap", "node of the data index", "node of the data overflow tree",
	"node of the device tree", "node of the details tree", "node of a mapping tree"}

func (u use) String() string { return useNames[u] }

// shareable: several blocks may point at it.
func (u use) shareable() bool { return u >= useTop }

// nodeInfo is what must be known of a node when it is reached again.
type nodeInfo struct {
	first, last uint64 // first key of the node, last key below it; valid if keys
	entries     uint64 // below it
	maxTime     int64  // of the mappings below it, -1 without any
	snap        uint32 // snapshotted time of the device that reached it first
	height      uint8  // 1 for leaves, 0 unknown
	entered     bool
	done        bool
	keys        bool
	whole       bool // everything below was readable
	underfull   bool
}

func (c *checker) infoOf(loc block.Loc) *nodeInfo {
	p := &c.info[loc/infoPage]
	if *p == nil {
		*p = make([]nodeInfo, infoPage)
	}
	return &(*p)[loc%infoPage]
}

// claim counts a pointer to a block and reports whether the block is there to be read for the
// first time. at says where the pointer is.
func (c *checker) claim(at place, u use, loc block.Loc) bool {
	at.block = loc
	if uint64(loc) >= c.meta.n {
		c.fatal(at, "used as %v, there are %d blocks", u, c.meta.n)
		c.rep.Partial = true
		return false
	}
	c.meta.ref(uint64(loc))
	switch was := c.use[loc]; {
	case was == useNone:
		c.use[loc] = u
		return true
	case was != u:
		c.fatal(at, "used as %v and as %v", was, u)
		c.rep.Partial = true
	case !u.shareable():
		c.fatal(at, "used twice as %v", u)
	}
	return false
}

// A treeCheck is the walk of one tree.
type treeCheck struct {
	c    *checker
	at   place // where, device; path grows and shrinks with the walk
	use  use
	size int    // of the values in the leaves, in bytes
	snap uint32 // mapping trees: snapshotted time of the device
	held bool   // belongs to the metadata snapshot
	leaf func(t *treeCheck, n checkNode)
}

// A checkNode is a node whose header is sound.
type checkNode struct {
	b    []byte
	nr   int
	vals int // where the values start
	leaf bool
}

func (n checkNode) key(i int) uint64      { return binary.LittleEndian.Uint64(n.b[32+8*i:]) }
func (n checkNode) u64(i int) uint64      { return binary.LittleEndian.Uint64(n.b[n.vals+8*i:]) }
func (n checkNode) value(i, s int) []byte { return n.b[n.vals+s*i : n.vals+s*(i+1)] }

// bounds are the keys that a parent allows: lo <= key, and key < hi if limited.
type bounds struct {
	lo, hi  uint64
	limited bool
}

func (b bounds) admit(first, last uint64) bool { return first >= b.lo && (!b.limited || last < b.hi) }

// walk checks the tree below root and returns what is known of it.
func (t *treeCheck) walk(root block.Loc) nodeInfo {
	t.at.path = t.at.path[:0]
	return t.visit(root, bounds{}, 0)
}

func (t *treeCheck) visit(loc block.Loc, in bounds, depth int) nodeInfo {
	c := t.c
	t.at.block = loc
	t.at.path = append(t.at.path, loc)
	defer func() {
		t.at.path = t.at.path[:len(t.at.path)-1]
		if depth > 0 {
			t.at.block = t.at.path[len(t.at.path)-1]
		}
	}()
	if !c.claim(t.at, t.use, loc) {
		if uint64(loc) >= c.meta.n || c.use[loc] != t.use {
			return nodeInfo{}
		}
		return t.again(loc, in, depth)
	}
	info := c.infoOf(loc)
	*info = nodeInfo{entered: true, snap: t.snap, maxTime: -1}
	if depth > btree.MaxDepth {
		c.fatal(t.at, "b-tree deeper than %d", btree.MaxDepth)
		c.rep.Partial = true
		return *info
	}
	b := c.read(t.at, block.Node, depth)
	if b == nil {
		info.done = true
		return *info
	}
	n, ok := t.header(b, depth)
	if !ok {
		c.rep.Partial = true
		info.done = true
		return *info
	}
	t.keys(n, in)
	if n.nr > 0 {
		info.keys, info.first, info.last = true, n.key(0), n.key(n.nr-1)
	}
	info.whole = true
	info.underfull = n.nr < n.max(t.size)/3
	if info.underfull && depth > 0 {
		c.fatal(t.at, "%d entries, a node that is not the root has at least %d", n.nr, n.max(t.size)/3)
	}
	if n.leaf {
		info.height, info.entries = 1, uint64(n.nr)
		if t.use == useMapping {
			info.maxTime = c.mappings(t, n)
		} else if t.leaf != nil {
			t.leaf(t, n)
		}
	} else {
		t.children(n, in, depth, info)
	}
	info.done = true
	return *info
}

func (n checkNode) max(leafSize int) int {
	if n.leaf {
		return btree.MaxEntries(leafSize)
	}
	return btree.MaxEntries(8)
}

// header checks the header of a node; what it admits can be walked.
func (t *treeCheck) header(b []byte, depth int) (checkNode, bool) {
	c, le := t.c, binary.LittleEndian
	flags, nr, most, size := le.Uint32(b[4:]), le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:])
	n := checkNode{b: b, nr: int(nr), leaf: flags == 2}
	want := uint32(8)
	switch flags {
	case 1:
	case 2:
		want = uint32(t.size)
	default:
		c.fatal(t.at, "node flags %#x, want 1 (internal) or 2 (leaf)", flags)
		return n, false
	}
	if size != want {
		c.fatal(t.at, "values of %d bytes, want %d", size, want)
		return n, false
	}
	if fit := uint32(block.Size-32) / (8 + want); most > fit || most%3 != 0 || most == 0 {
		c.fatal(t.at, "max_entries %d, want %d", most, n.max(t.size))
		return n, false
	}
	if most != uint32(n.max(t.size)) {
		c.warn(t.at, "max_entries %d, want %d", most, n.max(t.size))
	}
	if nr > most {
		c.fatal(t.at, "%d entries, more than the %d places", nr, most)
		return n, false
	}
	if nr == 0 && !n.leaf {
		c.fatal(t.at, "internal node without entries")
		return n, false
	}
	n.vals = 32 + 8*int(most)
	return n, true
}

// keys checks order and bounds of the keys of a node.
func (t *treeCheck) keys(n checkNode, in bounds) {
	if n.nr == 0 {
		return
	}
	last := n.key(0)
	for i := 1; i < n.nr; i++ {
		k := n.key(i)
		if k <= last {
			t.c.fatal(t.at, "key %d at %d is not above key %d before it", k, i, last)
		}
		last = k
	}
	if !in.admit(n.key(0), last) {
		t.outside(n.key(0), last, in)
	}
}

func (t *treeCheck) outside(first, last uint64, in bounds) {
	if in.limited {
		t.c.fatal(t.at.span(first, last+1), "keys %d to %d, the parent admits [%d, %d)", first, last, in.lo, in.hi)
	} else {
		t.c.fatal(t.at.span(first, last+1), "keys %d to %d, the parent admits %d and above", first, last, in.lo)
	}
}

// children visits what an internal node points at.
func (t *treeCheck) children(n checkNode, in bounds, depth int, info *nodeInfo) {
	for i := 0; i < n.nr; i++ {
		b := bounds{lo: n.key(i), hi: in.hi, limited: in.limited}
		if i+1 < n.nr {
			b.hi, b.limited = n.key(i+1), true
		}
		child := t.visit(block.Loc(n.u64(i)), b, depth+1)
		info.whole = info.whole && child.whole
		info.entries += child.entries
		info.maxTime = max(info.maxTime, child.maxTime)
		if child.keys {
			info.last = max(info.last, child.last)
		}
		switch {
		case child.height == 0:
		case info.height == 0:
			info.height = child.height + 1
		case info.height != child.height+1:
			t.c.fatal(t.at, "child %d is %d levels high, the ones before it are %d", i, child.height, info.height-1)
		}
	}
}

// again checks a node that another pointer has led to before.
func (t *treeCheck) again(loc block.Loc, in bounds, depth int) nodeInfo {
	c, info := t.c, t.c.infoOf(loc)
	if info.entered && !info.done {
		c.fatal(t.at, "is below itself")
		c.rep.Partial = true
		return nodeInfo{}
	}
	if info.keys && depth > 0 && !in.admit(info.first, info.last) {
		t.outside(info.first, info.last, in)
	}
	if info.underfull && depth > 0 {
		c.fatal(t.at, "has too few entries for a node that is not the root")
	}
	if t.use == useMapping && !t.held && info.maxTime >= 0 {
		if oldest := min(info.snap, t.snap); info.maxTime >= int64(oldest) {
			c.fatal(t.at, "is shared, but holds a mapping of time %d that a device with snapshotted time %d takes for its own", info.maxTime, oldest)
		}
	}
	return *info
}

// noSnap is the snapshotted time of a device without details: nothing is its own.
const noSnap = math.MaxUint32

// mappings checks the leaf of a mapping tree and counts its data blocks. It returns the newest
// time.
func (c *checker) mappings(t *treeCheck, n checkNode) int64 {
	newest := uint32(0)
	for i := 0; i < n.nr; i++ {
		v := n.u64(i)
		b, time := v>>24, uint32(v&(MaxTime-1))
		newest = max(newest, time)
		if b >= c.sb.DataMap.NrBlocks {
			k := n.key(i)
			c.fatal(t.at.span(k, k+1), "mapped to data block %d of %d", b, c.sb.DataMap.NrBlocks)
		} else if b < c.data.n {
			c.data.ref(b)
			if time >= t.snap && !t.held {
				c.data.st[b] |= stOwned
			}
		}
		if time > c.sb.Time {
			k := n.key(i)
			c.fatal(t.at.span(k, k+1), "mapped at time %d, the pool's is %d", time, c.sb.Time)
		}
	}
	if n.nr == 0 {
		return -1
	}
	return int64(newest)
}
