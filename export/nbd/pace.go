package nbd

import "time"

// A pace watches how long requests that are served inline take. On memory or in a cache that is
// less than handing them to a worker would take; on a disk it is long, and a client with many
// requests in flight would see them done one after the other. After a slow one, the next few
// requests go to workers, if there is more than one; then it is tried again.
type pace struct {
	last time.Duration // when the last request was done, or the last receive
	slow int           // requests that should still go to workers
}

const (
	slowRequest = 100 * time.Microsecond
	slowSpread  = 64
)

var epoch = time.Now()

func (p *pace) start() { p.last = time.Since(epoch) }

func (p *pace) served() {
	now := time.Since(epoch)
	if now-p.last > slowRequest {
		p.slow = slowSpread
	}
	p.last = now
}
