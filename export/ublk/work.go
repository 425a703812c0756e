package ublk

import (
	"errors"
	"sync"
	"time"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// Limits of the goroutines of one device.
const (
	maxWorkers   = 64
	spareWorkers = 16      // never used for what may wait for space
	maxHeld      = 8 << 20 // bytes in buffers, for each class of tasks
)

// A task is a request that may have to wait. Its data stays with the driver until a worker takes
// it, so that waiting tasks cost no memory.
type task struct {
	ioDesc
	q    *queue
	tag  uint16
	next *task
	// refuse: half of the device's places wait, maybe for space: this write does not.
	refuse bool

	submitted time.Duration // since epoch; 0: it had to wait for its turn

	// Of a read that the ring does.
	buf   *buffer
	place dev.Place
}

// Classes of tasks.
const (
	goesOn   = 0 // never waits for space
	mayStall = 1
)

// workers are the goroutines of one device: they exist while there is work.
type workers struct {
	s     *server
	start func() // work, made once

	mu      sync.Mutex
	idle    *sync.Cond // of mu: nothing is left
	queue   [2]taskQueue
	serving [2]int // guarded by mu; tasks at workers
	waiting int    // guarded by mu; tasks of class mayStall, queued or at workers
	held    [2]int // guarded by mu; bytes in buffers
	running int    // guarded by mu; goroutines
}

type taskQueue struct{ head, tail *task }

func (w *workers) init(s *server) {
	w.s = s
	w.idle = sync.NewCond(&w.mu)
	w.start = w.work
}

func (t *task) class() int {
	if t.op == opWrite && !t.refuse || t.op == opWriteZeroes {
		return mayStall
	}
	return goesOn
}

// bytes is how large a buffer the task needs.
func (t *task) bytes() int {
	if t.op <= opWrite {
		return int(t.n)
	}
	return 0
}

// submit queues a task. It never waits.
func (w *workers) submit(t *task) {
	t.refuse, t.next = false, nil
	w.mu.Lock()
	c := t.class()
	if c == mayStall && t.op == opWrite && w.s.noWait != nil && w.waiting >= w.s.depth*len(w.s.queues)/2 {
		t.refuse = true
		c = goesOn
	}
	if c == mayStall {
		w.waiting++
	}
	l := &w.queue[c]
	if l.tail == nil {
		l.head = t
	} else {
		l.tail.next = t
	}
	l.tail = t
	t.submitted = 0
	if w.running < maxWorkers && w.fitsLocked(c) {
		if l.head == t {
			t.submitted = time.Since(epoch)
		}
		w.running++
		go w.start()
	}
	w.mu.Unlock()
}

// fitsLocked tells whether the first task of a class may be served now.
func (w *workers) fitsLocked(c int) bool {
	t := w.queue[c].head
	if t == nil || c == mayStall && w.serving[mayStall] >= maxWorkers-spareWorkers {
		return false
	}
	return w.held[c] == 0 || w.held[c]+t.bytes() <= maxHeld
}

// work serves tasks until there is none that may be served.
func (w *workers) work() {
	w.mu.Lock()
	for {
		c := goesOn
		if !w.fitsLocked(c) {
			c = mayStall
		}
		if !w.fitsLocked(c) {
			break
		}
		l := &w.queue[c]
		t := l.head
		if l.head = t.next; l.head == nil {
			l.tail = nil
		}
		n := t.bytes()
		w.serving[c]++
		w.held[c] += n
		w.mu.Unlock()

		o := outcome{tag: t.tag}
		if t.submitted != 0 {
			o.times = taskTimes{submitted: t.submitted, begun: time.Since(epoch), flush: t.op == opFlush}
		}
		o.res = w.s.do(t)
		w.mu.Lock()
		w.serving[c]--
		w.held[c] -= n
		if c == mayStall {
			w.waiting--
		}
		w.mu.Unlock()
		if t.submitted != 0 {
			o.times.ended = time.Since(epoch)
		}
		t.q.finish(o)
		w.mu.Lock()
	}
	w.running--
	if w.running == 0 && w.queue[goesOn].head == nil && w.queue[mayStall].head == nil {
		w.idle.Broadcast()
	}
	w.mu.Unlock()
}

// wait returns when nothing is queued or served.
func (w *workers) wait() {
	w.mu.Lock()
	for w.running > 0 || w.queue[goesOn].head != nil || w.queue[mayStall].head != nil {
		w.idle.Wait()
	}
	w.mu.Unlock()
}

// do serves a task, waiting where the device waits.
func (s *server) do(t *task) int32 {
	if s.readOnly && t.op != opRead && t.op != opFlush {
		return result(0, dev.ErrReadOnly)
	}
	switch t.op {
	case opRead, opWrite:
		b, err := s.bufs.get(int(t.n))
		if err != nil {
			s.log.Error("ublk request", "device", s.id, "op", opName(t.op), "error", err)
			return -int32(unix.ENOMEM)
		}
		defer s.bufs.put(b)
		p := b.mem[:t.n]
		if t.op == opRead {
			if n, rerr := s.d.ReadAt(p, t.off); n < len(p) {
				err = rerr
			} else {
				err = s.copyOut(t, p)
			}
			return result(int32(t.n), err)
		}
		if err = s.copyIn(t, p); err != nil {
			return result(0, err)
		}
		write := s.d.WriteAt
		if t.refuse {
			write = s.noWait.WriteAtNoWait
		}
		if _, err = write(p, t.off); err == nil && t.flags&flagFUA != 0 {
			err = s.d.Flush()
		}
		return result(int32(t.n), err)
	case opFlush:
		return result(0, s.d.Flush())
	case opDiscard:
		if s.discard == nil {
			return 0
		}
		err := s.discard.Discard(t.off, t.n)
		if errors.Is(err, dev.ErrUnsupported) {
			err = nil // it is a hint
		}
		return result(0, err)
	case opWriteZeroes:
		err := s.writeZeroes(t.off, t.n, t.flags&flagNoUnmap != 0)
		if err == nil && t.flags&flagFUA != 0 {
			err = s.d.Flush()
		}
		return result(0, err)
	}
	return -int32(unix.EOPNOTSUPP)
}

var zeros [64 << 10]byte

func (s *server) writeZeroes(off, n int64, keep bool) error {
	if s.zero != nil {
		if err := s.zero.WriteZeroes(off, n, keep); !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
	}
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := s.d.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}
