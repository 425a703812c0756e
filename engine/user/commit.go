package user

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/journal"
	"mica/thin"
)

// commits numbers the pending sets (generations) of a pool: the open one takes new changes, a
// commit closes it, and once the commit is durable it is done. At most one commit is under way;
// whoever needs one and finds none runs it, the others wait, so that requests that come
// together share the next.
type commits struct {
	open atomic.Uint64 // changed under applyMu
	done atomic.Uint64 // changed under mu; all generations up to it are durable

	mu      sync.Mutex
	cond    sync.Cond
	running bool // guarded by mu: somebody runs a commit

	writes atomic.Uint64 // superblocks written
	wake   chan struct{} // to commitLoop: there are changes
	kick   chan struct{} // to commitLoop: commit now
	dirty  atomic.Bool   // a wake is on its way or being served
}

func (c *commits) init() {
	c.cond.L = &c.mu
	c.open.Store(1)
	c.wake, c.kick = make(chan struct{}, 1), make(chan struct{}, 1)
}

// commitTo returns when generation gen is durable, running commits as needed. A commit that
// makes the open generation durable also covers every write acknowledged before the call.
func (p *Pool) commitTo(gen uint64) error {
	c := &p.commits
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.done.Load() < gen {
		if err := p.failed(); err != nil {
			return err
		}
		if c.running {
			c.cond.Wait()
			continue
		}
		c.running = true
		c.mu.Unlock()
		closed, err := p.runCommit()
		c.mu.Lock()
		c.running = false
		if err == nil {
			c.done.Store(closed)
		}
		c.cond.Broadcast()
		if err != nil {
			return err
		}
	}
	return nil
}

// still reports whether no commit is under way: one that is frees metadata blocks when it is done.
func (c *commits) still() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.running
}

// commitNow makes everything acknowledged so far durable.
func (p *Pool) commitNow() error { return p.commitTo(p.commits.open.Load()) }

// runCommit closes the open generation and makes it durable. Only commitTo calls it.
//
// The journal is switched before anything of the set is taken: a change that it has in the
// generation before is on a list by then, so that it goes into this set; one that it has in the
// new generation may be in this set too, which does no harm.
func (p *Pool) runCommit() (closed uint64, err error) {
	p.applyMu.Lock()
	closed = p.commits.open.Load()
	p.commits.open.Store(closed + 1)
	if p.journal != nil {
		p.journal.Switch(p.committed)
		p.at("switched")
	}
	if err := p.applyAllLocked(); err != nil {
		p.applyMu.Unlock()
		return 0, err
	}
	var c *thin.Commit
	if p.meta.Changed() {
		if c, err = p.meta.Prepare(); err != nil {
			p.applyMu.Unlock()
			return 0, p.fail(err)
		}
	}
	dropped := p.dropped
	p.dropped = nil
	p.droppedAny.Store(false)
	p.applyMu.Unlock()

	synced := make(chan error, 1)
	go func() { synced <- p.data.sync() }()
	if c == nil {
		if err := <-synced; err != nil {
			return 0, p.fail(err)
		}
		p.release.add(nil, dropped)
		return closed, nil
	}
	err = c.WriteBlocks()
	p.metaFlushes.Add(1)
	if serr := <-synced; serr != nil {
		c.Cancel(serr)
		return 0, p.fail(serr)
	}
	if err == nil {
		next := journal.StateOf(c.Superblock())
		p.at("written")
		if p.journal != nil {
			p.journal.Expect(next)
			p.at("expected")
		}
		err = c.WriteSuperblock()
		p.metaFlushes.Add(1)
		p.committed = next
		p.at("superblock")
		if p.journal != nil && err == nil {
			p.journal.Written()
		}
	}
	if err != nil {
		return 0, p.fail(err)
	}
	p.at("committed")
	p.commits.writes.Add(1)
	p.metaFreed()
	p.release.add(c.Freed(), dropped)
	return closed, nil
}

// flush makes every acknowledged write to d durable.
func (p *Pool) flush(d *device) error {
	p.flushes.Add(1)
	if err := p.failed(); err != nil {
		return err
	}
	c := &p.commits
	gen := d.changed.Load()
	if gen <= c.done.Load() {
		if err := p.data.sync(); err != nil {
			return p.fail(err)
		}
		return nil
	}
	if gen < c.open.Load() {
		// Its commit is under way, but the data sync in it may have begun before our writes.
		if err := p.data.sync(); err != nil {
			return p.fail(err)
		}
	}
	return p.commitTo(gen)
}

// tryFlush is flush if all changes of d are durable, so that it takes a sync of the data only.
func (p *Pool) tryFlush(d *device) error {
	if p.failure.Load() != nil || d.changed.Load() > p.commits.done.Load() {
		return dev.ErrWouldBlock
	}
	p.flushes.Add(1)
	if err := p.data.sync(); err != nil {
		return p.fail(err)
	}
	return nil
}

// wakeCommitLoop tells the commit loop that there are changes, or that there are many.
func (p *Pool) wakeCommitLoop() {
	c := &p.commits
	if !c.dirty.Load() && c.dirty.CompareAndSwap(false, true) {
		c.wake <- struct{}{}
	}
	if int(p.pending.Load()) >= p.opts.MaxPending {
		p.kickCommit()
	}
}

// commitLoop commits a while after a change, or when it is kicked. Errors are kept by fail.
func (p *Pool) commitLoop() {
	defer p.loops.Done()
	c := &p.commits
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-c.kick:
		case <-c.wake:
			timer.Reset(p.opts.CommitInterval)
			select {
			case <-p.stop:
				return
			case <-c.kick:
			case <-timer.C:
			}
			c.dirty.Store(false)
		}
		if p.uncommitted() {
			_ = p.commitNow()
		}
	}
}

// fail takes the pool out of service for good: no change and no flush succeeds any more, reads
// go on. It returns what callers get to see. Safe to call more than once; the first cause stays.
func (p *Pool) fail(cause error) error {
	p.failOnce.Do(func() {
		err := fmt.Errorf("%w: %w", engine.ErrFailed, cause)
		p.failure.Store(&err)
		p.meta.Fail(cause)
		if p.journal != nil {
			p.journal.Fail()
		}
		p.log.Error("pool failed", "err", cause)
		p.space.wakeAll()
		p.events.Send(engine.EventMode, "ro: "+cause.Error())
		// In a goroutine: it waits for the commit under way, which may be the caller's.
		p.loops.Add(1)
		go func() {
			defer p.loops.Done()
			if err := p.meta.SetNeedsCheck(); err != nil {
				p.log.Error("could not mark the pool needs_check", "err", err)
				p.unmarked.Store(true)
				p.events.Send(engine.EventMode, "Fail: needs_check could not be written: "+err.Error())
			}
		}()
		p.commits.mu.Lock()
		p.commits.cond.Broadcast()
		p.commits.mu.Unlock()
	})
	return p.failed()
}

// failed returns why the pool is out of service, or nil.
func (p *Pool) failed() error {
	if e := p.failure.Load(); e != nil {
		return *e
	}
	return nil
}
