// Package pacing tells servers of devices whether to do a request on the thread that has read it, or to
// give it to a worker. On memory or in a cache that is quicker than the way to a worker; on a disk
// requests that come together would be done one after the other. What makes a request slow is the
// server's to say.
package pacing

import "time"

// Of a Score.
const (
	Slow  = 8  // a slow request is up by so many points, another one is down by one
	Limit = 24 // from so many on requests are spread
	Max   = 32
	For   = 32 // so many requests, then one is tried inline again
)

// A Score counts slow requests. A slow one now and then is the scheduler's doing, or a cache's miss, and
// costs less than workers for all would. It belongs to a thread.
type Score struct {
	Points int // 0 to Max
	Left   int // requests that should still go to workers
}

// Note notes a request that was done inline.
func (s *Score) Note(slow bool) {
	if !slow {
		s.Points = max(s.Points-1, 0)
		return
	}
	if s.Points = min(s.Points+Slow, Max); s.Points >= Limit {
		s.Left = For
	}
}

// Spread tells whether the next request should go to a worker; others says that more are under way.
func (s *Score) Spread(others bool) bool {
	if s.Left == 0 {
		return false
	}
	s.Left--
	return others
}

// Mean moves a running mean, 0 before the first sample, towards a sample, by an eighth of the
// difference. A sample that is far away, as when the processor was taken away, counts for less.
func Mean(m *time.Duration, sample time.Duration) {
	if *m == 0 {
		*m = max(sample, 1)
		return
	}
	*m = max(*m+(min(sample, 8**m)-*m)/8, 1)
}
