package fuse

import "time"

// A pace watches how long requests take that are served on the thread that has read them. On memory,
// or from a cache, that is less than handing them to a goroutine costs, also if they are long. On a
// disk it is long, and requests that come at the same time would be done one after the other: when
// slow ones pile up, requests go to goroutines for a while, if there are others; then one is tried
// on the thread again. It belongs to a thread.
//
// A slow request now and then is the scheduler's doing, or a cache's miss, and costs less than
// handing over all of them.
type pace struct {
	last   time.Duration // when the request at hand was read, since epoch
	score  int           // 0..scoreMax: up by scoreSlow for a slow request, down by 1 for others
	spread int           // requests that should still go to goroutines
}

// A request of n bytes is slow if it takes more than slowRequest and a nanosecond for every 2
// bytes: several times what memory takes, less than the fastest disk.
const (
	slowRequest = 20 * time.Microsecond
	scoreSlow   = 8
	scoreSpread = 24
	scoreMax    = 32
	spreadFor   = 32
)

var epoch = time.Now()

// begin tells whether the request at hand, small enough as it is, should be served on the thread;
// others says that more are under way.
func (p *pace) begin(others bool) bool {
	if p.spread > 0 {
		p.spread--
		if others {
			return false
		}
	}
	p.last = time.Since(epoch)
	return true
}

// served notes that a request of n bytes was served on the thread.
func (p *pace) served(n int) { p.observe(time.Since(epoch)-p.last, n) }

func (p *pace) observe(took time.Duration, n int) {
	if took <= slowRequest+time.Duration(n/2) {
		p.score = max(p.score-1, 0)
		return
	}
	if p.score = min(p.score+scoreSlow, scoreMax); p.score >= scoreSpread {
		p.spread = spreadFor
	}
}
