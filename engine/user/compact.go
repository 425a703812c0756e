package user

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"mica/thin"
)

// compactAt is the pool's time from which on a snapshot lets it be compacted first: early enough
// that something in the way (a metadata snapshot that is held) has time to go.
const compactAt = thin.MaxTime - 1<<16

// compactLeaves is how many leaves of mapping trees one transaction of a compaction rewrites.
const compactLeaves = 512

// compaction is what compactions of a pool need.
type compaction struct {
	mu       sync.Mutex    // one at a time; outside everything else
	opening  sync.RWMutex  // held for reading while a device is opened; outside gates and applyMu
	failedAt atomic.Uint32 // the pool's time at which makeTime has failed
}

// makeTime compacts the pool's time if it nears its end. What fails here fails for good only where
// a snapshot finds that it needs a time that there is not.
func (p *Pool) makeTime() {
	from := uint32(compactAt)
	if p.opts.compactAt != 0 {
		from = p.opts.compactAt
	}
	t := p.meta.Time()
	if t < from || p.writable() != nil || p.meta.HeldRoot() != 0 || p.compaction.failedAt.Load() == t {
		return
	}
	if err := p.compact(t); err != nil {
		p.compaction.failedAt.Store(t)
		p.log.Warn("the pool's time could not be compacted", "time", t, "err", err)
	}
}

// compact makes the pool's time, which was seen to be t, small again: see thin.Compaction. Writers
// of all devices wait meanwhile, readers do not. Each step is a commit.
func (p *Pool) compact(t uint32) (err error) {
	p.compaction.mu.Lock()
	defer p.compaction.mu.Unlock()
	if p.meta.Time() < t {
		return nil // somebody was quicker
	}
	// Nobody opens a device, so that all writers there are stand at these gates.
	p.compaction.opening.Lock()
	defer p.compaction.opening.Unlock()
	devs := p.openDevices()
	for _, d := range devs {
		d.w.shutGate()
		defer d.w.openGate()
	}
	for _, d := range devs {
		d.w.drain()
	}
	var c *thin.Compaction
	defer func() {
		if c != nil {
			c.End()
		}
	}()
	step := func() (done bool, gen uint64, err error) {
		p.applyMu.Lock()
		defer p.applyMu.Unlock()
		if c == nil {
			// Pending mappings have old times: into the trees with them.
			if err := p.applyAllLocked(); err != nil {
				return false, 0, err
			}
			if c, err = p.meta.Compact(); err != nil {
				return false, 0, err
			}
		}
		if done, err = c.Step(compactLeaves); err == nil && done {
			err = p.finishCompaction(c, devs)
		}
		if err != nil && p.meta.Failed() != nil {
			err = p.fail(err)
		}
		return done, p.commits.open.Load(), err
	}
	tight := false
	for done := false; !done; {
		var gen uint64
		done, gen, err = step()
		switch {
		case errors.Is(err, thin.ErrNoMetaSpace) && p.failed() == nil && !tight:
			tight, done, gen = true, false, p.commits.open.Load() // a commit may free metadata blocks
		case err != nil:
			return err
		default:
			tight = false
		}
		if err := p.commitTo(gen); err != nil {
			return err
		}
	}
	p.log.Info("the pool's time was compacted", "from", t, "to", p.meta.Time())
	return nil
}

// finishCompaction gives devices and pool their new times, in the trees and in memory. The caller
// holds applyMu; the gates of devs, which were all when it began, are closed.
func (p *Pool) finishCompaction(c *thin.Compaction, devs []*device) error {
	if err := c.Finish(); err != nil {
		return err
	}
	// Those that were closed meanwhile have nothing in memory, and may have been deleted.
	p.mu.Lock()
	devs = slices.DeleteFunc(slices.Clone(devs), func(d *device) bool { return p.devices[d.id] != d })
	p.mu.Unlock()
	if err := p.refreshSnapTimes(devs); err != nil {
		return err
	}
	for _, d := range devs {
		// Writers read it, and there are none.
		d.created = c.Time(d.created)
		if !d.forget() {
			return p.fail(fmt.Errorf("thin %d: mappings are pending although nobody may write", d.id))
		}
	}
	return nil
}

// forget takes all leaves of a device out of the table: they have the times of before. Readers that
// look at one go on with it, for times do not concern them. It reports whether nothing was pending.
func (d *device) forget() bool {
	for i := range d.table.fill {
		d.table.fill[i].Lock()
		defer d.table.fill[i].Unlock()
	}
	dirs := *d.table.root.Load()
	for i := range dirs {
		dir := dirs[i].Load()
		for j := 0; dir != nil && j < dirLeaves; j++ {
			l := dir[j].Load()
			if l == nil {
				continue
			}
			if !l.evict() {
				return false
			}
			d.p.cache.remove(l)
		}
	}
	return true
}
