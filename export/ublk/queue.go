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
	alone       int // how often in a row there was at most one completion
	reading     int // bytes in buffers of reads that the ring does
	misses      int // reads in a row that the page cache did not have
	unlooked    int // reads since it was asked last
	armed, busy int
	err         error // of the ring: nothing can be served any more
	stopped     bool  // the driver takes commands back
	cmd         [ioCmdLen]byte

	reap func(uring.Completion) // complete, made once

	mu     sync.Mutex
	done   []outcome // guarded by mu; of workers
	asleep bool      // guarded by mu; the thread must be woken
	quit   bool      // guarded by mu; begin nothing, end when nothing is busy
}

// An outcome is what becomes of a request: its length in bytes, or a negative errno.
type outcome struct {
	tag   uint16
	res   int32
	times taskTimes
}

// wakeData marks the completions of the poll of wakefd, readData and a tag those of reads; others
// carry a tag.
const (
	wakeData = 1 << 32
	readData = 1 << 33
)

// submitAfter is how many results are collected before the driver gets them.
const submitAfter = 16

func newQueue(s *server, n int) (*queue, error) {
	q := &queue{s: s, n: uint16(n), tasks: make([]task, s.depth)}
	q.reap = q.complete
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
	for i := range q.tasks { // of a ring that failed
		q.endRead(&q.tasks[i])
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
//
// One call of the kernel submits what is queued and brings what is ready. While requests come in
// crowds it does not wait, so that the Go scheduler need not know of it; when they come one by one
// it would only find out that there is nothing yet, and the call that waits does all.
func (q *queue) step() bool {
	if q.err == nil && q.ring.Ready() == 0 && q.alone < aloneFor {
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
	if n := q.ring.Reap(q.reap); n > 1 {
		q.alone = 0
	} else if q.alone < aloneFor {
		q.alone++
	}
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

// aloneFor is how many requests in a row must come alone until that is taken for a habit.
const aloneFor = 4

// takeDone commits what workers have finished, and says whether there was any. sleep: if there is
// none, the thread is going to wait, and the next one wakes it.
func (q *queue) takeDone(sleep bool) bool {
	q.mu.Lock()
	done := q.done
	q.done = nil
	q.asleep = sleep && len(done) == 0
	q.mu.Unlock()
	if len(done) > 0 {
		now := time.Since(epoch)
		for _, o := range done {
			q.pace.returned(o.times, now)
			q.commit(o.tag, o.res)
		}
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
func (q *queue) finish(o outcome) {
	q.mu.Lock()
	q.done = append(q.done, o)
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
		// Each write is told, so that nobody need read the counter.
		if !c.More() {
			q.submit(func() error { return q.ring.Poll(q.wakefd, unix.POLLIN, wakeData) })
		}
		return
	}
	if c.Data&readData != 0 {
		q.read(&q.tasks[uint16(c.Data)], c.Res)
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
	q.end(t, q.try(t))
}

// end commits a request of which try has returned err, or gives it to a worker.
func (q *queue) end(t *task, err error) {
	switch {
	case err == errLater:
	case err == dev.ErrWouldBlock:
		q.s.w.submit(t)
	case t.op == opFlush:
		q.commit(t.tag, result(0, err))
	default:
		q.commit(t.tag, result(int32(t.n), err))
	}
}

// errLater: the request is under way.
var errLater = errors.New("under way")

// try serves a request on the queue's thread, or returns ErrWouldBlock if that would be wrong, or
// errLater if a completion will end it.
func (q *queue) try(t *task) error {
	s := q.s
	if t.op == opFlush {
		return q.tryFlush()
	}
	if t.op == opRead && s.place != nil && t.n <= int64(s.inlineMax) {
		if err := q.tryPlaced(t); err != dev.ErrWouldBlock {
			return err
		}
	}
	if s.try == nil || t.n > int64(s.inlineMax) || t.op > opWrite || q.pace.Spread(q.busy > 1) {
		return dev.ErrWouldBlock
	}
	p := q.own(t.n)
	if p == nil {
		return dev.ErrWouldBlock
	}
	var err error
	switch {
	case t.op == opRead:
		if err = s.try.TryReadAt(p, t.off); err == nil {
			err = s.copyOut(t, p)
		}
	case s.readOnly:
		err = dev.ErrReadOnly
	case t.flags&flagFUA != 0:
		return dev.ErrWouldBlock
	default:
		if err = s.copyIn(t, p); err == nil {
			err = s.try.TryWriteAt(p, t.off)
		}
	}
	if errors.Is(err, dev.ErrWouldBlock) {
		return dev.ErrWouldBlock
	}
	q.pace.served(int(t.n))
	return err
}

// own is n bytes of the thread's own buffer, or nil.
func (q *queue) own(n int64) []byte {
	if q.buf == nil {
		var err error
		if q.buf, err = q.s.bufs.get(q.s.inlineMax); err != nil {
			return nil
		}
	}
	return q.buf.mem[:n]
}

// tryFlush flushes on the queue's thread, if nothing else waits for it and flushes are as short as
// the way to a worker and back: who writes and flushes in turn, as a database does, waits for
// every change of threads.
func (q *queue) tryFlush() error {
	if q.s.flush == nil || q.busy > 1 || !q.pace.flushHere() {
		return dev.ErrWouldBlock
	}
	if q.ring.Pending() > 0 { // results do not wait for the medium
		if q.err = q.ring.Enter(0); q.err != nil {
			return dev.ErrWouldBlock
		}
		if q.ring.Ready() > 0 { // neither do requests
			return dev.ErrWouldBlock
		}
	}
	q.pace.start()
	err := q.s.flush.TryFlush()
	if errors.Is(err, dev.ErrWouldBlock) {
		return dev.ErrWouldBlock
	}
	q.pace.flushed()
	return err
}

// result is what is committed: n, or the error.
func result(n int32, err error) int32 {
	if err != nil {
		return -int32(errnoOf(err))
	}
	return n
}
