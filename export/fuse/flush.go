package fuse

import (
	"sync/atomic"
	"time"

	"mica/export/pacing"
)

// A flushTime is how long flushes of a device take, a running mean in nanoseconds; 0 is not known yet.
// Who writes and syncs in turn, as a database does and the journal of a file system, waits for each
// change of threads: flushes that are shorter than that, as on memory, are done on the thread that has
// read the request, if nothing else is under way.
type flushTime struct{ mean atomic.Int64 }

// shortFlush is several times what handing a request over and back takes, and much less than a disk.
const shortFlush = 200 * time.Microsecond

func (f *flushTime) short() bool {
	m := f.mean.Load()
	return m > 0 && m <= int64(shortFlush)
}

// took notes a flush.
func (f *flushTime) took(d time.Duration) {
	m := time.Duration(f.mean.Load())
	pacing.Mean(&m, d)
	f.mean.Store(int64(m)) // two at a time may lose one
}

// flush makes everything acknowledged before durable.
func (s *server) flush() error {
	begin := time.Now()
	err := s.d.Flush()
	s.flushes.took(time.Since(begin))
	return err
}
