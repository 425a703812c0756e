package user

import (
	"slices"
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
	freed   []thin.DataRun // from the metadata: to be given to ReleaseData
	dropped []thin.DataRun // reserved and never mapped: to be given to UnreserveData
}

func (r *release) init() {
	r.cond.L = &r.mu
	r.wake = make(chan struct{}, 1)
}

// add queues the blocks of a durable commit.
func (r *release) add(freed []thin.DataRun, dropped []thin.DataBlock) {
	if len(freed) == 0 && len(dropped) == 0 {
		return
	}
	r.mu.Lock()
	r.queue = append(r.queue, freedBlocks{freed, runsOf(dropped)})
	r.queued++
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// runsOf joins blocks to runs.
func runsOf(blocks []thin.DataBlock) []thin.DataRun {
	slices.Sort(blocks)
	var runs []thin.DataRun
	for _, b := range blocks {
		if n := len(runs); n > 0 && runs[n-1].Begin+thin.DataBlock(runs[n-1].Len) == b {
			runs[n-1].Len++
		} else {
			runs = append(runs, thin.DataRun{Begin: b, Len: 1})
		}
	}
	return runs
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
		for _, run := range b.freed {
			p.giveBack(run)
			p.meta.ReleaseData(run)
		}
		for _, run := range b.dropped {
			p.giveBack(run)
			p.meta.UnreserveData(run)
		}
	}
	p.spaceFreed() // first: who waits for the release looks whether there is space afterwards
	r.mu.Lock()
	r.done += uint64(len(q))
	r.cond.Broadcast()
	r.mu.Unlock()
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
