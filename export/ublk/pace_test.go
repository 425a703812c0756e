package ublk

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"mica/dev"
	"mica/internal/uring"

	"golang.org/x/sys/unix"
)

// took lets the pace see a request of 4 KiB that took d.
func (p *pace) sawServed(d time.Duration) {
	p.last = time.Since(epoch) - d
	p.served(4096)
}

// sawReturned lets it see one that a worker served in d, whose way there and back took way.
func (p *pace) sawReturned(way, d time.Duration, flush bool) {
	const start = time.Hour
	p.returned(taskTimes{submitted: start, begun: start + way/2, ended: start + way/2 + d, flush: flush}, start+way+d)
}

func TestPace(t *testing.T) {
	var p pace
	for range 100 {
		p.start()
		p.served(4096)
	}
	if p.Left != 0 {
		t.Error("fast requests go to workers")
	}
	for range 3 {
		p.sawServed(time.Millisecond)
	}
	if p.Left == 0 || !p.Spread(true) || p.Spread(false) {
		t.Error("slow requests do not go to workers")
	}
}

// TestPaceAsDearAsTheWay: a request is slow if it takes longer than the way to a worker, on this
// machine, now.
func TestPaceAsDearAsTheWay(t *testing.T) {
	var p pace
	for range 100 {
		p.sawReturned(5*time.Millisecond, 10*time.Millisecond, false)
	}
	for range 100 {
		p.sawServed(time.Millisecond)
	}
	if p.Left != 0 {
		t.Error("requests go to workers though the way takes longer")
	}
	for range 100 {
		p.sawReturned(5*time.Microsecond, 10*time.Millisecond, false)
	}
	for range 3 {
		p.sawServed(time.Millisecond)
	}
	if p.Left == 0 {
		t.Error("requests do not go to workers though the way is short again")
	}
	before := p.handoff
	p.returned(taskTimes{}, time.Hour) // it had to wait for its turn
	if p.handoff != before {
		t.Error("waiting for a turn counts as the way")
	}
	p.sawReturned(time.Hour, 0, false)
	if p.handoff > 2*before {
		t.Errorf("one sample moves the mean from %v to %v", before, p.handoff)
	}
}

func TestFlushHere(t *testing.T) {
	for _, c := range []struct {
		way, flush time.Duration
		here       bool
	}{
		{10 * time.Microsecond, 50 * time.Microsecond, true},
		{10 * time.Microsecond, 500 * time.Microsecond, false},
		{10 * time.Microsecond, 10 * time.Millisecond, false},
		{time.Millisecond, 2 * time.Millisecond, true},
		{time.Millisecond, 10 * time.Millisecond, false},
	} {
		var p pace
		if p.flushHere() {
			t.Error("a flush is done here before it is known what one takes")
		}
		for range 50 {
			p.sawReturned(c.way, c.flush, true)
		}
		if got := p.flushHere(); got != c.here {
			t.Errorf("flush of %v, way of %v: here %v, want %v", c.flush, c.way, got, c.here)
		}
		for range 50 { // the medium becomes slow, which is seen here
			p.last = time.Since(epoch) - time.Second
			p.flushed()
		}
		if p.flushHere() {
			t.Error("flushes of a second are done here")
		}
	}
}

// A flushing device counts both ways of flushing.
type flushing struct {
	*dev.Mem
	flushes, tries int
	err            error
}

func (d *flushing) Flush() error { d.flushes++; return nil }

func (d *flushing) TryFlush() error { d.tries++; return d.err }

// TestTryFlush: a flush is done on the queue's thread if it is the only request, and short.
func TestTryFlush(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	d := &flushing{Mem: dev.NewMem(1 << 20)}
	s := newIdleServer(t, d, 4)
	s.flush = d
	q := s.queues[0]
	var err error
	if q.ring, err = uring.New(uring.Options{Entries: 4}); err != nil {
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			t.Skipf("SKIPPED: no io_uring here: %v", err)
		}
		t.Fatal(err)
	}
	defer q.ring.Close()
	flush := func(what string, busy int, want error, tries int) {
		t.Helper()
		q.busy, d.tries = busy, 0
		q.tasks[0].ioDesc = ioDesc{op: opFlush}
		if err := q.try(&q.tasks[0]); err != want || d.tries != tries {
			t.Errorf("%s: %v after %d tries, want %v after %d", what, err, d.tries, want, tries)
		}
	}
	flush("the first", 1, dev.ErrWouldBlock, 0)
	q.pace.sawReturned(10*time.Microsecond, 10*time.Microsecond, true)
	flush("a short one", 1, nil, 1)
	flush("beside another request", 2, dev.ErrWouldBlock, 0)
	d.err = unix.EIO
	flush("one that fails", 1, unix.EIO, 1)
	d.err = dev.ErrWouldBlock
	flush("one that would have to commit", 1, dev.ErrWouldBlock, 1)
	d.err = nil
	q.ring.Command(-1, 0, 7, nil) // a result that waits: the kernel refuses it at once
	flush("requests have come meanwhile", 1, dev.ErrWouldBlock, 0)
	if q.ring.Pending() != 0 || q.ring.Ready() != 1 {
		t.Errorf("%d results wait, %d completions are there", q.ring.Pending(), q.ring.Ready())
	}
	if d.flushes != 0 {
		t.Errorf("%d flushes that may wait", d.flushes)
	}
}
