package user

import (
	"fmt"
	"math/bits"
	"slices"

	"mica/journal"
	"mica/thin"
)

// applyBatch bounds the mappings that enter a tree under one lock of the metadata.
const applyBatch = 256

// record makes val (a packed mapping, or absent) the entry of vb, and with neighbouring data blocks
// of the n-1 blocks after it in the same leaf, and part of the open pending set. The caller holds
// a writer's token and the blocks' stripes, has admitted the changes, and the contents of new data
// blocks are complete. It reports false if the leaf was evicted: the caller takes it again and
// repeats. errWantJournal: the journal is full, nothing has happened.
//
// This is the one place where mappings change. The journal gets the change when its leaf is on the
// list for the open pending set, and before the entry can be seen. So a commit that switched the
// journal before that has it in the new generation, and one that does so afterwards finds the leaf
// on the list, waits for its lock, and has the change in its own set (see runCommit).
func (d *device) record(l *leaf, vb thin.VBlock, n, val uint64) (bool, error) {
	step := uint64(0)
	if val != absent {
		step = thin.MaxTime // the next data block, packed
	}
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		return false, nil
	}
	first := uint64(vb) % leafBlocks
	pend, npend := l.pend, l.npend
	superseded := false
	for i := first; i < first+n; i++ {
		if l.pend[i/64]&(1<<(i%64)) == 0 {
			l.pend[i/64] |= 1 << (i % 64)
			l.npend++
		} else if l.entries[i].Load() != absent {
			superseded = true
		}
	}
	again := int(n) - (l.npend - npend)
	if !l.listed {
		d.dirtyMu.Lock()
		l.listed = true
		d.dirty = append(d.dirty, l)
		if !d.enlisted {
			d.enlisted = true
			d.p.enlist(d)
		}
		d.dirtyMu.Unlock()
	}
	if j := d.p.journal; j != nil {
		e := journal.Entry{ID: d.id, VBlock: vb, Len: n, Removed: val == absent}
		if !e.Removed {
			e.Block = thin.UnpackMapping(val).Block
		}
		if err := j.Append(e); err != nil {
			l.pend, l.npend = pend, npend
			l.mu.Unlock()
			return false, fmt.Errorf("%w: %w", errWantJournal, err)
		}
	}
	if superseded {
		// Before any tree knew them: they were never more than reserved.
		d.dirtyMu.Lock()
		for i := first; i < first+n; i++ {
			if old := l.entries[i].Load(); old != absent && pend[i/64]&(1<<(i%64)) != 0 {
				d.dropped = append(d.dropped, thin.UnpackMapping(old).Block)
			}
		}
		d.dirtyMu.Unlock()
	}
	mapped, own := int64(0), int64(0)
	for i := first; i < first+n; i++ {
		old := l.entries[i].Load()
		l.entries[i].Store(val)
		mapped += count(val != absent) - count(old != absent)
		own += count(d.ownMapping(val)) - count(d.ownMapping(old))
		val += step
	}
	l.mu.Unlock()

	if mapped != 0 {
		d.mapped.Add(mapped)
	}
	if own != 0 {
		d.own.Add(own)
	}
	if again > 0 {
		d.p.unadmit(again)
	}
	// After the entries: a flush that sees an older number began before this change was done.
	d.noteChange()
	return true, nil
}

func count(is bool) int64 {
	if is {
		return 1
	}
	return 0
}

// noteChange notes that the device has changes in the open generation, or in an older one.
func (d *device) noteChange() {
	g := d.p.commits.open.Load()
	for {
		old := d.changed.Load()
		if old >= g || d.changed.CompareAndSwap(old, g) {
			break
		}
	}
	d.p.wakeCommitLoop()
}

// A pendingSet is what one device's table held that its tree did not.
type pendingSet struct {
	d       *device
	leaves  []*leaf
	entries []pendingEntry // ascending
	dropped []thin.DataBlock
}

type pendingEntry struct {
	vb  thin.VBlock
	val uint64
}

// takePending closes the device's pending set. Its leaves stay in memory until the set is
// applied.
func (d *device) takePending() *pendingSet {
	s := &pendingSet{d: d}
	d.dirtyMu.Lock()
	s.leaves, d.dirty = d.dirty, nil
	s.dropped, d.dropped = d.dropped, nil
	d.enlisted = false
	d.dirtyMu.Unlock()
	slices.SortFunc(s.leaves, func(a, b *leaf) int {
		if a.index < b.index {
			return -1
		}
		return 1
	})
	for _, l := range s.leaves {
		l.mu.Lock()
		l.listed = false
		l.closing++
		for w, set := range l.pend {
			for ; set != 0; set &= set - 1 {
				i := uint64(w*64 + bits.TrailingZeros64(set))
				s.entries = append(s.entries, pendingEntry{thin.VBlock(l.index*leafBlocks + i), l.entries[i].Load()})
			}
			l.pend[w] = 0
		}
		l.npend = 0
		l.mu.Unlock()
	}
	return s
}

// apply puts a closed set into the device's tree, in the open transaction. An error leaves the
// metadata unusable for changes.
func (s *pendingSet) apply() error {
	m := s.d.p.meta
	var batch []thin.Entry
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := m.Insert(s.d.id, batch)
		batch = batch[:0]
		return err
	}
	var err error
	for i := 0; i < len(s.entries) && err == nil; {
		e := s.entries[i]
		if e.val != absent {
			batch = append(batch, thin.Entry{VBlock: e.vb, Mapping: thin.UnpackMapping(e.val)})
			if len(batch) == applyBatch {
				err = flush()
			}
			i++
			continue
		}
		j := i + 1
		for j < len(s.entries) && s.entries[j].val == absent && s.entries[j].vb == e.vb+thin.VBlock(j-i) {
			j++
		}
		next, end, done := e.vb, e.vb+thin.VBlock(j-i), false
		for !done && err == nil {
			_, next, done, err = m.Remove(s.d.id, next, end, applyBatch)
		}
		i = j
	}
	if err == nil {
		err = flush()
	}
	if err != nil {
		// The leaves stay pinned: they are the only place that knows these mappings.
		return fmt.Errorf("thin %d: apply %d pending mappings: %w", s.d.id, len(s.entries), err)
	}
	for _, l := range s.leaves {
		l.mu.Lock()
		l.closing--
		l.mu.Unlock()
	}
	s.d.p.unadmit(len(s.entries))
	return nil
}

// applyLocked brings the tree of a device up to date with its table. Superseded blocks wait for
// the next commit. The caller holds applyMu.
func (p *Pool) applyLocked(d *device) error {
	s := d.takePending()
	if len(s.dropped) > 0 {
		p.dropped = append(p.dropped, s.dropped...)
		p.droppedAny.Store(true)
	}
	if len(s.leaves) == 0 {
		return nil
	}
	if err := s.apply(); err != nil {
		return p.fail(err)
	}
	return nil
}

// applyAllLocked does so for every device that has something pending. The caller holds applyMu.
func (p *Pool) applyAllLocked() error {
	p.dirtyMu.Lock()
	list := p.dirtyDevs
	p.dirtyDevs = nil
	p.dirtyMu.Unlock()
	for _, d := range list {
		if err := p.applyLocked(d); err != nil {
			return err
		}
	}
	return nil
}

// enlist notes that a device has something pending.
func (p *Pool) enlist(d *device) {
	p.dirtyMu.Lock()
	defer p.dirtyMu.Unlock()
	p.dirtyDevs = append(p.dirtyDevs, d)
}
