package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"

	"mica/pdata/btree"
)

// A Compaction lowers the pool's time, and with it every time in the pool, so that all that is ever
// compared compares as before: mappings with the times at which devices were made and last
// snapshotted, these with each other and with the pool's time. Such times become their ranks, and
// the time of a mapping the rank of the last of them that is not after it.
//
//	Compact   takes the times of all devices
//	Step      gives a bounded number of leaves their new times; to be committed now and then
//	Finish    gives the devices and the pool theirs, in one transaction
//
// New times are never above the old ones. So in between, and for good if there is a crash, a mapping
// may look older than it is: a block that a device has for itself is taken for shared, and copied
// once more than need be; never the other way round. What devices share stays shared.
//
// Nobody inserts mappings between Compact and Finish; the caller keeps writers away.
type Compaction struct {
	m         *Metadata
	ranks     []uint32 // times of devices and of the pool when it began, ascending, without 0
	began     uint32   // the pool's time then
	w         *btree.Rewriter
	id        DevID   // device under way
	d         *device // the same; nil: none
	at        uint64  // where to go on in it
	disturbed bool
	ended     bool
	after     []uint32 // at the end: ranks, and the times of snapshots since
}

// Compact begins a compaction. Refused while a metadata snapshot is held, whose times would be of
// the future, and if it would gain nothing (ErrTime).
func (m *Metadata) Compact() (*Compaction, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.writableLocked(); err != nil {
		return nil, fmt.Errorf("compact the pool's time: %w", err)
	}
	if m.compact != nil {
		return nil, errors.New("compact the pool's time: it is being done already")
	}
	if m.sb.HeldRoot != 0 {
		return nil, fmt.Errorf("compact the pool's time: a metadata snapshot is held, release it first: %w", ErrExists)
	}
	c := &Compaction{m: m, began: m.sb.Time, ranks: m.timesLocked(0)}
	if n := uint32(len(c.ranks)); n >= m.sb.Time {
		return nil, fmt.Errorf("compact the pool's time: %d times are in use, it is %d: %w", n, m.sb.Time, ErrTime)
	}
	c.w = m.bottom.NewRewriter(m.meta.Len(), func(v []byte) {
		x := UnpackMapping(binary.LittleEndian.Uint64(v))
		x.Time = rank(c.ranks, x.Time)
		binary.LittleEndian.PutUint64(v, x.Pack())
	})
	for _, d := range m.devs {
		d.compacted = false
	}
	m.compact = c
	m.tm.OnFree(c.w.Forget)
	return c, nil
}

// timesLocked lists the times of devices and of the pool that are above after, ascending.
func (m *Metadata) timesLocked(after uint32) []uint32 {
	all := map[uint32]struct{}{m.sb.Time: {}}
	for _, d := range m.devs {
		all[d.CreationTime], all[d.SnapshottedTime] = struct{}{}, struct{}{}
	}
	var list []uint32
	for t := range all {
		if t > after {
			list = append(list, t)
		}
	}
	slices.Sort(list)
	return list
}

// rank is the number of times in list that are not above t.
func rank(list []uint32, t uint32) uint32 {
	return uint32(sort.Search(len(list), func(i int) bool { return list[i] > t }))
}

// Step rewrites up to so many leaves, less when metadata blocks are short, and reports whether all
// are done. Every state in between may be committed, and must be now and then: leaves that were
// rewritten free their old places with the commit. ErrNoMetaSpace if nothing can be done before
// that.
func (c *Compaction) Step(leaves int) (done bool, err error) {
	m := c.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.usableLocked(); err != nil {
		return false, err
	}
	if c.d == nil || m.devs[c.id] != c.d { // the first one, or it was deleted
		if !c.nextLocked() {
			return true, nil
		}
	}
	d := c.d
	for !m.fitsLocked(m.rewriteCostLocked(leaves), levelAny) {
		if leaves /= 4; leaves == 0 {
			return false, fmt.Errorf("compact the pool's time: %d metadata blocks free, up to %d needed: %w", m.meta.Free(), m.rewriteCostLocked(1), ErrNoMetaSpace)
		}
	}
	m.changed = true
	fail := func(err error) error { return m.failLocked(fmt.Errorf("compact the times of thin %d: %w", c.id, err)) }
	if m.sb.MappingRoot, err = m.top.Touch(m.sb.MappingRoot, uint64(c.id)); err != nil {
		return false, fail(err)
	}
	root, next, whole, err := c.w.Step(d.root, c.at, leaves)
	if err == nil {
		err = m.setRootLocked(c.id, d, root)
	}
	if err != nil {
		return false, fail(err)
	}
	if c.at, d.compacted = next, whole; whole {
		return !c.nextLocked(), nil
	}
	return false, nil
}

func (c *Compaction) usableLocked() error {
	switch err := c.m.writableLocked(); {
	case err != nil:
		return fmt.Errorf("compact the pool's time: %w", err)
	case c.ended:
		return errors.New("compact the pool's time: it has ended")
	}
	return nil
}

// nextLocked chooses the next device that is to be rewritten.
func (c *Compaction) nextLocked() bool {
	for _, id := range c.m.sortedIDsLocked() {
		if d := c.m.devs[id]; !d.compacted {
			c.id, c.d, c.at = id, d, 0
			return true
		}
	}
	c.d = nil
	return false
}

// Finish gives the devices and the pool their new times, in the open transaction, and ends the
// compaction. All steps are done.
func (c *Compaction) Finish() error {
	m := c.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.usableLocked(); err != nil {
		return err
	}
	if c.disturbed || c.nextLocked() {
		return errors.New("compact the pool's time: mappings were inserted meanwhile, or not all steps are done")
	}
	c.after = append(slices.Clone(c.ranks), m.timesLocked(c.began)...)
	// Details of every device change; the nodes are those of the whole tree.
	n := uint64(len(m.devs)) + 1
	if err := m.admitLocked("compact the pool's time", btree.MaxNew(n, n, detailsSize), false, true); err != nil {
		return err
	}
	m.changed = true
	for id, d := range m.devs {
		d.CreationTime, d.SnapshottedTime = rank(c.after, d.CreationTime), rank(c.after, d.SnapshottedTime)
		d.newest = rank(c.after, d.newest)
		m.dirty[id] = struct{}{}
	}
	m.sb.Time = rank(c.after, m.sb.Time)
	c.endLocked()
	return nil
}

// Time is what a time has become. Valid after Finish.
func (c *Compaction) Time(old uint32) uint32 { return rank(c.after, old) }

// End gives a compaction up that has not been finished; after that it does nothing.
func (c *Compaction) End() {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.endLocked()
}

func (c *Compaction) endLocked() {
	if !c.ended {
		c.ended = true
		c.m.compact = nil
		c.m.tm.OnFree(nil)
	}
}

// rewriteCostLocked bounds the metadata blocks that a step of so many leaves and the commit need:
// the new leaves, the nodes above them, and the counts of all that shared nodes point at. When the
// last tree leaves a node, everything below it may go at once; that lowers counts.
func (m *Metadata) rewriteCostLocked(leaves int) uint64 {
	levels := btree.Levels(m.mapped, leafMin)
	n := uint64(leaves)
	nodes := n + n/(leafMin-1) + 2*(levels+1) + btree.MaxNew(uint64(len(m.devs))+1, 1, 8)
	counted := (nodes + 1) * leafEntries
	cost := nodes + m.data.Cost(counted) + m.data.LowerCost(m.data.Space().Total) + m.meta.Cost(counted, m.meta.Len())
	if p := uint64(m.promised.Load()); p > 0 {
		cost += m.changesCostLocked(p, true)
	}
	return cost
}

// CompactAll does a whole compaction of a pool that nobody else changes: steps, with a commit after
// each, and the end. sync, which may be nil, makes the data device durable.
func (m *Metadata) CompactAll(sync func() error) error {
	c, err := m.Compact()
	if err != nil {
		return err
	}
	defer c.End()
	for done := false; !done; {
		if done, err = c.Step(compactLeaves); err != nil {
			return err
		}
		if done {
			err = c.Finish()
		}
		if err == nil {
			_, err = m.Commit(sync)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// compactLeaves is a good number of leaves for a step: one megabyte of metadata.
const compactLeaves = 256
