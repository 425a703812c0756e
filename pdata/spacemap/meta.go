package spacemap

import (
	"fmt"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/txn"
)

const metaName = "metadata"

// Meta is the space map of the metadata device. It counts itself: its bitmaps, its index block
// and the nodes of both overflow trees are metadata blocks with count 1.
//
// It has the lock of the transaction manager that it serves: changes need it exclusively.
type Meta struct {
	c       Counts
	index   []IndexEntry
	indexAt block.Loc // index block, 0 before the first commit
	over    block.Loc // root of the overflow tree
	tm      *txn.Manager
	tree    *btree.Tree
	cursor  uint64 // where the next search for a free block starts
	limbo   []limbo
	pins    map[*Pin]struct{}
	seq     uint64 // commits so far
}

// A limbo holds blocks that a commit freed but that a pinned state may still read.
type limbo struct {
	seq    uint64
	blocks []uint64
}

// A Pin keeps the blocks of one committed state from being reused.
type Pin struct{ seq uint64 }

func newMeta(tm *txn.Manager, n uint64) *Meta {
	m := &Meta{c: newCounts(metaName), tm: tm, tree: overflowTree(tm), pins: map[*Pin]struct{}{}}
	m.c.grow(n)
	m.index = make([]IndexEntry, nrBitmaps(n))
	return m
}

func nrBitmaps(n uint64) uint64 { return (n + EntriesPerBitmap - 1) / EntriesPerBitmap }

// FormatMeta makes the map of an empty metadata device of n blocks in which block 0, the
// superblock, is in use.
func FormatMeta(tm *txn.Manager, n uint64) (*Meta, error) {
	m := newMeta(tm, n)
	tm.SetSpaceMap(m)
	m.c.load(0, 1)
	for i := range m.index {
		m.c.dirtyBitmaps[uint64(i)] = struct{}{}
	}
	var err error
	m.over, err = m.tree.Empty()
	return m, err
}

// OpenMeta loads the map that root names. deviceBlocks bounds what it may count.
func OpenMeta(tm *txn.Manager, root Root, deviceBlocks uint64) (*Meta, error) {
	if root.NrBlocks > min(deviceBlocks, MaxMetaBlocks) {
		return nil, fmt.Errorf("metadata space map counts %d blocks, the device has %d: %w",
			root.NrBlocks, deviceBlocks, block.ErrCorrupt)
	}
	m := newMeta(tm, root.NrBlocks)
	tm.SetSpaceMap(m)
	m.indexAt, m.over = root.BitmapRoot, root.Overflow
	ib, err := tm.Read(root.BitmapRoot, block.Index)
	if err != nil {
		return nil, fmt.Errorf("metadata space map: %w", err)
	}
	var overflow []uint64
	for i := range m.index {
		m.index[i] = MetaIndexEntry(ib, i)
		b, err := tm.Read(m.index[i].Block, block.Bitmap)
		if err != nil {
			return nil, fmt.Errorf("metadata space map, bitmap %d: %w", i, err)
		}
		overflow = append(overflow, m.c.decodeBitmap(uint64(i), b)...)
	}
	return m, m.c.loadOverflow(btree.Reader{Blocks: tm, ValueSize: overflowSize}, m.over, overflow)
}

// Alloc returns a block with count 1; ErrNoSpace if there is none.
func (m *Meta) Alloc() (block.Loc, error) {
	b, ok := m.c.nextFree(m.cursor, m.c.Len())
	if !ok {
		b, ok = m.c.nextFree(0, m.cursor)
	}
	if !ok {
		return 0, fmt.Errorf("metadata device of %d blocks: %w", m.c.Len(), ErrNoSpace)
	}
	m.cursor = b + 1
	m.c.st[b] = stReserved
	m.c.reserved++
	return block.Loc(b), m.c.Inc(b)
}

// Inc adds a reference.
func (m *Meta) Inc(b block.Loc) error {
	if m.c.Count(uint64(b)) == 0 {
		return m.c.corrupt(uint64(b), "is referred to but not allocated")
	}
	return m.c.Inc(uint64(b))
}

// Dec drops a reference.
func (m *Meta) Dec(b block.Loc) (uint32, error) { return m.c.Dec(uint64(b)) }

// Count is the number of references to b.
func (m *Meta) Count(b block.Loc) uint32 { return m.c.Count(uint64(b)) }

// Grow makes the map count n blocks.
func (m *Meta) Grow(n uint64) {
	m.c.grow(n)
	for i := uint64(len(m.index)); i < nrBitmaps(n); i++ {
		m.index = append(m.index, IndexEntry{})
		m.c.dirtyBitmaps[i] = struct{}{}
	}
}

// Changed reports whether Finish has something to write.
func (m *Meta) Changed() bool { return len(m.c.dirtyBitmaps) > 0 || len(m.c.dirtyOverflow) > 0 }

// Finish is the last change of a transaction: it puts the map itself into blocks. Writing the
// map allocates blocks and frees others, which changes the map; every bitmap, the index block
// and every overflow node moves at most once, so the loop ends. Source: format description,
// section 4.9.
func (m *Meta) Finish() (Root, error) {
	bitmaps := map[uint64][]byte{}
	var index []byte
	for progress := true; progress; {
		progress = false
		if len(m.c.dirtyOverflow) > 0 {
			var err error
			if m.over, err = m.c.writeOverflow(m.tree, m.over); err != nil {
				return Root{}, err
			}
			progress = true
		}
		if index == nil {
			if m.indexAt != 0 {
				if err := m.tm.Dec(m.indexAt); err != nil {
					return Root{}, err
				}
			}
			var err error
			if m.indexAt, index, err = m.tm.Alloc(block.Index); err != nil {
				return Root{}, err
			}
			progress = true
		}
		for _, i := range sortedKeys(m.c.dirtyBitmaps) {
			if bitmaps[i] != nil {
				continue
			}
			if old := m.index[i].Block; old != 0 {
				if err := m.tm.Dec(old); err != nil {
					return Root{}, err
				}
			}
			var err error
			if m.index[i].Block, bitmaps[i], err = m.tm.Alloc(block.Bitmap); err != nil {
				return Root{}, err
			}
			progress = true
		}
	}
	for i, b := range bitmaps {
		e := m.c.encodeBitmap(i, b)
		e.Block = m.index[i].Block
		m.index[i] = e
	}
	for i, e := range m.index {
		e.Encode(index[bitmapHeader+i*IndexEntrySize:])
	}
	clear(m.c.dirtyBitmaps)
	return Root{m.c.Len(), m.c.mapped, m.indexAt, m.over}, nil
}

// CloseTxn ends a transaction and returns what it freed: to be given to Committed.
func (m *Meta) CloseTxn() []uint64 { return m.c.closeTxn() }

// Committed makes the blocks free that a transaction freed, now that its superblock is on the
// medium; blocks that a pinned state may read wait for their pin.
func (m *Meta) Committed(freed []uint64) {
	m.seq++
	m.limbo = append(m.limbo, limbo{m.seq, freed})
	m.release()
}

func (m *Meta) release() {
	oldest := m.seq
	for p := range m.pins {
		oldest = min(oldest, p.seq)
	}
	for len(m.limbo) > 0 && m.limbo[0].seq <= oldest {
		for _, b := range m.limbo[0].blocks {
			m.c.thaw(b)
		}
		m.limbo = m.limbo[1:]
	}
}

// Pin keeps the last committed state readable until Unpin.
func (m *Meta) Pin() *Pin {
	p := &Pin{m.seq}
	m.pins[p] = struct{}{}
	return p
}

// Unpin ends a Pin; a second time it does nothing.
func (m *Meta) Unpin(p *Pin) {
	delete(m.pins, p)
	m.release()
}

// Len is the number of blocks that are counted.
func (m *Meta) Len() uint64 { return m.c.Len() }

// Free is the number of blocks that may be allocated now.
func (m *Meta) Free() uint64 { return m.c.Free() }

// Used is the number of blocks with a count above 0.
func (m *Meta) Used() uint64 { return m.c.mapped }

// Shared is the number of blocks with more than one reference.
func (m *Meta) Shared() uint64 { return m.c.shared }

// Cost bounds the blocks that Finish itself needs if the counts of raised more blocks go up
// beyond 1, and of lowered more go down: all bitmaps, the index block, what changes of the
// overflow tree.
func (m *Meta) Cost(raised, lowered uint64) uint64 {
	return uint64(len(m.index)) + 1 + m.c.overflowCost(raised, lowered)
}
