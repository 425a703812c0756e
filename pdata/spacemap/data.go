package spacemap

import (
	"fmt"
	"sync"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/txn"
)

// Data is the space map of the data device, and the allocator of data blocks.
//
// A block goes from free to reserved (Alloc), to mapped (Inc), to frozen (the Dec that drops its
// last reference) and back to free (Thaw, after the commit). Only mapped blocks are counted on
// the medium.
//
// Safe for concurrent use; Finish and Grow also need the transaction manager's exclusive lock.
type Data struct {
	mu    sync.Mutex
	c     Counts       // guarded by mu
	index []IndexEntry // guarded by the manager's lock
	root  block.Loc    // index tree; guarded by the manager's lock
	over  block.Loc    // overflow tree; guarded by the manager's lock

	tm       *txn.Manager
	idxTree  *btree.Tree
	overTree *btree.Tree
}

func newData(tm *txn.Manager, n uint64) *Data {
	d := &Data{c: newCounts("data"), tm: tm, overTree: overflowTree(tm),
		idxTree: btree.New(tm, btree.ValueType{Size: IndexEntrySize})}
	d.c.grow(n)
	d.index = make([]IndexEntry, nrBitmaps(n))
	return d
}

// FormatData makes the map of n free data blocks.
func FormatData(tm *txn.Manager, n uint64) (*Data, error) {
	d := newData(tm, n)
	for i := range d.index {
		d.c.dirtyBitmaps[uint64(i)] = struct{}{}
	}
	var err error
	if d.root, err = d.idxTree.Empty(); err != nil {
		return nil, err
	}
	d.over, err = d.overTree.Empty()
	return d, err
}

// maxDataBlocks bounds what a superblock may claim before memory is set aside: 2 bytes each.
const maxDataBlocks = 1 << 34

// OpenData loads the map that root names.
func OpenData(tm *txn.Manager, root Root) (*Data, error) {
	if root.NrBlocks > maxDataBlocks {
		return nil, fmt.Errorf("data space map counts %d blocks, more than %d: %w", root.NrBlocks, uint64(maxDataBlocks), block.ErrCorrupt)
	}
	// The index is read before memory is set aside for the counts: a wrong number of blocks
	// shows as a missing bitmap.
	var index []IndexEntry
	var bad error
	r := btree.Reader{Blocks: tm, ValueSize: IndexEntrySize}
	err := r.Walk(root.BitmapRoot, 0, func(k uint64, v []byte) bool {
		if k != uint64(len(index)) {
			bad = fmt.Errorf("data space map: bitmap %d is missing from the index: %w", len(index), block.ErrCorrupt)
			return false
		}
		index = append(index, DecodeIndexEntry(v))
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("data space map index: %w", err)
	}
	if bad == nil && uint64(len(index)) != nrBitmaps(root.NrBlocks) {
		bad = fmt.Errorf("data space map: %d bitmaps for %d blocks: %w", len(index), root.NrBlocks, block.ErrCorrupt)
	}
	if bad != nil {
		return nil, bad
	}
	d := newData(tm, root.NrBlocks)
	d.index, d.root, d.over = index, root.BitmapRoot, root.Overflow
	var overflow []uint64
	for i, e := range index {
		b, err := tm.Read(e.Block, block.Bitmap)
		if err != nil {
			return nil, fmt.Errorf("data space map, bitmap %d: %w", i, err)
		}
		overflow = append(overflow, d.c.decodeBitmap(uint64(i), b)...)
	}
	return d, d.c.loadOverflow(btree.Reader{Blocks: tm, ValueSize: overflowSize}, d.over, overflow)
}

// searchRuns bounds how many runs that are too short Alloc looks at before it takes the best.
const searchRuns = 32

// Alloc reserves up to want neighbouring free blocks, at or after hint where it can, and
// returns the first one and how many; 0 when no block is free. No I/O.
func (d *Data) Alloc(hint, want uint64) (begin, n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if want == 0 || d.c.Free() == 0 {
		return 0, 0
	}
	total := d.c.Len()
	if hint >= total {
		hint = 0
	}
	at, end, wrapped := hint, total, false
	for seen := 0; seen < searchRuns; {
		b, ok := d.c.nextFree(at, end)
		if !ok {
			if wrapped || hint == 0 {
				break
			}
			at, end, wrapped = 0, hint, true
			continue
		}
		l := d.c.runFree(b, want)
		if l > n {
			begin, n = b, l
		}
		if l == want {
			break
		}
		seen++
		at = b + l
	}
	for i := begin; i < begin+n; i++ {
		d.c.st[i] = stReserved
	}
	d.c.reserved += n
	return begin, n
}

// Unreserve makes reserved blocks free again.
func (d *Data) Unreserve(begin, n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for b := begin; b < begin+n && b < d.c.Len(); b++ {
		if d.c.st[b] == stReserved {
			d.c.st[b] = 0
			d.c.reserved--
		}
	}
}

// Take reserves block b if it is free, and reports whether it was.
func (d *Data) Take(b uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b >= d.c.Len() || d.c.st[b] != 0 {
		return false
	}
	d.c.st[b] = stReserved
	d.c.reserved++
	return true
}

// Thaw makes frozen blocks free, after the commit that freed them and whatever else had to
// come before.
func (d *Data) Thaw(begin, n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for b := begin; b < begin+n && b < d.c.Len(); b++ {
		d.c.thaw(b)
	}
}

// Map gives a reserved block its first reference.
func (d *Data) Map(b uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b < d.c.Len() && d.c.st[b] != stReserved {
		return d.c.corrupt(b, "is to be mapped but was not allocated")
	}
	return d.c.Inc(b)
}

// Refer adds a reference to a block in whatever state it is: a pool is being rebuilt and its
// mappings say which blocks are used.
func (d *Data) Refer(b uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b < d.c.Len() && d.c.st[b] == 0 {
		d.c.st[b] = stReserved
		d.c.reserved++
	}
	return d.c.Inc(b)
}

// Inc adds a reference to a mapped or reserved block.
func (d *Data) Inc(b uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.c.Inc(b)
}

// Dec drops a reference; the last one freezes the block.
func (d *Data) Dec(b uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.c.Dec(b)
	return err
}

// Count is the number of references to b.
func (d *Data) Count(b uint64) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.c.Count(b)
}

// Grow makes the map count n blocks.
func (d *Data) Grow(n uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.c.grow(n)
	for i := uint64(len(d.index)); i < nrBitmaps(n); i++ {
		d.index = append(d.index, IndexEntry{})
		d.c.dirtyBitmaps[i] = struct{}{}
	}
}

// Finish puts the map into blocks of the open transaction and returns its root.
func (d *Data) Finish() (Root, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var err error
	if d.over, err = d.c.writeOverflow(d.overTree, d.over); err != nil {
		return Root{}, err
	}
	var v [IndexEntrySize]byte
	for _, i := range sortedKeys(d.c.dirtyBitmaps) {
		if old := d.index[i].Block; old != 0 {
			if err := d.tm.Dec(old); err != nil {
				return Root{}, err
			}
		}
		loc, b, err := d.tm.Alloc(block.Bitmap)
		if err != nil {
			return Root{}, err
		}
		e := d.c.encodeBitmap(i, b)
		e.Block = loc
		d.index[i] = e
		e.Encode(v[:])
		if d.root, _, err = d.idxTree.Insert(d.root, i, v[:]); err != nil {
			return Root{}, err
		}
	}
	clear(d.c.dirtyBitmaps)
	return Root{d.c.Len(), d.c.mapped, d.root, d.over}, nil
}

// CloseTxn ends a transaction and returns the blocks that it froze, in no order.
func (d *Data) CloseTxn() []uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.c.closeTxn()
}

// Changed reports whether Finish has something to write.
func (d *Data) Changed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.c.dirtyBitmaps) > 0 || len(d.c.dirtyOverflow) > 0
}

// DataSpace is a look at the counts of blocks by state.
type DataSpace struct{ Total, Mapped, Reserved, Frozen uint64 }

// Space counts the blocks by state.
func (d *Data) Space() DataSpace {
	d.mu.Lock()
	defer d.mu.Unlock()
	return DataSpace{d.c.Len(), d.c.mapped, d.c.reserved, d.c.frozen}
}

// Cost bounds the metadata blocks that Finish needs if the counts of changed more blocks change.
func (d *Data) Cost(changed uint64) uint64 { return d.cost(changed, 0) }

// LowerCost bounds the same if the counts of lowered more blocks go down.
func (d *Data) LowerCost(lowered uint64) uint64 { return d.cost(0, lowered) }

func (d *Data) cost(raised, lowered uint64) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := uint64(len(d.index))
	bitmaps := min(raised+lowered+uint64(len(d.c.dirtyBitmaps)), n)
	return bitmaps + btree.MaxNew(n, bitmaps, IndexEntrySize) + d.c.overflowCost(raised, lowered)
}
