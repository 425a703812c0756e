package fuse

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"mica/dev"

	"golang.org/x/sys/unix"
)

const (
	// queueDepth is the number of requests that a loop device has in flight.
	queueDepth = 128
	// maxBackground is the kernel's bound of asynchronous requests of one connection. A loop
	// request of more than maxIO becomes two of ours.
	maxBackground = 2 * queueDepth
	// waiterBytes bounds the payload that waiting reads, and waiting writes, hold.
	waiterBytes = 8 << 20
	// lateBytes bounds the payload of all writes of an exporter that wait for space beyond that.
	// The kernel has at most three quarters of a loop device's requests under way for write-back
	// (its write-back throttling), of at most maxIO: one device fits, and its write-back waits as a
	// whole, as it does on the kernel's own thin devices.
	lateBytes = 128 << 20
)

// A spaceRefuser writes without waiting for space: it returns dev.ErrNoSpace where WriteAt
// would wait for some. Devices that wait implement it, so that waiting writes do not take
// all places from other requests.
type spaceRefuser interface {
	WriteAtNoWait(p []byte, off int64) (int, error)
}

// A server answers the requests of one FUSE connection from one device.
//
// Threads: hands of the exporter's crew (serve) read requests from the same descriptor, one, or
// more when one finds request after request and more are faster (tuner). A request that the device can do at once is done
// and answered there; others get a slot, and a goroutine of their own (work). If nothing happens
// for a while the hands go, and the descriptor is watched by the exporter's parker, which starts
// the server again.
//
// A request is answered exactly once, and its buffer is not touched by anybody else until then.
type server struct {
	fd        int // /dev/fuse, non-blocking; owned by the attachment
	d         dev.Device
	try       dev.Trier          // nil if d has none
	noWait    spaceRefuser       // nil if d has none
	zero      dev.Zeroer         // nil if d has none
	ext       dev.Extenter       // nil if d has none
	blockSize uint32             // statfs's f_bsize: the pool's block size
	readOnly  bool               //
	size      atomic.Int64       // what the kernel was told, bytes
	inlineMax int                // longest request served on the thread that read it, bytes
	threads   int                // at most
	idle      time.Duration      // until the threads end
	park      func(*server) bool // watches fd and calls start; nil: threads never end
	onEnd     func()             // called once when the connection has ended; may be nil
	log       *slog.Logger
	epoch     time.Time // times of the inodes

	crew    *crew
	bufs    *buffers      // of the crew
	stopfd  int           // eventfd that wakes every thread
	epfd    int           // what threads wait on: fd and stopfd; made by the first, -1 before
	ready   chan struct{} // closed after INIT was answered
	kernel  features      // valid after ready
	gone    chan struct{} // closed when the connection has ended
	once    sync.Once     // closes gone
	served  atomic.Uint64 // requests read
	flushes flushTime
	tune    tuner
	atWork  atomic.Int32 // requests that goroutines serve
	alone   atomic.Bool  // one thread serves
	workers sync.WaitGroup
	thr     sync.WaitGroup

	mu       sync.Mutex
	cond     *sync.Cond // of mu: a slot or payload bytes were given back
	running  int        // guarded by mu; threads
	leaving  bool       // guarded by mu; one of them is about to end, others go on
	stopping bool       // guarded by mu
	slots    []*slot    // guarded by mu; unused
	made     int        // guarded by mu; slots made, at most maxBackground
	held     [2]int     // guarded by mu; payload bytes of waiting reads and writes
	waiting  [2]int     // guarded by mu; waiting reads and writes
}

// indices of held and waiting
const (
	reads  = 0
	writes = 1
)

// A slot is a request that is done by a goroutine of its own.
type slot struct {
	req   request
	buf   *buffer
	bytes int  // of payload, accounted in held
	kind  int  // reads, writes, or -1
	late  bool // bytes are accounted in crew.late
	run   func()
}

// features are what the kernel agreed to at INIT.
type features struct {
	Minor  uint32 `json:"minor"`
	Resend bool   `json:"resend"`
}

func newServer(fd int, d dev.Device, readOnly bool, o *Options) (*server, error) {
	s := &server{
		fd: fd, d: d, readOnly: readOnly,
		inlineMax: o.InlineMax, threads: o.Threads, idle: o.IdleAfter, log: o.Logger, epoch: time.Now(),
		ready: make(chan struct{}), gone: make(chan struct{}), epfd: -1,
	}
	s.join(new(crew))
	s.cond = sync.NewCond(&s.mu)
	s.try, _ = d.(dev.Trier)
	s.noWait, _ = d.(spaceRefuser)
	s.zero, _ = d.(dev.Zeroer)
	s.ext, _ = d.(dev.Extenter)
	s.blockSize = 4096
	if b, ok := d.(dev.BlockSizer); ok && b.BlockSize() >= 512 && b.BlockSize() <= 1<<30 {
		s.blockSize = uint32(b.BlockSize())
	}
	s.size.Store(d.Size())
	var err error
	if s.stopfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return s, nil
}

// join says whose threads serve; before start.
func (s *server) join(c *crew) { s.crew, s.bufs = c, &c.bufs }

// start starts the first thread. It does nothing when there is one or the server is stopping.
func (s *server) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running == 0 {
		s.addLocked()
	}
}

// greet answers the kernel's first request, INIT, which is there when a mount returns: before start,
// on the thread that has mounted, which would wait for another one to do so. If it is not there yet, a
// thread finds it.
func (s *server) greet() {
	b, err := s.bufs.get(classes[0])
	if err != nil {
		return
	}
	defer s.bufs.put(b)
	in := b.in()
	n, errno := sysRead(s.fd, in)
	if errno != 0 {
		return
	}
	s.served.Add(1)
	var r request
	if err := r.parse(in[:n]); err != nil || r.op != opInit {
		s.end(fmt.Errorf("request %d before INIT (%v): %w", r.op, err, errEnded))
		return
	}
	if err := s.init(&r, b); err != nil {
		s.end(err)
	}
}

// help starts another thread beside those that run, if there may be one.
func (s *server) help() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running > 0 {
		s.addLocked()
	}
}

func (s *server) addLocked() {
	if s.stopping || s.running >= s.threads {
		return
	}
	s.running++
	s.alone.Store(s.running == 1)
	s.thr.Add(1)
	s.crew.serve(s)
}

// stop ends the threads and waits until every request that was read is answered. The connection
// stays open; requests that come now wait for the next server. Stopping twice is fine.
func (s *server) stop() {
	s.mu.Lock()
	already := s.stopping
	s.stopping = true
	s.mu.Unlock()
	if !already {
		one := [8]byte{0: 1}
		unix.Write(s.stopfd, one[:])
	}
	s.thr.Wait()
	s.workers.Wait()
}

// close releases what the server itself holds; only after stop.
func (s *server) close() {
	unix.Close(s.stopfd)
	if s.epfd >= 0 {
		unix.Close(s.epfd)
	}
}

func (s *server) end(why error) {
	s.once.Do(func() {
		if why != nil {
			s.log.Warn("fuse connection ended", "error", why)
		}
		close(s.gone)
		if s.onEnd != nil {
			s.onEnd()
		}
	})
}

// exit ends the calling thread's part in the server. The last one of an idle server hands the
// descriptor to the parker.
func (s *server) exit(idle bool) {
	s.mu.Lock()
	s.running--
	s.leaving = false
	s.alone.Store(s.running == 1)
	last := s.running == 0 && idle && !s.stopping
	s.mu.Unlock()
	if last && !s.park(s) {
		s.start()
	}
	s.thr.Done()
}

// leave tells whether the calling thread may end because there is another one.
func (s *server) leave() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running < 2 || s.leaving {
		return false
	}
	s.leaving = true
	return true
}

// retryPause is how long a thread that lacks memory or descriptors waits before it tries again.
const retryPause = 100 * time.Millisecond

// serve is what a thread does for a server. Nobody else would serve the connection, so that it gives
// up only when the connection has ended, or there is nothing to do.
func (s *server) serve(h *hand) {
	for {
		idle, err := s.loop(h)
		if err == nil || errors.Is(err, errEnded) {
			if err != nil {
				s.end(err)
			}
			s.exit(idle)
			return
		}
		s.log.Error("fuse server thread", "error", err)
		p := []unix.PollFd{{Fd: int32(s.stopfd), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, int(retryPause.Milliseconds())); n == 1 {
			s.exit(false)
			return
		}
	}
}

// errEnded: the connection cannot be served any more.
var errEnded = errors.New("connection ended")

// longRun is how many requests a thread reads without having to wait before it gets help.
const longRun = 2

// loop reads and answers requests until the connection ends, the server stops, or it is idle.
func (s *server) loop(h *hand) (idle bool, err error) {
	epfd, err := s.epoll()
	if err != nil {
		return false, err
	}
	if h.buf == nil {
		if h.buf, err = s.bufs.get(maxIO); err != nil {
			return false, err
		}
	}
	buf := h.buf
	defer func() { h.buf = buf }()

	var req request
	var seen uint64 // of s.served
	run, mine := 0, 0
	for {
		in := buf.in()
		n, errno := sysRead(s.fd, in)
		switch errno {
		case 0:
			if run++; run >= longRun && s.threads > 1 && s.alone.Load() && s.tune.two.Load() {
				s.help()
			}
			mine++
		case unix.EAGAIN:
			run = 0
			// There is nothing to read, so that what comes now wakes the other thread.
			if !s.tune.two.Load() && !s.alone.Load() && s.leave() {
				return true, nil // if the other one has just ended as well, this is the last
			}
			s.tune.waits.Add(1)
			stop, timeout, err := s.wait(epfd)
			if err != nil || stop {
				return false, err
			}
			if timeout && s.park != nil && s.initialised() {
				if now := s.served.Load(); now == seen || mine == 0 && !s.alone.Load() {
					return true, nil
				} else {
					seen, mine = now, 0
				}
			}
			continue
		case unix.EINTR, unix.ENOENT: // ENOENT: the request was taken back
			continue
		case unix.ENODEV, unix.ECONNABORTED: // unmounted, aborted
			s.end(nil)
			return false, nil
		default:
			return false, fmt.Errorf("read /dev/fuse: %w", errno)
		}
		if n := s.served.Add(1); n%tuneEvery == 0 {
			s.tune.look(n, s.alone.Load())
		}
		if perr := req.parse(in[:n]); perr != nil {
			s.log.Error("fuse request", "error", perr)
			if req.unique != 0 && req.op != opForget && req.op != opBatchForget && req.op != opInterrupt {
				s.reply(buf, req.unique, unix.EIO, 0)
			}
			continue
		}
		if buf, err = s.dispatch(&req, buf, &h.pace, run == 1); err != nil {
			return false, err
		}
	}
}

func (s *server) initialised() bool {
	select {
	case <-s.ready:
		return true
	default:
		return false
	}
}

// epoll returns the thing that threads wait on; a request wakes one of them, a stop all. Requests
// are edge-triggered: a level would wake the next thread for the request that the first one is about
// to read. So a thread waits only after a read has found nothing.
func (s *server) epoll() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.epfd >= 0 {
		return s.epfd, nil
	}
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("epoll: %w", err)
	}
	for fd, events := range map[int]uint32{s.fd: unix.EPOLLIN | unix.EPOLLET, s.stopfd: unix.EPOLLIN} {
		ev := unix.EpollEvent{Events: events, Fd: int32(fd)}
		if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
			unix.Close(epfd)
			return -1, fmt.Errorf("epoll: %w", err)
		}
	}
	s.epfd = epfd
	return epfd, nil
}

// wait returns when there may be a request, when the server stops, or after the idle time.
func (s *server) wait(epfd int) (stop, timeout bool, err error) {
	var ev unix.EpollEvent
	ms := -1
	if s.park != nil {
		ms = int(s.idle.Milliseconds())
	}
	n, errno := epollWait(epfd, &ev, ms)
	switch {
	case errno == unix.EINTR:
		return false, false, nil
	case errno != 0:
		return false, false, fmt.Errorf("epoll_wait: %w", errno)
	}
	return n == 1 && int(ev.Fd) == s.stopfd, n == 0, nil
}

// reply answers a request with n bytes of payload in b. Errors mean that nobody waits any more:
// the request was taken back, or the connection has ended, which the next read tells.
func (s *server) reply(b *buffer, unique uint64, errno unix.Errno, n int) {
	msg := b.mem[room-outHeaderLen : room+n]
	putHeader(msg, len(msg), -int32(errno), unique)
	_, e := sysWrite(s.fd, msg)
	if e != 0 && e != unix.ENOENT && e != unix.ENODEV && e != unix.ECONNABORTED {
		s.log.Error("fuse reply", "unique", unique, "bytes", len(msg), "error", e)
		if n > 0 || errno == 0 {
			// The kernel refused the message and still waits.
			s.reply(b, unique, unix.EIO, 0)
		}
	}
}

// replyWritten answers a WRITE. b's payload is not touched.
func (s *server) replyWritten(b *buffer, unique uint64, n uint32) {
	msg := b.mem[:outHeaderLen+8]
	putHeader(msg, len(msg), 0, unique)
	ne.PutUint32(msg[outHeaderLen:], n)
	ne.PutUint32(msg[outHeaderLen+4:], 0)
	if _, e := sysWrite(s.fd, msg); e != 0 && e != unix.ENOENT && e != unix.ENODEV && e != unix.ECONNABORTED {
		s.log.Error("fuse reply", "unique", unique, "bytes", len(msg), "error", e)
	}
}

// notify sends a notification; payload follows the header in msg.
func (s *server) notify(code int32, payload []byte) error {
	msg := make([]byte, outHeaderLen+len(payload))
	putHeader(msg, len(msg), code, 0)
	copy(msg[outHeaderLen:], payload)
	for {
		_, err := unix.Write(s.fd, msg)
		if err != unix.EINTR {
			return err
		}
	}
}

// resized tells the kernel to ask for the file's size again.
func (s *server) resized(size int64) error {
	s.size.Store(size)
	var p [24]byte
	ne.PutUint64(p[:], diskNode)
	ne.PutUint64(p[8:], ^uint64(0)) // attributes only, no pages
	if err := s.notify(notifyInvalInode, p[:]); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("FUSE_NOTIFY_INVAL_INODE: %w", err)
	}
	return nil
}

// resend makes the kernel put every request that a predecessor read and did not answer back
// into the queue. Before start, or requests of this server would be done twice.
func (s *server) resend() error {
	if err := s.notify(notifyResend, nil); err != nil {
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
	}
	return nil
}
