package ublk

import "time"

// A pace watches how long requests take that are served on the queue's thread, and how long the way
// to a worker and back takes: on a disk they would be done one after the other, and workers do many
// at once; in memory, and where a change of threads is dear, the way would be longer than the
// work. It belongs to the queue's thread.
type pace struct {
	last   time.Duration
	score  int
	spread int // requests that should still go to workers

	handoff time.Duration // to a worker and back, a running mean
	flush   time.Duration // of the medium, a running mean
}

const (
	slowRequest = 20 * time.Microsecond // at least, and a nanosecond for every 4 bytes
	scoreSlow   = 8
	scoreSpread = 24
	scoreMax    = 32
	spreadFor   = 32

	// A flush that takes so long is nothing that other requests wait for; or so many times the
	// way to a worker.
	shortFlush   = 100 * time.Microsecond
	flushHandoff = 4
)

var epoch = time.Now()

func (p *pace) start() { p.last = time.Since(epoch) }

// took is the time since start or the last call.
func (p *pace) took() time.Duration {
	now := time.Since(epoch)
	d := now - p.last
	p.last = now
	return d
}

// takeSpread tells whether the next request should go to a worker; others are under way.
func (p *pace) takeSpread(others bool) bool {
	if p.spread == 0 {
		return false
	}
	p.spread--
	return others
}

// served notes a request of n bytes that was served here.
func (p *pace) served(n int) {
	if p.took() <= max(slowRequest, p.handoff)+time.Duration(n/4) {
		p.score = max(p.score-1, 0)
		return
	}
	if p.score = min(p.score+scoreSlow, scoreMax); p.score >= scoreSpread {
		p.spread = spreadFor
	}
}

// taskTimes are the moments of a request that a worker serves, since epoch. Zero begun: it had to
// wait for its turn.
type taskTimes struct {
	submitted, begun, ended time.Duration
	flush                   bool
}

// returned notes a request that a worker has served.
func (p *pace) returned(t taskTimes, now time.Duration) {
	if t.begun == 0 {
		return
	}
	mean(&p.handoff, t.begun-t.submitted+now-t.ended)
	if t.flush {
		mean(&p.flush, t.ended-t.begun)
	}
}

// flushHere tells whether a flush may be done on the queue's thread. What it takes is not known
// before a worker has done one.
func (p *pace) flushHere() bool {
	return p.flush > 0 && p.flush <= max(shortFlush, flushHandoff*p.handoff)
}

// flushed notes a flush that was done here.
func (p *pace) flushed() { mean(&p.flush, p.took()) }

// mean moves a running mean towards a sample, by an eighth of the difference; a sample that is far
// away, as when the processor was taken away, counts for less.
func mean(m *time.Duration, sample time.Duration) {
	if *m == 0 {
		*m = max(sample, 1)
		return
	}
	*m = max(*m+(min(sample, 8**m)-*m)/8, 1)
}
