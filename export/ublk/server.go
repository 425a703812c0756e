package ublk

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// A spaceRefuser writes without waiting for space: it returns dev.ErrNoSpace where WriteAt
// would wait for some. Devices that wait implement it, so that waiting writes do not take
// all places from other requests.
type spaceRefuser interface {
	WriteAtNoWait(p []byte, off int64) (int, error)
}

// A server answers the requests of one ublk device from one dev.Device.
//
// Threads: one for each hardware queue (queue.serve), which answers short requests that the
// device can do at once; others go to the device's workers. They end when the device is stopped,
// or when leave was called.
type server struct {
	id, depth int
	fd        int // /dev/ublkcN
	d         dev.Device
	try       dev.Trier      // nil if d has none
	place     dev.Placer     // nil if d has none
	flush     dev.TryFlusher // nil if d has none
	noWait    spaceRefuser   // nil if d has none
	zero      dev.Zeroer     // nil if d has none
	discard   dev.Discarder  // nil if d has none
	readOnly  bool
	inlineMax int // longest request served on a queue's thread, bytes
	log       *slog.Logger
	onEnd     func() // called once when all threads have ended; may be nil

	queues []*queue
	w      workers
	bufs   buffers
	served atomic.Uint64 // requests taken from the driver

	noNowait  atomic.Bool   // the medium reads only at once
	ringReads atomic.Uint64 // for tests
	alive     atomic.Int32  // threads
	ended     chan struct{} // closed when all threads have ended
	shut      sync.Once
}

// newServer opens /dev/ublkcN. start begins to serve; close frees everything.
func newServer(i *devInfo, d dev.Device, readOnly bool, o *Options) (_ *server, err error) {
	s := &server{
		id: int(i.id), depth: int(i.depth), d: d, readOnly: readOnly, inlineMax: o.InlineMax, log: o.Logger,
		ended: make(chan struct{}),
	}
	s.try, _ = d.(dev.Trier)
	s.place, _ = d.(dev.Placer)
	s.flush, _ = d.(dev.TryFlusher)
	s.noWait, _ = d.(spaceRefuser)
	s.zero, _ = d.(dev.Zeroer)
	s.discard, _ = d.(dev.Discarder)
	s.w.init(s)
	if s.fd, err = openChar(int(i.id)); err != nil {
		return nil, err
	}
	for n := range int(i.queues) {
		q, err := newQueue(s, n)
		if err != nil {
			s.free()
			return nil, fmt.Errorf("ublk device %d: %w", i.id, err)
		}
		s.queues = append(s.queues, q)
	}
	return s, nil
}

// start starts the threads and returns when the driver has a command for every tag. On an error
// the threads have ended.
func (s *server) start() error {
	ready := make(chan error, len(s.queues))
	s.alive.Store(int32(len(s.queues)))
	for _, q := range s.queues {
		go q.serve(ready)
	}
	var errs []error
	for range s.queues {
		errs = append(errs, <-ready)
	}
	if err := errors.Join(errs...); err != nil {
		s.leave()
		return fmt.Errorf("ublk device %d: %w", s.id, err)
	}
	return nil
}

// queueEnded is the last act of a queue's thread.
func (s *server) queueEnded(*queue) {
	if s.alive.Add(-1) == 0 {
		close(s.ended)
		if s.onEnd != nil {
			s.onEnd()
		}
	}
}

// leave ends the threads once everything that was begun is answered. The device stays, its
// requests wait for another server.
func (s *server) leave() {
	for _, q := range s.queues {
		q.leave()
	}
	<-s.ended
	s.w.wait()
}

// close frees what the server holds; its threads have ended. Closing twice is fine.
func (s *server) close() {
	s.shut.Do(func() {
		s.w.wait()
		s.free()
	})
}

func (s *server) free() {
	for _, q := range s.queues {
		q.close()
	}
	s.bufs.trim()
	unix.Close(s.fd)
}

// copyIn takes the data of a write from the driver.
func (s *server) copyIn(t *task, p []byte) error {
	n, err := sysPread(s.fd, p, dataOffset(t.q.n, t.tag))
	if err == 0 && n < len(p) {
		return io.ErrUnexpectedEOF
	}
	return errOf(err)
}

// copyOut gives the driver the data of a read.
func (s *server) copyOut(t *task, p []byte) error {
	n, err := sysPwrite(s.fd, p, dataOffset(t.q.n, t.tag))
	if err == 0 && n < len(p) {
		return io.ErrShortWrite
	}
	return errOf(err)
}

// errOf is nil for 0, without an allocation.
func errOf(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
