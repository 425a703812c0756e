package thin

import (
	"encoding/binary"
	"fmt"

	"mica/pdata/block"
	"mica/pdata/btree"
)

// rawTop is the top level as plain numbers, for entries whose tree is gone already.
func (m *Metadata) rawTop() *btree.Tree {
	return btree.New(m.tm, btree.ValueType{Size: 8,
		Inc: func(v []byte) error { return m.tm.Inc(block.Loc(binary.LittleEndian.Uint64(v))) }})
}

// Lookup returns where a virtual block lives, as of the open transaction.
func (m *Metadata) Lookup(id DevID, vb VBlock) (Mapping, bool, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.deviceLocked(id)
	if err != nil {
		return Mapping{}, false, err
	}
	v, ok, err := m.bottom.Lookup(d.root, uint64(vb))
	if err != nil || !ok {
		return Mapping{}, false, err
	}
	return UnpackMapping(binary.LittleEndian.Uint64(v)), true, nil
}

// LookupRange calls fn for every mapping in [begin, end), ascending, as of the open
// transaction, until fn returns false. fn must not call back into m.
func (m *Metadata) LookupRange(id DevID, begin, end VBlock, fn func(Entry) bool) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, err := m.deviceLocked(id)
	if err != nil {
		return err
	}
	return walkMappings(btree.Reader{Blocks: m.tm, ValueSize: 8}, d.root, begin, end, fn)
}

func walkMappings(r btree.Reader, root block.Loc, begin, end VBlock, fn func(Entry) bool) error {
	return r.Walk(root, uint64(begin), func(k uint64, v []byte) bool {
		return VBlock(k) < end && fn(Entry{VBlock(k), UnpackMapping(binary.LittleEndian.Uint64(v))})
	})
}

// changeLocked readies a device for a change of its mappings: the path to its entry in the top
// level is made the transaction's own, so that a tree shared with the metadata snapshot counts
// as shared.
func (m *Metadata) changeLocked(id DevID) (*device, error) {
	if err := m.writableLocked(); err != nil {
		return nil, err
	}
	d, err := m.deviceLocked(id)
	if err != nil {
		return nil, err
	}
	m.changed = true
	if m.sb.MappingRoot, err = m.top.Touch(m.sb.MappingRoot, uint64(id)); err != nil {
		return nil, m.failLocked(fmt.Errorf("thin %d: %w", id, err))
	}
	return d, nil
}

// Insert maps entries, which are ascending and distinct. Each data block was taken by AllocData
// and is not mapped yet: its reservation becomes a reference. What was mapped before loses
// one. The times are stored as given.
func (m *Metadata) Insert(id DevID, entries []Entry) error {
	if len(entries) == 0 {
		return nil
	}
	keys := make([]uint64, len(entries))
	for i, e := range entries {
		if i > 0 && e.VBlock <= entries[i-1].VBlock {
			return fmt.Errorf("thin %d: insert: virtual block %d after %d", id, e.VBlock, entries[i-1].VBlock)
		}
		keys[i] = uint64(e.VBlock)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range entries {
		if e.Time > m.sb.Time {
			return fmt.Errorf("thin %d: insert: time %d is in the future, the pool's is %d", id, e.Time, m.sb.Time)
		}
	}
	d, err := m.changeLocked(id)
	if err != nil {
		return err
	}
	if m.compact != nil {
		m.compact.disturbed = true
	}
	for _, e := range entries {
		if err := m.data.Map(uint64(e.Block)); err != nil {
			return m.failLocked(fmt.Errorf("thin %d: map block %d: %w", id, e.VBlock, err))
		}
		d.newest = max(d.newest, e.Time)
	}
	var v [8]byte
	root, inserted, err := m.bottom.InsertSorted(d.root, keys, func(i int) []byte {
		binary.LittleEndian.PutUint64(v[:], entries[i].Pack())
		return v[:]
	})
	if err == nil {
		err = m.setRootLocked(id, d, root)
	}
	if err != nil {
		return m.failLocked(fmt.Errorf("thin %d: insert %d mappings at %d: %w", id, len(entries), entries[0].VBlock, err))
	}
	d.MappedBlocks += uint64(inserted)
	m.mapped += uint64(inserted)
	m.redeemLocked(len(entries))
	m.dirty[id] = struct{}{}
	return nil
}

// Remove unmaps what is mapped in [begin, end), at most limit mappings a call (0: all). It
// returns how many went and where to go on; done says that nothing is left.
func (m *Metadata) Remove(id DevID, begin, end VBlock, limit int) (removed int, next VBlock, done bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.changeLocked(id)
	if err != nil {
		return 0, begin, false, err
	}
	root, removed, n, done, err := m.bottom.RemoveRange(d.root, uint64(begin), uint64(end), limit)
	if err == nil {
		err = m.setRootLocked(id, d, root)
	}
	if err != nil {
		return removed, VBlock(n), false, m.failLocked(fmt.Errorf("thin %d: unmap blocks [%d, %d): %w", id, begin, end, err))
	}
	m.unmappedLocked(d, uint64(removed))
	m.redeemLocked(removed)
	if removed > 0 {
		m.dirty[id] = struct{}{}
	}
	return removed, VBlock(n), done, nil
}

// AllocData reserves up to want neighbouring free data blocks, at or after hint where it can.
// ok is false when none is free. Reserved blocks are not counted on the medium. No I/O.
func (m *Metadata) AllocData(hint DataBlock, want uint64) (run DataRun, ok bool) {
	b, n := m.data.Alloc(uint64(hint), want)
	return DataRun{DataBlock(b), n}, n > 0
}

// TakeData reserves one given data block and reports whether it was free: for who knows from
// elsewhere what a block holds.
func (m *Metadata) TakeData(b DataBlock) bool { return m.data.Take(uint64(b)) }

// UnreserveData gives reserved blocks back that were never mapped; they are free at once.
func (m *Metadata) UnreserveData(r DataRun) { m.data.Unreserve(uint64(r.Begin), r.Len) }

// ReleaseData makes blocks free that a commit has returned as freed.
func (m *Metadata) ReleaseData(r DataRun) { m.data.Thaw(uint64(r.Begin), r.Len) }
