package user

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// Conditions that make a write give its token back and wait. They do not leave the package.
var (
	errWantData    = errors.New("no free data block")
	errWantMeta    = errors.New("no metadata block to spare")
	errWantReserve = errors.New("not even a metadata block of the reserve")
	errWantHost    = errors.New("no space on the host")
	errWantPending = errors.New("too many pending mappings")
	errWantJournal = errors.New("no room in the journal")
	errWantTurn    = errors.New("a delete or a discard needs the last metadata blocks")
)

// space is the out-of-data-space state of a pool:
//
//	     a write finds no free data block, even after a commit
//	ok ────────────────────────────────────────────────────────> out
//	 ^                                                             │
//	 └──── blocks are freed, the device grows, the host has room <─┘
//
// While out, writes that need a block wait, or fail at once (error_if_no_space, too many
// waiters). When the state has lasted for the timeout, those that wait and later ones fail
// until there is space again.
type space struct {
	mu      sync.Mutex
	changed chan struct{} // guarded by mu: closed and replaced when there may be space
	seq     atomic.Uint64 // changed under mu: counts those events
	out     bool          // guarded by mu, as is all below
	host    bool          // the host is full, not the pool
	since   time.Time
	expired bool // the timeout has passed
	waiting int
	low     bool // the low water event has been sent

	tight    sync.RWMutex // held while a delete or a discard has all of the metadata; see tightly
	tightNow atomic.Int32 // it is held, or waited for
}

func (s *space) init() { s.changed = make(chan struct{}) }

// now returns the number of events so far: to be taken before an attempt that may fail.
func (s *space) now() uint64 { return s.seq.Load() }

func (s *space) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wakeAllLocked()
}

func (s *space) wakeAllLocked() {
	s.seq.Add(1)
	close(s.changed)
	s.changed = make(chan struct{})
}

// freeBlocks counts the data blocks that a writer could get: free ones, and what extents hold.
func (p *Pool) freeBlocks() uint64 {
	return p.meta.Space().DataFree() + uint64(max(0, p.extentFree.Load()))
}

// spaceFreed is called when data blocks have become free.
func (p *Pool) spaceFreed() {
	free := p.freeBlocks()
	s := &p.space
	s.mu.Lock()
	again := s.out && free > 0
	if again {
		s.out, s.expired, s.host = false, false, false
		p.outOfSpace.Store(false)
	}
	if free > p.opts.LowWaterMark {
		s.low = false
	}
	s.wakeAllLocked()
	s.mu.Unlock()
	if again {
		p.events.Send(engine.EventSpaceAgain, fmt.Sprintf("%d data blocks free", free))
	}
}

// hostSpaceAgain is called when a write to new host space has succeeded.
func (p *Pool) hostSpaceAgain() {
	s := &p.space
	s.mu.Lock()
	again := s.out && s.host
	if again {
		s.out, s.expired, s.host = false, false, false
		p.outOfSpace.Store(false)
		s.wakeAllLocked()
	}
	s.mu.Unlock()
	if again {
		p.events.Send(engine.EventSpaceAgain, "the host has space again")
	}
}

// checkLowWater sends the event when free blocks have come down to the mark.
func (p *Pool) checkLowWater() {
	if p.opts.LowWaterMark == 0 {
		return
	}
	free := p.freeBlocks()
	if free > p.opts.LowWaterMark {
		return
	}
	s := &p.space
	s.mu.Lock()
	first := !s.low
	s.low = true
	s.mu.Unlock()
	if first {
		p.events.Send(engine.EventLowWater, fmt.Sprintf("%d of %d data blocks free", free, p.meta.DataBlocks()))
	}
}

// isHostFull reports whether a write failed because the host file system under the data file is
// full, or its quota.
func isHostFull(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// waitFor is called by a write of t that gave its token back because of why. It returns nil
// when the write may try again. seq is what space.now said before the attempt.
func (p *Pool) waitFor(t *Thin, why error, seq uint64, noWait bool) error {
	switch {
	case errors.Is(why, errWantPending), errors.Is(why, errWantJournal):
		return p.commitNow()
	case errors.Is(why, errWantMeta):
		return p.waitMeta()
	case errors.Is(why, errWantTurn):
		p.space.tight.RLock() // until it is done
		p.space.tight.RUnlock()
		return p.failed()
	case errors.Is(why, errWantData):
		return p.waitData(t, nil, seq, noWait)
	}
	return p.waitData(t, why, seq, noWait)
}

// metaTries bounds how often a write tries for metadata blocks that others got before it.
const metaTries = 1000

// waitMeta commits, which may free metadata blocks, and fails if that did not help: when there are
// too few for one change. What others have pending takes blocks for the worst case only, which
// their commit gives back; so it is told by a look at which nobody has anything under way.
func (p *Pool) waitMeta() error {
	for try := 0; ; try++ {
		if p.uncommitted() {
			if err := p.commitNow(); err != nil {
				return err
			}
		}
		gen, quiet := p.commits.open.Load(), p.commits.still() && !p.uncommitted()
		others := int(p.pending.Load())
		if p.meta.CanAdmit(others+1, false) {
			return nil
		}
		alone := others == 0 && quiet && !p.uncommitted() && p.commits.open.Load() == gen
		if alone || try == metaTries {
			err := p.noMetaError()
			p.noMetaSpace(err)
			return err
		}
		runtime.Gosched() // one of them is about to write
	}
}

// noMetaSpace is called when something was refused for want of metadata blocks.
func (p *Pool) noMetaSpace(err error) {
	if !p.noMeta.Swap(true) {
		p.events.Send(engine.EventMode, "ro: "+err.Error())
	}
}

func (p *Pool) noMetaError() error {
	sp := p.meta.Space()
	return fmt.Errorf("%w (%d of %d metadata blocks free, %d of them kept for deletes): %w",
		thin.ErrNoMetaSpace, sp.MetaFree, sp.MetaTotal, min(sp.MetaFree, sp.MetaReserve), dev.ErrNoSpace)
}

// tightTries bounds how often tightly tries, a millisecond apart, while changes that were admitted
// before are still on their way.
const tightTries = 2000

// tightly does what gives space back and found too few metadata blocks for it: nobody else is
// admitted meanwhile, and what was admitted before is committed first, so that all that is free and
// kept back can be had. do returns thin.ErrNoMetaSpace if it needs more. The caller holds no token.
func (p *Pool) tightly(do func() error) error {
	p.space.tight.Lock()
	defer p.space.tight.Unlock()
	p.space.tightNow.Add(1)
	defer p.space.tightNow.Add(-1)
	for try := 0; ; try++ {
		if err := p.commitNow(); err != nil {
			return err
		}
		alone := p.pending.Load() == 0
		if alone {
			p.meta.CanAdmit(0, true) // nothing is promised to anybody
		}
		err := do()
		if !errors.Is(err, thin.ErrNoMetaSpace) || alone && try > 0 || try == tightTries || p.failed() != nil {
			return err
		}
		if !alone {
			time.Sleep(time.Millisecond)
		}
	}
}

// mayFree reports whether a commit could make data blocks free.
func (p *Pool) mayFree() bool {
	return p.uncommitted() || p.release.busy() || p.meta.Space().DataFreeing > 0
}

// waitData waits for data blocks, or with host set for space on the host. With noWait it does what
// can make room at once, and else refuses.
func (p *Pool) waitData(t *Thin, host error, seq uint64, noWait bool) error {
	s := &p.space
	if host == nil && s.now() == seq && p.mayFree() {
		if err := p.commitNow(); err != nil {
			return err
		}
		p.release.wait()
	}
	s.mu.Lock()
	if s.now() != seq {
		s.mu.Unlock()
		return p.failed()
	}
	if !s.out {
		s.out, s.host, s.expired, s.since = true, host != nil, false, time.Now()
		p.outOfSpace.Store(true)
		detail := fmt.Sprintf("no free data block of %d", p.meta.DataBlocks())
		if host != nil {
			detail = host.Error()
		}
		p.events.Send(engine.EventNoSpace, detail)
	}
	refuse := ""
	switch {
	case p.opts.ErrorIfNoSpace:
		refuse = "error_if_no_space"
	case s.expired:
		refuse = fmt.Sprintf("since %v", p.opts.NoSpaceTimeout)
	case int(t.d.waiting.Load()) >= p.opts.MaxWaiters:
		refuse = fmt.Sprintf("%d writes of this device wait already", t.d.waiting.Load())
	case t.spaceWait > 0 && !time.Now().Before(t.outUntil(s.since)):
		refuse = fmt.Sprintf("since %v", t.spaceWait)
	case noWait:
		refuse = "too much waits in front of this device already"
	}
	if refuse != "" {
		s.mu.Unlock()
		return p.noSpaceError(t, host, refuse)
	}
	t.d.waiting.Add(1)
	s.waiting++
	changed, since := s.changed, s.since
	s.mu.Unlock()
	defer func() {
		t.d.waiting.Add(-1)
		s.mu.Lock()
		s.waiting--
		s.mu.Unlock()
	}()

	var expire, own, retry <-chan time.Time
	if p.opts.NoSpaceTimeout > 0 {
		timer := time.NewTimer(time.Until(since.Add(p.opts.NoSpaceTimeout)))
		defer timer.Stop()
		expire = timer.C
	}
	if t.spaceWait > 0 {
		timer := time.NewTimer(time.Until(t.outUntil(since)))
		defer timer.Stop()
		own = timer.C
	}
	if host != nil {
		timer := time.NewTimer(min(time.Second, p.opts.CommitInterval))
		defer timer.Stop()
		retry = timer.C // nobody tells us when the host has space
	}
	select {
	case <-changed:
		return p.failed()
	case <-retry:
		return p.failed()
	case <-t.closing:
		return fmt.Errorf("thin %d: write that waits for space: %w", t.d.id, dev.ErrClosed)
	case <-own:
		return p.noSpaceError(t, host, fmt.Sprintf("waited %v", t.spaceWait))
	case <-expire:
	}
	s.mu.Lock()
	still := s.out && s.since.Equal(since)
	if still {
		s.expired = true
	}
	s.mu.Unlock()
	if !still {
		return nil
	}
	return p.noSpaceError(t, host, fmt.Sprintf("waited %v", p.opts.NoSpaceTimeout))
}

// outUntil is when writes of a handle that waits for a time of its own have waited long enough in
// the state that began at since.
func (t *Thin) outUntil(since time.Time) time.Time {
	t.outMu.Lock()
	defer t.outMu.Unlock()
	if !t.outState.Equal(since) {
		t.outState, t.outSince = since, time.Now()
	}
	return t.outSince.Add(t.spaceWait)
}

func (p *Pool) noSpaceError(t *Thin, host error, why string) error {
	if host != nil {
		return fmt.Errorf("thin %d: %w on the host (%s): %v", t.d.id, dev.ErrNoSpace, why, host)
	}
	sp := p.meta.Space()
	return fmt.Errorf("thin %d: %w (%s): %d of %d data blocks of %d KiB free", t.d.id, dev.ErrNoSpace, why,
		sp.DataFree(), sp.DataTotal, p.bs>>10)
}

// admit reserves metadata space for n more pending changes; they are part of Pool.pending until
// they are in a tree, or unadmit. Discards may use the reserve.
func (p *Pool) admit(n int, reserve bool) error {
	if p.readOnly {
		return p.writable()
	}
	if p.journal != nil && p.journal.Full() {
		return errWantJournal
	}
	if !reserve && p.space.tightNow.Load() > 0 {
		return errWantTurn
	}
	total := p.pending.Add(int64(n))
	if int(total) > 2*p.opts.MaxPending+n {
		p.pending.Add(int64(-n))
		return errWantPending
	}
	if !p.meta.CanAdmit(int(total), reserve) {
		p.pending.Add(int64(-n))
		if reserve {
			return errWantReserve
		}
		return errWantMeta
	}
	return nil
}

// metaFreed is called after a commit: it may have freed metadata blocks.
func (p *Pool) metaFreed() {
	if p.noMeta.Load() && p.meta.CanAdmit(int(p.pending.Load())+1, false) && p.noMeta.Swap(false) {
		p.events.Send(engine.EventMode, "rw")
	}
}

func (p *Pool) unadmit(n int) { p.pending.Add(int64(-n)) }
