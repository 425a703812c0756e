package nbd

import (
	"time"

	"mica/export/pacing"
)

// A pace watches how long requests that are served inline take. On memory or in a cache that is
// less than handing them to a worker would take; on a disk it is long, and a client with many
// requests in flight would see them done one after the other. When slow ones pile up, requests
// go to workers for a while, if there is more than one; then one is tried inline again.
//
// A slow request now and then is the scheduler's doing, or a cache's miss, and costs less than
// using workers for all would.
type pace struct {
	pacing.Score
	last time.Duration // when the last request was done, or the last receive
}

// A request of n bytes is slow if it takes more than slowRequest and a nanosecond for every 4
// bytes: several times what memory takes, less than the fastest disk.
const slowRequest = 20 * time.Microsecond

var epoch = time.Now()

func (p *pace) start() { p.last = time.Since(epoch) }

func (p *pace) served(n int) {
	now := time.Since(epoch)
	p.observe(now-p.last, n)
	p.last = now
}

func (p *pace) observe(took time.Duration, n int) {
	p.Note(took > slowRequest+time.Duration(n/4))
}
