package ublk

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"mica/dev"
	"mica/internal/uring"

	"golang.org/x/sys/unix"
)

// A queue is one hardware queue of a device: a ring, and the thread that owns it. Requests have
// tags; the driver has a command of ours for each tag that it may answer with a request.
//
// States of a tag: armed (the driver has its command) -> busy (a request is served) -> armed, by
// the commit of its result. When the device is stopped, the driver answers all commands with
// ENODEV and no tag is armed any more: the thread ends.
type queue struct {
	s      *server
	n      uint16
	descs  []byte // the driver's descriptors, mapped
	wakefd int    // eventfd
	tasks  []task // one for each tag

	tid int // of the thread; set before its goroutine ends

	// The thread's own.
	ring        *uring.Ring
	buf         *buffer // while the thread is awake
	pace        pace
	armed, busy int
	err         error // of the ring: nothing can be served any more
	stopped     bool  // the driver takes commands back
	cmd         [ioCmdLen]byte

	mu     sync.Mutex
	done   []outcome // guarded by mu; of workers
	asleep bool      // guarded by mu; the thread must be woken
	quit   bool      // guarded by mu; begin nothing, end when nothing is busy
}

// An outcome is what becomes of a request: its length in bytes, or a negative errno.
type outcome struct {
	tag uint16
	res int32
}

// wakeData marks the completions of the poll of wakefd; others carry a tag.
const wakeData = 1 << 32

// submitAfter is how many results are collected before the driver gets them.
const submitAfter = 16

func newQueue(s *server, n int) (*queue, error) {
	q := &queue{s: s, n: uint16(n), tasks: make([]task, s.depth)}
	for i := range q.tasks {
		q.tasks[i] = task{q: q, tag: uint16(i)}
	}
	size := (s.depth*ioDescLen + 4095) &^ 4095
	var err error
	if q.descs, err = unix.Mmap(s.fd, descsOffset(n), size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("map the requests of queue %d: %w", n, err)
	}
	if q.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Munmap(q.descs)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return q, nil
}

// close frees the ring and what newQueue made, when the thread is gone; its goroutine has ended.
func (q *queue) close() {
	if q.tid != 0 {
		waitThread(q.tid)
	}
	if q.ring != nil {
		q.ring.Close()
	}
	unix.Munmap(q.descs)
	unix.Close(q.wakefd)
}

// serve is the thread. ready gets nil when every tag is armed, else why not.
//
// To the driver the thread is the server of the queue, so that it ends with this goroutine, which
// never unlocks it. What the driver still has of it is cancelled by the kernel when the thread
// exits, in order with the requests that are just being delivered to it. Were the ring closed while
// the thread lives, both would happen at the same time, and kernels are known that free a command
// twice then. So the ring is closed when the thread is gone (close).
func (q *queue) serve(ready chan<- error) {
	runtime.LockOSThread()
	if q.tid = unix.Gettid(); q.tid == unix.Getpid() {
		// The first thread of a Go program does not end. Another goroutine gets another thread, as
		// long as this one has it.
		another := make(chan struct{})
		go func() { close(another); q.serve(ready) }()
		<-another
		runtime.UnlockOSThread()
		return
	}
	defer q.s.queueEnded(q)
	var err error
	if q.ring, err = uring.New(uring.Options{Entries: q.s.depth}); err != nil {
		ready <- err
		return
	}
	if err := q.arm(); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for q.step() {
	}
	q.idle()
	if q.err != nil {
		q.s.log.Error("ublk queue", "device", q.s.id, "queue", q.n, "error", q.err)
	}
}

// waitThread waits until a thread of this process has exited.
func waitThread(tid int) {
	path := fmt.Sprintf("/proc/self/task/%d", tid)
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		if err := unix.Access(path, unix.F_OK); err != nil {
			return
		}
		<-time.After(pause)
	}
}

// arm gives the driver a command for each tag.
func (q *queue) arm() error {
	q.submit(func() error { return q.ring.Poll(q.wakefd, unix.POLLIN, wakeData) })
	for i := range q.tasks {
		if q.ring.Pending() == q.s.depth { // the rest goes with the last
			if q.err = q.ring.Enter(0); q.err != nil {
				break
			}
		}
		encodeIOCmd(&q.cmd, q.n, uint16(i), -1)
		q.submit(func() error { return q.ring.Command(q.s.fd, ioFetch, uint64(i), q.cmd[:]) })
		q.armed++
	}
	if q.err == nil {
		q.err = withoutAdmin(func() error { return q.ring.Enter(0) })
	}
	// What the driver refuses it refuses at once.
	q.ring.Reap(func(c uring.Completion) {
		if c.Res < 0 && q.err == nil {
			q.err = fmt.Errorf("queue %d: fetch: %w", q.n, unix.Errno(-c.Res))
		}
	})
	return q.err
}

// submit queues an entry, making room if need be.
func (q *queue) submit(fn func() error) {
	if q.err != nil {
		return
	}
	err := fn()
	for errors.Is(err, uring.ErrFull) {
		if err = q.ring.Enter(0); err == nil {
			err = fn()
		}
	}
	q.err = err
}

// step waits for something to do and does it. False when the queue has ended.
func (q *queue) step() bool {
	// What is ready costs one call that does not wait.
	if q.err == nil && q.ring.Ready() == 0 {
		q.err = q.ring.Enter(0)
	}
	if q.err == nil && q.ring.Ready() == 0 {
		if !q.takeDone(true) {
			q.idle()
			q.err = q.ring.Enter(1)
		}
		q.mu.Lock()
		q.asleep = false
		q.mu.Unlock()
	}
	q.pace.start()
	q.ring.Reap(q.complete)
	q.takeDone(false)
	q.mu.Lock()
	quit := q.quit
	q.mu.Unlock()
	switch {
	case q.err != nil, quit && q.busy == 0:
		if q.err == nil {
			q.err = q.ring.Enter(0) // the last results
		}
		return false
	case q.armed == 0 && q.busy == 0:
		return false
	}
	return true
}

// takeDone commits what workers have finished, and says whether there was any. sleep: if there is
// none, the thread is going to wait, and the next one wakes it.
func (q *queue) takeDone(sleep bool) bool {
	q.mu.Lock()
	done := q.done
	q.done = nil
	q.asleep = sleep && len(done) == 0
	q.mu.Unlock()
	for _, o := range done {
		q.commit(o.tag, o.res)
	}
	if done != nil {
		q.mu.Lock()
		if q.done == nil {
			q.done = done[:0]
		}
		q.mu.Unlock()
	}
	return len(done) > 0
}

// finish is a worker's: the request of a tag is served.
func (q *queue) finish(tag uint16, res int32) {
	q.mu.Lock()
	q.done = append(q.done, outcome{tag, res})
	wake := q.asleep
	q.asleep = false
	q.mu.Unlock()
	if wake {
		q.wake()
	}
}

// leave makes the thread end when what it has begun is answered.
func (q *queue) leave() {
	q.mu.Lock()
	q.quit = true
	q.mu.Unlock()
	q.wake()
}

func (q *queue) wake() {
	one := [8]byte{0: 1} // in the byte order of all machines that this is built for
	unix.Write(q.wakefd, one[:])
}

// complete is one completion.
func (q *queue) complete(c uring.Completion) {
	if c.Data == wakeData {
		var b [8]byte
		unix.Read(q.wakefd, b[:])
		if !c.More() {
			q.submit(func() error { return q.ring.Poll(q.wakefd, unix.POLLIN, wakeData) })
		}
		return
	}
	q.armed--
	if c.Res != 0 {
		if c.Res != -int32(unix.ENODEV) && !q.stopped {
			q.s.log.Error("ublk command", "device", q.s.id, "queue", q.n, "tag", c.Data, "error", unix.Errno(-c.Res))
		}
		q.stopped = true
		return
	}
	q.mu.Lock()
	quit := q.quit
	q.mu.Unlock()
	if quit {
		return // never begun: the driver gives it to the next server
	}
	q.busy++
	q.s.served.Add(1)
	q.request(uint16(c.Data))
}

// commit gives the driver the result of a request, and the next command for its tag.
func (q *queue) commit(tag uint16, res int32) {
	encodeIOCmd(&q.cmd, q.n, tag, res)
	q.submit(func() error { return q.ring.Command(q.s.fd, ioCommitAndFetch, uint64(tag), q.cmd[:]) })
	q.busy--
	q.armed++
	if q.err == nil && q.ring.Pending() >= submitAfter {
		q.err = q.ring.Enter(0)
	}
}

// idle gives the buffer back while the thread waits.
func (q *queue) idle() {
	if q.buf != nil {
		q.s.bufs.put(q.buf)
		q.buf = nil
	}
}

// request serves a request at once, if it is short and the device can, and commits it; others
// become tasks.
func (q *queue) request(tag uint16) {
	r := decodeIODesc(q.descs[int(tag)*ioDescLen:])
	t := &q.tasks[tag]
	t.ioDesc = r
	s := q.s
	if s.try == nil || r.n > int64(s.inlineMax) || r.op > opWrite || q.pace.takeSpread(q.busy > 1) {
		s.w.submit(t)
		return
	}
	if q.buf == nil {
		var err error
		if q.buf, err = s.bufs.get(s.inlineMax); err != nil {
			s.w.submit(t)
			return
		}
	}
	p := q.buf.mem[:r.n]
	var err error
	switch {
	case r.op == opRead:
		if err = s.try.TryReadAt(p, r.off); err == nil {
			err = s.copyOut(t, p)
		}
	case s.readOnly:
		err = dev.ErrReadOnly
	case r.flags&flagFUA != 0:
		err = dev.ErrWouldBlock
	default:
		if err = s.copyIn(t, p); err == nil {
			err = s.try.TryWriteAt(p, r.off)
		}
	}
	if errors.Is(err, dev.ErrWouldBlock) {
		s.w.submit(t)
		return
	}
	q.pace.served(int(r.n))
	q.commit(tag, result(int32(r.n), err))
}

// result is what is committed: n, or the error.
func result(n int32, err error) int32 {
	if err != nil {
		return -int32(errnoOf(err))
	}
	return n
}

// A pace watches how long requests that are served on the queue's thread take, as that of the NBD
// server does: on a disk they would be done one after the other.
type pace struct {
	last   time.Duration
	score  int
	spread int // requests that should still go to workers
}

const (
	slowRequest = 20 * time.Microsecond // and a nanosecond for every 4 bytes
	scoreSlow   = 8
	scoreSpread = 24
	scoreMax    = 32
	spreadFor   = 32
)

var epoch = time.Now()

func (p *pace) start() { p.last = time.Since(epoch) }

// takeSpread tells whether the next request should go to a worker; others are under way.
func (p *pace) takeSpread(others bool) bool {
	if p.spread == 0 {
		return false
	}
	p.spread--
	return others
}

func (p *pace) served(n int) {
	now := time.Since(epoch)
	took := now - p.last
	p.last = now
	if took <= slowRequest+time.Duration(n/4) {
		p.score = max(p.score-1, 0)
		return
	}
	if p.score = min(p.score+scoreSlow, scoreMax); p.score >= scoreSpread {
		p.spread = spreadFor
	}
}
