package thin

import (
	"fmt"

	"mica/pdata/btree"
)

// Admission keeps a commit from ever running out of metadata blocks: a change is taken on only
// if the worst that it, and everything taken on before it, can cost still fits.
//
// The bounds count new nodes that are alive, for an old node stays where it is until the
// commit, whatever happens to its copy. The new nodes of a tree are nodes of that tree, so a
// tree of so many entries at minimum fill is one bound; the path of each change with its
// neighbours is the other.
//
// Copying a shared node raises the counts of all it points at: 252 data blocks or 252 nodes,
// whose bitmaps and overflow entries then change. That is the bulk of the worst case, and is
// left out when nothing is shared.

// CanAdmit reports whether n changes of mappings (each one mapping inserted, replaced or
// removed) that are not in the trees yet could be committed in the worst case; n counts all of
// them, not what is added. If so, they are promised: devices are created and deleted only as
// far as that leaves the promise in force. Deletes and discards may use the reserve.
func (m *Metadata) CanAdmit(n int, reserve bool) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if !m.fitsLocked(m.changesCostLocked(uint64(n), m.meta.Shared() > 0), discardIf(reserve)) {
		return false
	}
	m.promised.Store(int64(n))
	return true
}

// redeemLocked takes n changes off the promise: they are in the trees.
func (m *Metadata) redeemLocked(n int) {
	m.promised.Store(max(0, m.promised.Load()-int64(n)))
}

// A level says how much of the metadata blocks that are free an operation may use.
type level int

const (
	levelAny     level = iota // not what deletes and discards need
	levelDiscard              // not what deletes need
	levelDelete               // all
)

func discardIf(reserve bool) level {
	if reserve {
		return levelDiscard
	}
	return levelAny
}

func (m *Metadata) fitsLocked(need uint64, l level) bool {
	free := m.meta.Free()
	if free < need {
		return false
	}
	switch l {
	case levelAny:
		need += m.reserveLocked()
	case levelDiscard:
		need += m.deleteReserveLocked()
	}
	return free >= need
}

// admitLocked refuses an operation that cannot be committed in the worst case, together with
// the promised changes. extra blocks are needed beside those of one change; sharing says that
// there are, or will be, shared nodes.
func (m *Metadata) admitLocked(what string, extra uint64, sharing, reserve bool) error {
	n := uint64(m.promised.Load()) + 1
	need := m.changesCostLocked(n, sharing || m.meta.Shared() > 0) + extra
	if m.fitsLocked(need, discardIf(reserve)) {
		return nil
	}
	return fmt.Errorf("%s: %d metadata blocks free, up to %d needed: %w", what, m.meta.Free(), need, ErrNoMetaSpace)
}

// leafEntries is the capacity of the nodes of mapping trees, leafMin their minimum fill.
const (
	leafEntries = (4096 - 32) / 16 / 3 * 3
	leafMin     = leafEntries / 3
)

// changesCostLocked bounds the metadata blocks that n more changes of mappings, one of which may
// create a device, and the commit need.
func (m *Metadata) changesCostLocked(n uint64, sharing bool) uint64 {
	devs := uint64(len(m.devs)) + 1
	touched := min(n, devs)
	// The device tree and the details: an entry of each device that is touched.
	top := btree.MaxNew(devs, touched, 8)
	det := btree.MaxNew(devs, touched+uint64(len(m.dirty)), detailsSize)

	// The mapping trees of all devices as one: a change needs its leaf and one neighbour, and
	// the same on the levels above.
	all := m.mapped + n
	allLeaves := all/leafMin + touched
	leaves := min(2*n, allLeaves)
	inner := min((2*n)*btree.Levels(all, leafMin)+n, allLeaves/(leafMin-1)+touched) + 2*btree.Levels(all, leafMin)

	changed, raised := 2*n, uint64(0)
	if sharing {
		changed += leaves * leafEntries
		raised = (inner+top)*leafEntries + leaves
	}
	return top + det + leaves + inner + m.data.Cost(min(changed, m.data.Space().Mapped+2*n)) + m.meta.Cost(raised, 0)
}

// deleteCostLocked bounds the metadata blocks that a step of DeleteStep with so many leaves and
// the commit need, beside what is promised. Counts of data blocks only go down; with budget 0 none
// does.
func (m *Metadata) deleteCostLocked(budget int) uint64 {
	cost := m.deleteCostOf(budget)
	if n := uint64(m.promised.Load()); n > 0 {
		cost += m.changesCostLocked(n, m.meta.Shared() > 0)
	}
	return cost
}

// deleteCostOf is that without what is promised.
func (m *Metadata) deleteCostOf(budget int) uint64 {
	devs, levels := uint64(len(m.devs)), btree.Levels(m.mapped, leafMin)
	path := btree.MaxNew(devs, 1, 8) + btree.MaxNew(devs, 1, detailsSize) + 2*levels + 2
	counts := uint64(0)
	if budget > 0 {
		counts = uint64(budget+1) * leafEntries
	}
	return path + m.data.LowerCost(counts) + m.meta.Cost((path+1)*leafEntries, counts)
}

// releaseCostLocked bounds what releasing the metadata snapshot and the commit need.
func (m *Metadata) releaseCostLocked() uint64 {
	cost := m.data.LowerCost(m.data.Space().Total) + m.meta.Cost(0, m.meta.Len())
	if n := uint64(m.promised.Load()); n > 0 {
		cost += m.changesCostLocked(n, true)
	}
	return cost
}
