package nbd

import "sync"

// A task is a request, or a piece of one, that a worker serves. The worker sends the reply (or
// the piece's part of it) and frees the task.
type task struct {
	req  request
	off  int64 // of this piece, bytes
	buf  *buffer
	data []byte // of this piece, in buf; nil for commands without data
	grp  *group // nil: the task is the whole request
	next *task
	seq  uint64 // order of submission

	hdr  [holeChunkSize]byte
	bufs [2][]byte
}

// A group is a request that is served in pieces.
type group struct {
	left int   // pieces not finished; guarded by conn.sendMu
	err  error // first error; guarded by conn.sendMu
}

var taskPool = sync.Pool{New: func() any { return new(task) }}

// changesData tells tasks that may wait for space from those that never do.
func (t *task) changesData() bool { return t.req.cmd == cmdWrite || t.req.cmd == cmdWriteZeroes }

// Limits of one connection.
const (
	maxTasks       = 256     // queued and being served
	maxTaskBytes   = 8 << 20 // in their buffers
	spareWorkers   = 4       // of Options.Workers, never used for writes
	defaultWorkers = 16
	leastWorkers   = spareWorkers + 1
)

// workers run a connection's tasks: goroutines that are started when there is something to do
// and end when there is not. Two queues: tasks that may wait for space use all workers but
// spareWorkers, others use all.
type workers struct {
	max    int
	budget *budget // of the server
	serve  func(*task)
	start  func() // runs work; made once, so that starting allocates nothing

	mu      sync.Mutex
	room    sync.Cond // a task has ended
	queue   [2]taskQueue
	running int // goroutines
	writing int // tasks of queue 1 being served
	tasks   int // queued or being served
	bytes   int // of their buffers
	seq     uint64
}

type taskQueue struct{ head, tail *task }

func (w *workers) init(max int, b *budget, serve func(*task)) {
	w.max, w.budget, w.serve = max, b, serve
	w.room.L = &w.mu
	w.start = w.work
}

// admit counts a task with a buffer of n bytes, waiting while the limits are used up. It will be
// submitted or cancelled. Only the reader calls it.
func (w *workers) admit(n int) {
	w.mu.Lock()
	for w.tasks >= maxTasks || w.bytes > 0 && w.bytes+n > maxTaskBytes {
		w.room.Wait()
	}
	w.tasks++
	w.bytes += n
	w.mu.Unlock()
	if n > 0 {
		w.budget.take(n, func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.bytes > n
		})
	}
}

// leave takes back what admit counted.
func (w *workers) leave(n int) {
	w.mu.Lock()
	w.tasks--
	w.bytes -= n
	w.room.Signal()
	w.mu.Unlock()
	if n > 0 {
		w.budget.give(n)
	}
}

// submit hands an admitted task to a worker.
func (w *workers) submit(t *task) {
	i := 0
	if t.changesData() {
		i = 1
	}
	w.mu.Lock()
	w.seq++
	t.seq = w.seq
	q := &w.queue[i]
	if q.tail == nil {
		q.head = t
	} else {
		q.tail.next = t
	}
	q.tail = t
	if w.running < w.max && (i == 0 || w.writing < w.max-spareWorkers) {
		w.running++
		go w.start()
	}
	w.mu.Unlock()
}

func (t *task) bytes() int {
	if t.buf == nil {
		return 0
	}
	return len(t.buf.b)
}

// work serves tasks until there is none that it may serve.
func (w *workers) work() {
	i := 0
	for {
		w.mu.Lock()
		w.writing -= i
		var t *task
		if t, i = w.takeLocked(); t == nil {
			w.running--
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		n := t.bytes()
		w.serve(t)
		w.leave(n)
	}
}

// takeLocked returns the task that waits longest of those that may be served, and the number of
// its queue. A write that is left over is taken by one of those that are writing now, when it
// is done.
func (w *workers) takeLocked() (*task, int) {
	t, i := w.queue[0].head, 0
	if wr := w.queue[1].head; wr != nil && w.writing < w.max-spareWorkers && (t == nil || wr.seq < t.seq) {
		t, i = wr, 1
	}
	if t == nil {
		return nil, 0
	}
	q := &w.queue[i]
	if q.head = t.next; q.head == nil {
		q.tail = nil
	}
	t.next = nil
	w.writing += i
	return t, i
}

// wait returns when no task is left. The reader calls it when it has stopped submitting.
func (w *workers) wait() {
	w.mu.Lock()
	for w.tasks > 0 {
		w.room.Wait()
	}
	w.mu.Unlock()
}

// inFlight counts tasks.
func (w *workers) inFlight() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tasks
}
