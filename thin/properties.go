package thin

import (
	"fmt"

	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// DataBlockSize is the length of a data block in bytes.
func (m *Metadata) DataBlockSize() int64 { return int64(m.sb.DataBlockSize) * sectorSize }

// DataBlocks is the length of the data device in data blocks.
func (m *Metadata) DataBlocks() uint64 { return m.data.Space().Total }

// Time is the pool's snapshot counter.
func (m *Metadata) Time() uint32 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sb.Time
}

// TransactionID is the caller's counter as last set, committed or not.
func (m *Metadata) TransactionID() uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sb.TransactionID
}

// SetTransactionID replaces the transaction id if it is old.
func (m *Metadata) SetTransactionID(old, next uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	if m.sb.TransactionID != old {
		return fmt.Errorf("set transaction id %d: it is %d, not %d", next, m.sb.TransactionID, old)
	}
	m.changed = m.changed || next != old
	m.sb.TransactionID = next
	return nil
}

// HeldRoot is the block of the metadata snapshot, 0 if there is none.
func (m *Metadata) HeldRoot() uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return uint64(m.sb.HeldRoot)
}

// NeedsCheck reports whether the pool is marked needs_check.
func (m *Metadata) NeedsCheck() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.sb.Flags&flagNeedsCheck != 0
}

// SetNeedsCheck marks the committed state needs_check at once, in place, whatever the open
// transaction is; later commits keep the mark.
func (m *Metadata) SetNeedsCheck() error { return m.markNeedsCheck(true) }

func (m *Metadata) markNeedsCheck(on bool) error {
	m.commitMu.Lock()
	defer m.commitMu.Unlock()
	if m.readOnly {
		return fmt.Errorf("set needs_check: %w", ErrReadOnly)
	}
	buf := append([]byte(nil), m.committed...)
	sb := DecodeSuperblock(buf)
	if on {
		sb.Flags |= flagNeedsCheck
	} else {
		sb.Flags &^= flagNeedsCheck
	}
	sb.Encode(buf)
	block.Seal(buf, superblockAt, block.Superblock)
	if err := m.writeSuperblock(buf); err != nil {
		return fmt.Errorf("set needs_check: %w", err)
	}
	m.mu.Lock()
	m.committed = buf
	m.csb.Flags, m.sb.Flags = sb.Flags, sb.Flags
	m.mu.Unlock()
	return nil
}

// ClearNeedsCheck takes the mark away, at once. The caller has checked the pool.
func (m *Metadata) ClearNeedsCheck() error { return m.markNeedsCheck(false) }

// Space counts blocks by state, the open transaction included.
type Space struct {
	MetaTotal    uint64 // metadata blocks
	MetaFree     uint64 // may be allocated now
	MetaUsed     uint64 // referred to
	MetaReserve  uint64 // kept back for deletes and discards
	DataTotal    uint64 // data blocks
	DataUsed     uint64 // mapped by some device
	DataReserved uint64 // taken by AllocData, not mapped
	DataFreeing  uint64 // lost their last mapping, not yet free
}

// DataFree is the number of data blocks that AllocData can hand out now.
func (s Space) DataFree() uint64 { return s.DataTotal - s.DataUsed - s.DataReserved - s.DataFreeing }

// Space counts blocks by state.
func (m *Metadata) Space() Space {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d := m.data.Space()
	return Space{m.meta.Len(), m.meta.Free(), m.meta.Used(), m.reserveLocked(), d.Total, d.Mapped, d.Reserved, d.Frozen}
}

// reserveLocked is what only deletes and discards may use: a tenth, as in the kernel, or what the
// smallest delete can cost now, if that is more. That is so in small pools in which much is shared:
// one leaf that is taken apart may change the counts of 252 data blocks, all in different nodes. A
// discard may cost what a write may, so what the last write that was admitted has really cost, some
// nodes of its path, is kept back for the next discard.
func (m *Metadata) reserveLocked() uint64 {
	return max(min(4096, m.meta.Len()/10), m.deleteReserveLocked()+4)
}

// deleteReserveLocked is what only deletes may use. A discard in a leaf that a snapshot shares makes
// the metadata larger, and must not take what the delete of that snapshot needs.
func (m *Metadata) deleteReserveLocked() uint64 {
	least := m.deleteCostOf(1)
	return least + least/16
}

// GrowData makes the pool use blocks data blocks. Shrinking is refused.
func (m *Metadata) GrowData(blocks uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	have := m.data.Space().Total
	if blocks < have {
		return fmt.Errorf("shrink the data device from %d to %d blocks: pools only grow", have, blocks)
	}
	if m.sb.Flags&flagNeedsCheck != 0 {
		return fmt.Errorf("grow the data device: %w", ErrNeedsCheck)
	}
	// A new bitmap needs its own block and its share of the index tree.
	more := (blocks - have + spacemap.EntriesPerBitmap - 1) / spacemap.EntriesPerBitmap
	what := fmt.Sprintf("grow the data device from %d to %d blocks", have, blocks)
	if err := m.admitLocked(what, more+more/28+8, false, true); err != nil {
		return err
	}
	if blocks > have {
		m.data.Grow(blocks)
		m.changed = true
	}
	return nil
}

// GrowMetadata makes the pool use all of its metadata device, which has grown.
func (m *Metadata) GrowMetadata() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	n, have := min(uint64(m.d.Size()/block.Size), spacemap.MaxMetaBlocks), m.meta.Len()
	if n < have {
		return fmt.Errorf("shrink the metadata device from %d to %d blocks: pools only grow", have, n)
	}
	if m.sb.Flags&flagNeedsCheck != 0 {
		return fmt.Errorf("grow the metadata device: %w", ErrNeedsCheck)
	}
	if n > have {
		m.meta.Grow(n)
		m.changed = true
	}
	return nil
}
