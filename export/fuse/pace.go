package fuse

import (
	"time"

	"mica/export/pacing"

	"golang.org/x/sys/unix"
)

// A pace watches how long requests take that are served on the thread that has read them. On memory,
// or from a cache, that is less than handing them to a goroutine costs, also if they are long. On a
// disk it is long, and requests that come at the same time would be done one after the other: when
// slow ones pile up, requests go to goroutines for a while, if there are others; then one is tried
// on the thread again. It belongs to a thread.
//
// A slow request now and then costs less than handing over all of them. And what took long because
// another thread had the processor is not slow: only a request for which the thread gave up the
// processor itself is, because it waited. That is asked for a while after one that took long.
type pace struct {
	pacing.Score
	last  time.Duration // when the request at hand was read, since epoch
	watch int           // requests that are still watched for waits
	waits int64         // of the thread, before the request at hand
	usage unix.Rusage   // memory for the question
}

// A request of n bytes takes long from slowRequest and a nanosecond for every 2 bytes on: more than
// memory takes, less than most disks. On a faster disk the threads together get about as much done.
const (
	slowRequest = 80 * time.Microsecond
	watchFor    = 16
)

var epoch = time.Now()

// begin tells whether the request at hand, small enough as it is, should be served on the thread;
// others says that more are under way.
func (p *pace) begin(others bool) bool {
	if p.Spread(others) {
		return false
	}
	if p.watch > 0 {
		p.waits = p.waited()
	}
	p.last = time.Since(epoch)
	return true
}

// served notes that a request of n bytes was served on the thread.
func (p *pace) served(n int) {
	long := time.Since(epoch)-p.last > slowRequest+time.Duration(n/2)
	switch {
	case p.watch > 0:
		p.observe(long, long && p.waited() > p.waits)
	case long:
		p.watch = watchFor
	}
}

// observe notes a request that was watched.
func (p *pace) observe(long, slow bool) {
	if p.watch--; long {
		p.watch = watchFor
	}
	p.Note(slow)
}

// waited counts how often the calling thread has given up the processor to wait.
func (p *pace) waited() int64 {
	if unix.Getrusage(unix.RUSAGE_THREAD, &p.usage) != nil {
		return 0
	}
	return p.usage.Nvcsw
}
