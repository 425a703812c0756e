package user

import (
	"runtime"
	"sync"

	"mica/thin"
)

// release takes freed data blocks from the commit that freed them to the free list: it waits
// for every request that began before, gives their contents back to the host, then frees them.
// Invariant 1 of the engine lives here.
type release struct {
	mu     sync.Mutex
	cond   sync.Cond
	queue  []freedBlocks // guarded by mu, as are the counters
	queued uint64        // batches ever added
	done   uint64        // batches ever finished
	wake   chan struct{}
}

type freedBlocks struct {
	freed   []uint64         // from the metadata: to be given to ReleaseData
	dropped []thin.DataBlock // reserved and never mapped: to be given to UnreserveData
}

func (r *release) init() {
	r.cond.L = &r.mu
	r.wake = make(chan struct{}, 1)
}

// add queues the blocks of a durable commit.
func (r *release) add(freed []uint64, dropped []thin.DataBlock) {
	if len(freed) == 0 && len(dropped) == 0 {
		return
	}
	r.mu.Lock()
	r.queue = append(r.queue, freedBlocks{freed, dropped})
	r.queued++
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// busy reports whether blocks are on their way.
func (r *release) busy() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.done < r.queued
}

// wait returns when everything queued before the call is free. The caller holds no token.
func (r *release) wait() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for want := r.queued; r.done < want; {
		r.cond.Wait()
	}
}

func (p *Pool) releaseLoop() {
	defer p.loops.Done()
	for {
		p.releaseQueued()
		select {
		case <-p.stop:
			p.releaseQueued()
			return
		case <-p.release.wake:
		}
	}
}

func (p *Pool) releaseQueued() {
	r := &p.release
	r.mu.Lock()
	q := r.queue
	r.queue = nil
	r.mu.Unlock()
	if len(q) == 0 {
		return
	}
	// Whoever looked a block up before it was freed has a token. Devices opened since then
	// cannot find it.
	for _, d := range p.openDevices() {
		d.r.drain()
		d.w.drain()
	}
	for _, b := range q {
		p.releaseRuns(thin.RunsOf(b.freed), p.meta.ReleaseData)
		p.releaseRuns(thin.RunsOf(b.dropped), p.meta.UnreserveData)
	}
	p.spaceFreed() // first: who waits for the release looks whether there is space afterwards
	r.mu.Lock()
	r.done += uint64(len(q))
	r.cond.Broadcast()
	r.mu.Unlock()
}

// releasePause is how many blocks are freed before others get their turn: what is released may be
// millions of blocks, in as many runs, and nobody waits for it as others do for their writes.
const releasePause = 1024

func (p *Pool) releaseRuns(runs []thin.DataRun, free func(thin.DataRun)) {
	n := 0
	for _, run := range runs {
		for run.Len > 0 {
			part := thin.DataRun{Begin: run.Begin, Len: min(releasePause, run.Len)}
			p.giveBack(part)
			free(part)
			run.Begin, run.Len = part.End(), run.Len-part.Len
			if n += int(part.Len) + 16; n >= releasePause {
				n = 0
				runtime.Gosched()
			}
		}
	}
}

// punchBytes bounds one punch, so that a large delete does not keep the device busy for long.
const punchBytes = 64 << 20

// giveBack punches blocks that are not free yet and that nobody uses.
func (p *Pool) giveBack(run thin.DataRun) {
	if p.opts.NoDiscardPassdown || p.failed() != nil {
		p.data.forgetZero(run)
		return
	}
	step := max(1, uint64(punchBytes/p.bs))
	for run.Len > 0 {
		part := thin.DataRun{Begin: run.Begin, Len: min(step, run.Len)}
		p.data.punch(part)
		run.Begin, run.Len = run.Begin+thin.DataBlock(part.Len), run.Len-part.Len
	}
}
