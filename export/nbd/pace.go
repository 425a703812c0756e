package nbd

import "time"

// A pace watches how long requests that are served inline take. On memory or in a cache that is
// less than handing them to a worker would take; on a disk it is long, and a client with many
// requests in flight would see them done one after the other. When slow ones pile up, requests
// go to workers for a while, if there is more than one; then one is tried inline again.
//
// A slow request now and then is the scheduler's doing, or a cache's miss, and costs less than
// using workers for all would.
type pace struct {
	last   time.Duration // when the last request was done, or the last receive
	score  int           // 0..scoreMax: up by scoreSlow for a slow request, down by 1 for others
	spread int           // requests that should still go to workers
}

// A request of n bytes is slow if it takes more than slowRequest and a nanosecond for every 4
// bytes: several times what memory takes, less than the fastest disk.
const (
	slowRequest = 20 * time.Microsecond
	scoreSlow   = 8
	scoreSpread = 24
	scoreMax    = 32
	spreadFor   = 32
)

var epoch = time.Now()

func (p *pace) start() { p.last = time.Since(epoch) }

func (p *pace) served(n int) {
	now := time.Since(epoch)
	p.observe(now-p.last, n)
	p.last = now
}

func (p *pace) observe(took time.Duration, n int) {
	if took <= slowRequest+time.Duration(n/4) {
		p.score = max(p.score-1, 0)
		return
	}
	if p.score = min(p.score+scoreSlow, scoreMax); p.score >= scoreSpread {
		p.spread = spreadFor
	}
}
