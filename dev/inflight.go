package dev

import (
	"sync"
	"sync/atomic"
)

// closedBit is added to inflight.n by Close; a count of requests never reaches it.
const closedBit = 1 << 62

// inflight counts the requests of a device so that Close can wait for them. The zero value is
// ready. A request costs two atomic additions.
type inflight struct {
	n    atomic.Int64
	mu   sync.Mutex
	idle *sync.Cond // guarded by mu; signalled when the last request of a closed device ends
}

// enter begins a request; false when the device is closed.
func (f *inflight) enter() bool {
	if f.n.Add(1) > closedBit {
		f.leave()
		return false
	}
	return true
}

func (f *inflight) leave() {
	if f.n.Add(-1) == closedBit {
		f.mu.Lock()
		if f.idle != nil {
			f.idle.Broadcast()
		}
		f.mu.Unlock()
	}
}

// close refuses new requests and waits for those in flight. It reports whether this call was
// the first; the others return at once.
func (f *inflight) close() (first bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.idle != nil {
		return false
	}
	f.idle = sync.NewCond(&f.mu)
	f.n.Add(closedBit)
	for f.n.Load() != closedBit {
		f.idle.Wait()
	}
	return true
}
