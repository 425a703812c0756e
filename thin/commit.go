package thin

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"mica/pdata/block"
	"mica/pdata/spacemap"
	"mica/pdata/txn"
)

// A Commit is a closed transaction on its way to the medium.
type Commit struct {
	m         *Metadata
	closed    *txn.Closed
	buf       []byte // the superblock, sealed
	metaFreed []uint64
	dataFreed []uint64
	written   bool
	done      bool
}

// Changed reports whether the open transaction has anything to commit.
func (m *Metadata) Changed() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.changed
}

// Prepare closes the open transaction and opens the next one, in memory. Changes may go on at
// once; they belong to the next one. The caller makes the commit complete (WriteBlocks,
// WriteSuperblock, or Cancel) before anybody can prepare another.
func (m *Metadata) Prepare() (*Commit, error) {
	m.commitMu.Lock()
	c, err := m.prepare()
	if err != nil {
		m.commitMu.Unlock()
	}
	return c, err
}

func (m *Metadata) prepare() (*Commit, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return nil, err
	}
	var v [detailsSize]byte
	for _, id := range slices.Sorted(maps.Keys(m.dirty)) {
		m.devs[id].encode(v[:])
		var err error
		if m.sb.DetailsRoot, _, err = m.details.Insert(m.sb.DetailsRoot, uint64(id), v[:]); err != nil {
			return nil, m.failLocked(fmt.Errorf("commit: details of device %d: %w", id, err))
		}
	}
	clear(m.dirty)
	var err error
	if m.sb.DataMap, err = m.data.Finish(); err != nil {
		return nil, m.failLocked(fmt.Errorf("commit: data space map: %w", err))
	}
	if m.sb.MetaMap, err = m.meta.Finish(); err != nil {
		return nil, m.failLocked(fmt.Errorf("commit: metadata space map: %w", err))
	}
	c := &Commit{m: m, buf: append([]byte(nil), m.committed...)}
	m.sb.Encode(c.buf)
	block.Seal(c.buf, superblockAt, block.Superblock)
	c.closed = m.tm.Close()
	c.metaFreed, c.dataFreed = m.meta.CloseTxn(), m.data.CloseTxn()
	m.changed = false
	return c, nil
}

// end lets the next commit begin.
func (c *Commit) end() {
	if !c.done {
		c.done = true
		c.m.commitMu.Unlock()
	}
}

// fail makes an error final.
func (c *Commit) fail(err error) error {
	c.m.Fail(err)
	c.end()
	return err
}

// Cancel gives the commit up because something beside it failed: final, like any failed commit.
func (c *Commit) Cancel(err error) {
	if !c.done {
		c.fail(err)
	}
}

// WriteBlocks writes everything but the superblock and flushes. An error is final: the commit
// is given up and the metadata refuses later changes.
func (c *Commit) WriteBlocks() error {
	if err := c.closed.Write(); err != nil {
		return c.fail(fmt.Errorf("commit: %w", err))
	}
	c.written = true
	return nil
}

// WriteSuperblock makes the commit durable. It must not be called before WriteBlocks and the
// sync of the data device are done. An error is final.
func (c *Commit) WriteSuperblock() error {
	if !c.written {
		panic("thin: superblock written before the blocks it refers to")
	}
	m := c.m
	if err := m.writeSuperblock(c.buf); err != nil {
		return c.fail(fmt.Errorf("commit: %w", err))
	}
	m.mu.Lock()
	m.committed = c.buf
	m.csb = DecodeSuperblock(c.buf)
	m.meta.Committed(c.metaFreed)
	m.mu.Unlock()
	c.end()
	return nil
}

func (m *Metadata) writeSuperblock(buf []byte) error {
	if _, err := m.d.WriteAt(buf, 0); err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	if err := m.d.Flush(); err != nil {
		return fmt.Errorf("flush superblock: %w", err)
	}
	return nil
}

// Superblock is the one that the commit writes.
func (c *Commit) Superblock() Superblock { return DecodeSuperblock(c.buf) }

// Freed returns the data blocks that lost their last mapping in this transaction, each once, in no
// order. Once the commit is durable, and readers that began before are done, they are given to
// ReleaseData, as RunsOf has them.
func (c *Commit) Freed() []uint64 { return c.dataFreed }

// RunsOf joins blocks, each of which is there once, to runs, ascending. There may be millions, for
// which it takes a while.
func RunsOf[B ~uint64](blocks []B) []DataRun {
	// What is freed together lies together: few runs are to be sorted.
	var runs []DataRun
	for _, b := range blocks {
		if n := len(runs); n > 0 && runs[n-1].End() == DataBlock(b) {
			runs[n-1].Len++
		} else {
			runs = append(runs, DataRun{DataBlock(b), 1})
		}
	}
	slices.SortFunc(runs, func(a, b DataRun) int { return cmp.Compare(a.Begin, b.Begin) })
	kept := runs[:0]
	for _, r := range runs {
		if n := len(kept); n > 0 && kept[n-1].End() == r.Begin {
			kept[n-1].Len += r.Len
		} else {
			kept = append(kept, r)
		}
	}
	return kept
}

// Commit does all parts in order. sync, which may be nil, makes the data device durable.
func (m *Metadata) Commit(sync func() error) ([]DataRun, error) {
	c, err := m.Prepare()
	if err != nil {
		return nil, err
	}
	if sync != nil {
		if err := sync(); err != nil {
			c.Cancel(err)
			return nil, err
		}
	}
	if err := c.WriteBlocks(); err != nil {
		return nil, err
	}
	if err := c.WriteSuperblock(); err != nil {
		return nil, err
	}
	return RunsOf(c.Freed()), nil
}

// ReserveMetadataSnap keeps the committed trees readable for others: a copy of the superblock
// with its roots, named by the held root. The open transaction must be empty (commit first);
// the caller commits afterwards.
func (m *Metadata) ReserveMetadataSnap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	if m.sb.HeldRoot != 0 {
		return fmt.Errorf("reserve metadata snapshot: block %d is held: %w", m.sb.HeldRoot, ErrExists)
	}
	if m.changed {
		return fmt.Errorf("reserve metadata snapshot: there are uncommitted changes")
	}
	if err := m.admitLocked("reserve metadata snapshot", 1, true, false); err != nil {
		return err
	}
	m.changed = true
	loc, buf, err := m.tm.Alloc(block.Superblock)
	if err != nil {
		return m.failLocked(err)
	}
	copy(buf, m.committed)
	cp := m.sb
	cp.HeldRoot, cp.Block = 0, loc
	cp.DataMap, cp.MetaMap = spacemap.Root{}, spacemap.Root{}
	cp.Encode(buf)
	for _, root := range []block.Loc{m.sb.MappingRoot, m.sb.DetailsRoot} {
		if err := m.tm.Inc(root); err != nil {
			return m.failLocked(err)
		}
	}
	m.sb.HeldRoot = loc
	return nil
}

// ReleaseMetadataSnap drops the metadata snapshot; the caller commits afterwards.
func (m *Metadata) ReleaseMetadataSnap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return err
	}
	if m.sb.HeldRoot == 0 {
		return fmt.Errorf("release metadata snapshot: none is held: %w", ErrNotFound)
	}
	buf, err := m.tm.Read(m.sb.HeldRoot, block.Superblock)
	if err != nil {
		return fmt.Errorf("release metadata snapshot: %w", err)
	}
	cp := DecodeSuperblock(buf)
	if need := m.releaseCostLocked(); !m.fitsLocked(need, levelDelete) {
		return fmt.Errorf("release metadata snapshot: %d metadata blocks free, up to %d needed: %w", m.meta.Free(), need, ErrNoMetaSpace)
	}
	m.changed = true
	if err := m.top.Release(cp.MappingRoot); err != nil {
		return m.failLocked(fmt.Errorf("release metadata snapshot: %w", err))
	}
	if err := m.details.Release(cp.DetailsRoot); err != nil {
		return m.failLocked(fmt.Errorf("release metadata snapshot: %w", err))
	}
	if err := m.tm.Dec(m.sb.HeldRoot); err != nil {
		return m.failLocked(err)
	}
	m.sb.HeldRoot = 0
	return nil
}

func putLoc(b []byte, l block.Loc) { binary.LittleEndian.PutUint64(b, uint64(l)) }
