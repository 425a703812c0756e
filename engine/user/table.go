package user

import (
	"fmt"
	"sync"
	"sync/atomic"

	"mica/thin"
)

const (
	leafBlocks = 512 // virtual blocks in a leaf
	dirLeaves  = 512 // leaves in a directory
	// absent is the entry of a block that is not mapped. It is no legal mapping: data block
	// 2^40 - 1 would be far beyond the largest data device.
	absent = ^uint64(0)
	// leafBytes is what a leaf costs, for the bound of the cache.
	leafBytes = 4864
	// maxVBlocks bounds the length of a thin device in blocks, so that its directory stays small.
	maxVBlocks = 1 << 40
)

// A leaf holds the mappings of 512 neighbouring virtual blocks: the value that is or will be in
// the mapping tree, or absent. A leaf that can be reached is complete.
//
// Entries are read without a lock. They are written under mu, and only while the leaf is
// reachable (dead is false). A leaf with pending entries, or whose entries are on their way
// into the tree (closing), is not evicted: what is read from the tree later is then right.
type leaf struct {
	entries [leafBlocks]atomic.Uint64
	zero    atomic.Pointer[zeroDir] // which parts are known to be zero, see zeroparts.go
	used    atomic.Bool             // looked at since the cache's hand passed

	mu      sync.Mutex
	pend    [leafBlocks / 64]uint64 // guarded by mu: entries of the open pending set
	npend   int                     // guarded by mu
	closing int                     // guarded by mu: sets that hold entries of this leaf and are not in the tree
	listed  bool                    // guarded by mu: in device.dirty
	dead    bool                    // guarded by mu: evicted

	dev   *device
	index uint64 // virtual block / leafBlocks
	slot  *atomic.Pointer[leaf]
	pos   int // guarded by leafCache.mu: place in leaves
}

type leafDir [dirLeaves]atomic.Pointer[leaf]

// A table finds leaves by virtual block: directories of 512 leaves, made when they are needed.
type table struct {
	root atomic.Pointer[[]atomic.Pointer[leafDir]]
	mu   sync.Mutex     // guards changes of root and of its elements
	fill [16]sync.Mutex // by leaf number: one goroutine reads a leaf
}

// reach makes sure that blocks below vblocks have a place.
func (t *table) reach(vblocks uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	const per = leafBlocks * dirLeaves
	n := int((vblocks + per - 1) / per)
	old := t.root.Load()
	if old != nil && len(*old) >= n {
		return
	}
	r := make([]atomic.Pointer[leafDir], n)
	if old != nil {
		for i := range *old {
			r[i].Store((*old)[i].Load())
		}
	}
	t.root.Store(&r)
}

// at returns the leaf of vb, or nil if it is not in memory.
func (t *table) at(vb thin.VBlock) *leaf {
	r := *t.root.Load()
	i := uint64(vb) / (leafBlocks * dirLeaves)
	if i >= uint64(len(r)) {
		return nil
	}
	d := r[i].Load()
	if d == nil {
		return nil
	}
	l := d[uint64(vb)/leafBlocks%dirLeaves].Load()
	if l != nil && !l.used.Load() {
		l.used.Store(true)
	}
	return l
}

// firstLeaf returns the first block of the first leaf in memory behind vb, at most end.
func (t *table) firstLeaf(vb, end thin.VBlock) thin.VBlock {
	r := *t.root.Load()
	const per = leafBlocks * dirLeaves
	for h := (vb/leafBlocks + 1) * leafBlocks; h < end; {
		i := uint64(h) / per
		if i >= uint64(len(r)) {
			break
		}
		d := r[i].Load()
		if d == nil {
			h = thin.VBlock((i + 1) * per)
			continue
		}
		if d[uint64(h)/leafBlocks%dirLeaves].Load() != nil {
			return h
		}
		h += leafBlocks
	}
	return end
}

func (t *table) slot(vb thin.VBlock) *atomic.Pointer[leaf] {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := *t.root.Load()
	e := &r[uint64(vb)/(leafBlocks*dirLeaves)]
	if e.Load() == nil {
		e.Store(new(leafDir))
	}
	return &e.Load()[uint64(vb)/leafBlocks%dirLeaves]
}

// leafOf returns the leaf of vb, reading it from the mapping tree if it must.
//
// Nobody changes the device's mappings in the range while its leaf is not reachable: changes go
// through the leaf, and it stays until they are in the tree.
func (d *device) leafOf(vb thin.VBlock) (*leaf, error) {
	if l := d.table.at(vb); l != nil {
		return l, nil
	}
	slot := d.table.slot(vb)
	index := uint64(vb) / leafBlocks
	fill := &d.table.fill[index%uint64(len(d.table.fill))]
	fill.Lock()
	defer fill.Unlock()
	if l := slot.Load(); l != nil {
		return l, nil
	}
	l := &leaf{dev: d, index: index, slot: slot}
	for i := range l.entries {
		l.entries[i].Store(absent)
	}
	begin := thin.VBlock(index * leafBlocks)
	err := d.p.meta.LookupRange(d.id, begin, begin+leafBlocks, func(e thin.Entry) bool {
		l.entries[e.VBlock%leafBlocks].Store(e.Pack())
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("thin %d: look up block %d: %w", d.id, vb, err)
	}
	l.used.Store(true)
	slot.Store(l)
	d.p.cache.add(l)
	return l, nil
}

// drop takes all leaves of a device out of the cache. No request is in flight, nothing pending.
func (t *table) drop(c *leafCache) {
	r := *t.root.Load()
	for i := range r {
		d := r[i].Load()
		if d == nil {
			continue
		}
		for j := range d {
			if l := d[j].Load(); l != nil {
				c.remove(l)
			}
		}
		r[i].Store(nil)
	}
}

// A leafCache bounds the leaves of all devices of a pool. The hand goes round and evicts leaves
// that nobody has looked at since it came by.
type leafCache struct {
	limit int // leaves
	mu    sync.Mutex
	all   []*leaf // guarded by mu, as is hand
	hand  int
}

func (c *leafCache) add(l *leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.pos = len(c.all)
	c.all = append(c.all, l)
	// A bounded search: if everything is in use or pending, the cache grows for a while.
	for tries := 0; len(c.all) > c.limit && tries < 64; tries++ {
		if c.hand >= len(c.all) {
			c.hand = 0
		}
		v := c.all[c.hand]
		if v == l || v.used.Swap(false) || !v.evict() {
			c.hand++
			continue
		}
		c.removeLocked(v)
	}
}

// evict makes a leaf unreachable unless its entries are not all in the tree.
func (l *leaf) evict() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.npend > 0 || l.closing > 0 || l.listed {
		return false
	}
	l.dead = true
	l.slot.CompareAndSwap(l, nil)
	return true
}

func (c *leafCache) removeLocked(l *leaf) {
	last := c.all[len(c.all)-1]
	c.all[l.pos] = last
	last.pos = l.pos
	c.all[len(c.all)-1] = nil
	c.all = c.all[:len(c.all)-1]
}

func (c *leafCache) remove(l *leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.pos < len(c.all) && c.all[l.pos] == l {
		c.removeLocked(l)
	}
}

// len is the number of leaves in memory.
func (c *leafCache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.all)
}
