// Package txn groups changes of metadata blocks into transactions. A block of the committed
// state is never changed in place: it is shadowed, that is copied to a newly allocated block
// which is then free to change until the transaction is closed.
package txn

import (
	"fmt"
	"sort"

	"mica/dev"
	"mica/pdata/block"
)

// A SpaceMap counts the references to metadata blocks. It lives above this package; its
// allocations follow the rule that a block which the committed state uses is not handed out.
type SpaceMap interface {
	// Alloc returns a block with count 1.
	Alloc() (block.Loc, error)
	Inc(block.Loc) error
	// Dec drops one reference and returns what is left.
	Dec(block.Loc) (uint32, error)
	Count(block.Loc) uint32
}

type dirtyBlock struct {
	kind block.Kind
	buf  []byte
}

// A Manager holds the open transaction. It has no lock: changes need the caller's exclusive
// lock, Read needs at least its shared lock.
type Manager struct {
	d     dev.Device
	cache *block.Cache
	sm    SpaceMap
	dirty map[block.Loc]*dirtyBlock // allocated in the open transaction
	freed func(block.Loc)           // is told of blocks that lose their last reference; may be nil
}

// New makes a manager with an empty transaction. The space map is set before the first change.
func New(d dev.Device, cache *block.Cache) *Manager {
	return &Manager{d: d, cache: cache, dirty: make(map[block.Loc]*dirtyBlock)}
}

// SetSpaceMap says who counts the blocks.
func (m *Manager) SetSpaceMap(sm SpaceMap) { m.sm = sm }

// OnFree has fn told of every block that loses its last reference, until it is set again.
func (m *Manager) OnFree(fn func(block.Loc)) { m.freed = fn }

// Read returns a block as the open transaction sees it. The buffer must not be changed.
func (m *Manager) Read(loc block.Loc, k block.Kind) ([]byte, error) {
	if d := m.dirty[loc]; d != nil {
		if d.kind != k {
			return nil, block.Corruptf(loc, "is used as a %s and as a %s", d.kind, k)
		}
		return d.buf, nil
	}
	return m.cache.Read(loc, k)
}

// Alloc returns a new zeroed block with count 1 that may be changed until the transaction closes.
func (m *Manager) Alloc(k block.Kind) (block.Loc, []byte, error) {
	loc, err := m.sm.Alloc()
	if err != nil {
		return 0, nil, err
	}
	buf := make([]byte, block.Size)
	m.dirty[loc] = &dirtyBlock{k, buf}
	return loc, buf, nil
}

// Shadow returns a block with the contents of loc that may be changed: loc itself, if it was
// allocated in this transaction and has one reference, else a copy, for which loc loses a
// reference. If shared is true, the copy's values are now referred to once more and the
// caller must count them.
func (m *Manager) Shadow(loc block.Loc, k block.Kind) (n block.Loc, buf []byte, shared bool, err error) {
	shared = m.sm.Count(loc) > 1
	if d := m.dirty[loc]; d != nil && !shared {
		if d.kind != k {
			return 0, nil, false, block.Corruptf(loc, "is used as a %s and as a %s", d.kind, k)
		}
		return loc, d.buf, false, nil
	}
	old, err := m.Read(loc, k)
	if err != nil {
		return 0, nil, false, err
	}
	n, buf, err = m.Alloc(k)
	if err != nil {
		return 0, nil, false, err
	}
	copy(buf, old)
	return n, buf, shared, m.Dec(loc)
}

// Inc adds a reference to a block.
func (m *Manager) Inc(loc block.Loc) error { return m.sm.Inc(loc) }

// Dec drops a reference. A block of this transaction that loses its last one is not written.
func (m *Manager) Dec(loc block.Loc) error {
	left, err := m.sm.Dec(loc)
	if err == nil && left == 0 {
		delete(m.dirty, loc)
		if m.freed != nil {
			m.freed(loc)
		}
	}
	return err
}

// Count is the number of references to a block.
func (m *Manager) Count(loc block.Loc) uint32 { return m.sm.Count(loc) }

// A Closed transaction is complete and immutable; its blocks are found by readers and wait to
// be written.
type Closed struct {
	d      dev.Device
	cache  *block.Cache
	blocks []closedBlock // ascending
}

type closedBlock struct {
	loc block.Loc
	buf []byte
}

// Close seals the blocks of the open transaction and opens the next, empty one.
func (m *Manager) Close() *Closed {
	c := &Closed{d: m.d, cache: m.cache, blocks: make([]closedBlock, 0, len(m.dirty))}
	for loc, d := range m.dirty {
		block.Seal(d.buf, loc, d.kind)
		m.cache.Hold(loc, d.kind, d.buf)
		c.blocks = append(c.blocks, closedBlock{loc, d.buf})
	}
	sort.Slice(c.blocks, func(i, j int) bool { return c.blocks[i].loc < c.blocks[j].loc })
	m.dirty = make(map[block.Loc]*dirtyBlock)
	return c
}

// maxWrite bounds one write of neighbouring blocks, in blocks.
const maxWrite = 256

// Write writes the blocks, neighbours in one request, and flushes the device. On an error
// nothing is known about what was written; none of it is part of the committed state.
func (c *Closed) Write() error {
	var buf []byte
	for i := 0; i < len(c.blocks); {
		j := i + 1
		for j < len(c.blocks) && j-i < maxWrite && c.blocks[j].loc == c.blocks[j-1].loc+1 {
			j++
		}
		p := c.blocks[i].buf
		if j-i > 1 {
			buf = buf[:0]
			for _, b := range c.blocks[i:j] {
				buf = append(buf, b.buf...)
			}
			p = buf
		}
		if _, err := c.d.WriteAt(p, int64(c.blocks[i].loc)*block.Size); err != nil {
			return fmt.Errorf("write %d metadata blocks at %d: %w", j-i, c.blocks[i].loc, err)
		}
		i = j
	}
	if err := c.d.Flush(); err != nil {
		return fmt.Errorf("flush metadata device: %w", err)
	}
	for _, b := range c.blocks {
		c.cache.Drop(b.loc)
	}
	return nil
}
