package ublk

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// A slowDevice keeps requests until they are let go.
type slowDevice struct {
	*dev.Mem
	mu       sync.Mutex
	flushing int
	most     int
	let      chan struct{}
	noWaits  atomic.Int64
}

func (d *slowDevice) Flush() error {
	d.mu.Lock()
	d.flushing++
	d.most = max(d.most, d.flushing)
	d.mu.Unlock()
	<-d.let
	d.mu.Lock()
	d.flushing--
	d.mu.Unlock()
	return nil
}

func (d *slowDevice) ReadAt(p []byte, off int64) (int, error) {
	<-d.let
	return d.Mem.ReadAt(p, off)
}

func (d *slowDevice) WriteZeroes(off, n int64, keep bool) error {
	<-d.let
	return nil
}

func (d *slowDevice) WriteAtNoWait(p []byte, off int64) (int, error) {
	d.noWaits.Add(1)
	return 0, dev.ErrNoSpace
}

// newIdleServer is a server without a driver: tasks without data can be served.
func newIdleServer(t *testing.T, d dev.Device, depth int) *server {
	t.Helper()
	s := &server{depth: depth, d: d, fd: -1, ended: make(chan struct{})}
	s.noWait, _ = d.(spaceRefuser)
	s.zero, _ = d.(dev.Zeroer)
	s.w.init(s)
	q := &queue{s: s, tasks: make([]task, depth)}
	q.reap = q.complete
	for i := range q.tasks {
		q.tasks[i] = task{q: q, tag: uint16(i)}
	}
	s.queues = []*queue{q}
	t.Cleanup(s.bufs.trim)
	return s
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// TestWorkersKeepPlaces: what may wait for space never takes all workers: flushes go on.
func TestWorkersKeepPlaces(t *testing.T) {
	d := &slowDevice{Mem: dev.NewMem(1 << 20), let: make(chan struct{})}
	s := newIdleServer(t, d, 128)
	q := s.queues[0]
	for i := range 100 {
		q.tasks[i].ioDesc = ioDesc{op: opWriteZeroes, n: 4096}
		s.w.submit(&q.tasks[i])
	}
	waitFor(t, "zeroing does not begin", func() bool {
		s.w.mu.Lock()
		defer s.w.mu.Unlock()
		return s.w.serving[mayStall] == maxWorkers-spareWorkers
	})
	for i := 100; i < 128; i++ {
		q.tasks[i].ioDesc = ioDesc{op: opFlush}
		s.w.submit(&q.tasks[i])
	}
	waitFor(t, "flushes wait behind what waits for space", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.flushing == spareWorkers
	})
	close(d.let)
	s.w.wait()
	if len(q.done) != 128 {
		t.Errorf("%d outcomes, want 128", len(q.done))
	}
	seen := map[uint16]bool{}
	for _, o := range q.done {
		if o.res != 0 || seen[o.tag] {
			t.Errorf("outcome %+v", o)
		}
		seen[o.tag] = true
	}
	if s.w.running != 0 || s.w.waiting != 0 || s.w.held != [2]int{} {
		t.Errorf("left: %d running, %d waiting, %d bytes", s.w.running, s.w.waiting, s.w.held)
	}
}

// TestHalfMayWait: when half of a device's places wait, further writes are refused at once where
// they would have to wait for space.
func TestHalfMayWait(t *testing.T) {
	d := &slowDevice{Mem: dev.NewMem(1 << 20), let: make(chan struct{})}
	s := newIdleServer(t, d, 8)
	q := s.queues[0]
	for i := range 4 {
		q.tasks[i].ioDesc = ioDesc{op: opWriteZeroes, n: 4096}
		s.w.submit(&q.tasks[i])
	}
	w := &q.tasks[4]
	w.ioDesc = ioDesc{op: opWrite, n: 4096}
	s.w.submit(w)
	waitFor(t, "the write waits", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return len(q.done) == 1
	})
	if !w.refuse {
		t.Error("a write beyond half of the places may wait")
	}
	// Its data cannot be had without a driver; what counts is that it did not wait.
	if q.done[0].tag != 4 || q.done[0].res != -int32(unix.EBADF) {
		t.Errorf("outcome %+v", q.done[0])
	}
	close(d.let)
	s.w.wait()
	w.ioDesc = ioDesc{op: opWrite, n: 4096}
	s.w.submit(w)
	s.w.wait()
	if w.refuse {
		t.Error("a write may not wait though nothing else does")
	}
}

// TestHeldIsBounded: requests that wait for the device hold no more than so many bytes in buffers, and
// none while they are queued.
func TestHeldIsBounded(t *testing.T) {
	d := &slowDevice{Mem: dev.NewMem(64 << 20), let: make(chan struct{})}
	s := newIdleServer(t, d, 64)
	q := s.queues[0]
	for i := range q.tasks {
		q.tasks[i].ioDesc = ioDesc{op: opRead, n: maxIO}
		s.w.submit(&q.tasks[i])
	}
	out := func() int {
		s.bufs.mu.Lock()
		defer s.bufs.mu.Unlock()
		return s.bufs.out
	}
	waitFor(t, "reads do not begin", func() bool { return out() >= maxHeld/maxIO })
	time.Sleep(10 * time.Millisecond) // for those that should not
	if n := out(); n > maxHeld/maxIO {
		t.Errorf("64 reads of 1 MiB hold %d buffers, want %d at most", n, maxHeld/maxIO)
	}
	close(d.let)
	s.w.wait()
	if len(q.done) != 64 || out() != 0 {
		t.Errorf("%d outcomes, %d buffers are out", len(q.done), out())
	}
}

// TestIdleHoldsNoBuffers: the sweeper takes the buffers of a device that has nothing to do.
func TestIdleHoldsNoBuffers(t *testing.T) {
	s := newIdleServer(t, dev.NewMem(1<<20), 8)
	e := &Exporter{o: Options{IdleAfter: 5 * time.Millisecond}, stop: make(chan struct{})}
	e.x.Records.Dir = t.TempDir()
	_, err := e.x.Attach("x", s.d, export.AttachOptions{}, func(export.AttachOptions, func()) (record, *device, error) {
		return record{}, &device{s: s}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	e.wg.Go(e.sweepLoop)
	defer func() { close(e.stop); e.wg.Wait() }()
	one, err := s.bufs.get(4096)
	if err != nil {
		t.Fatal(err)
	}
	s.bufs.put(one)
	waitFor(t, "an idle device keeps its buffers", func() bool {
		s.bufs.mu.Lock()
		defer s.bufs.mu.Unlock()
		return len(s.bufs.free[0]) == 0
	})
}

func TestBuffers(t *testing.T) {
	var p buffers
	for _, n := range []int{1, 16 << 10, 16<<10 + 1, maxIO} {
		b, err := p.get(n)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.mem) < n {
			t.Errorf("%d bytes for %d", len(b.mem), n)
		}
		p.put(b)
	}
	if p.out != 0 {
		t.Errorf("%d handed out", p.out)
	}
	p.trim()
	for c, l := range p.free {
		if len(l) > 0 {
			t.Errorf("class %d keeps %d buffers", c, len(l))
		}
	}
}
