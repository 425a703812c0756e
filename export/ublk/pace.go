package ublk

import (
	"time"

	"mica/export/pacing"
)

// A pace watches how long requests take that are served on the queue's thread, and how long the way
// to a worker and back takes: on a disk they would be done one after the other, and workers do many
// at once; in memory, and where a change of threads is dear, the way would be longer than the
// work. It belongs to the queue's thread.
type pace struct {
	pacing.Score
	last    time.Duration
	handoff time.Duration // to a worker and back, a running mean
	flush   time.Duration // of the medium, a running mean
}

const (
	slowRequest = 20 * time.Microsecond // at least, and a nanosecond for every 4 bytes

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

// served notes a request of n bytes that was served here.
func (p *pace) served(n int) {
	p.Note(p.took() > max(slowRequest, p.handoff)+time.Duration(n/4))
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
	pacing.Mean(&p.handoff, t.begun-t.submitted+now-t.ended)
	if t.flush {
		pacing.Mean(&p.flush, t.ended-t.begun)
	}
}

// flushHere tells whether a flush may be done on the queue's thread. What it takes is not known
// before a worker has done one.
func (p *pace) flushHere() bool {
	return p.flush > 0 && p.flush <= max(shortFlush, flushHandoff*p.handoff)
}

// flushed notes a flush that was done here.
func (p *pace) flushed() { pacing.Mean(&p.flush, p.took()) }
