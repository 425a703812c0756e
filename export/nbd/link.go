package nbd

import (
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A link is the byte stream of one connection in the transmission phase.
type link interface {
	// recv receives at least one byte into p(). Only the connection's reader calls it. Before
	// it waits it calls idle; after that it takes p anew.
	recv(p func() []byte, idle func()) (int, error)
	// send sends all of bufs, in order. It may change bufs. Calls are serialised by the caller.
	send(bufs [][]byte) error
	// interrupt makes recv fail with os.ErrDeadlineExceeded, now and later, once it would wait.
	interrupt()
	// resume takes an interrupt back; only the reader calls it.
	resume()
	// abort makes recv and send fail soon, from any goroutine.
	abort()
}

// A sock is a link over a stream socket. The descriptor is used directly for what does not
// wait; waiting is the runtime poller's. It is valid until the owner of the connection closes
// it, which it does after the last user is done.
type sock struct {
	nc net.Conn
	rc syscall.RawConn
	fd int

	misses int // spins without success, one after another

	// State of the call of recv that is under way, for recvReady.
	p        func() []byte
	idle     func()
	n        int
	err      error
	recvOnce func(fd uintptr) bool

	// State of the call of send that is under way, for sendReady.
	iov      []unix.Iovec // what is left
	iovs     []unix.Iovec // memory of iov
	sendErr  error
	sendOnce func(fd uintptr) bool
}

// sendBuffer is how much of its replies a connection may leave with the kernel, in bytes. With
// the usual 208 KiB, a reply of 1 MiB takes five rounds of waiting for the client.
const sendBuffer = 1 << 20

func newSock(nc net.Conn) (*sock, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("%T has no descriptor", nc)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &sock{nc: nc, rc: rc}
	if err := rc.Control(func(fd uintptr) { s.fd = int(fd) }); err != nil {
		return nil, err
	}
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil { // needs CAP_NET_ADMIN
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer) // up to net.core.wmem_max
	}
	s.recvOnce, s.sendOnce = s.recvReady, s.sendReady
	return s, nil
}

// Spinning spares both sides a sleep and a wake-up between two requests that come one after the
// other, which cost more than the requests themselves. spinTries is some 7 us. A client that
// is slower than that several times in a row is spun for only now and then.
const (
	spinTries  = 16
	spinMisses = 64
	spinEvery  = 8
)

func (s *sock) recv(p func() []byte, idle func()) (int, error) {
	if n, again, err := recvNow(s.fd, p()); !again {
		return n, err
	}
	if s.misses < spinMisses || s.misses%spinEvery == 0 {
		for range spinTries {
			if n, again, err := recvNow(s.fd, p()); !again {
				s.misses = 0
				return n, err
			}
		}
	}
	s.misses++
	s.p, s.idle, s.n, s.err = p, idle, 0, nil
	if err := s.rc.Read(s.recvOnce); err != nil {
		return 0, err
	}
	return s.n, s.err
}

// recvReady is called by the poller: once at the start, and when the socket may be readable.
func (s *sock) recvReady(uintptr) bool {
	n, again, err := recvNow(s.fd, s.p())
	if again {
		s.idle()
		return false
	}
	s.n, s.err = n, err
	return true
}

// recvNow receives without waiting; again tells that there was nothing.
func recvNow(fd int, p []byte) (n int, again bool, err error) {
	for {
		n, errno := recvfrom(fd, p)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			return 0, true, nil
		case errno != 0:
			return 0, false, os.NewSyscallError("recv", errno)
		case n == 0:
			return 0, false, io.EOF
		default:
			return n, false, nil
		}
	}
}

func (s *sock) send(bufs [][]byte) error {
	s.iovs = s.iovs[:0]
	for _, b := range bufs {
		if len(b) > 0 {
			s.iovs = append(s.iovs, iovec(b))
		}
	}
	s.iov, s.sendErr = s.iovs, nil
	if !s.sendNow() {
		if err := s.rc.Write(s.sendOnce); err != nil && s.sendErr == nil {
			s.sendErr = err
		}
	}
	clear(s.iovs) // keep no buffer alive
	return s.sendErr
}

func (s *sock) sendReady(uintptr) bool { return s.sendNow() }

// sendNow sends what the socket takes and tells whether the call of send is finished.
func (s *sock) sendNow() bool {
	for len(s.iov) > 0 {
		n, errno := sendmsg(s.fd, s.iov[:min(len(s.iov), maxIovecs)])
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			return false
		case errno != 0:
			s.sendErr = os.NewSyscallError("send", errno)
			return true
		}
		s.iov = advance(s.iov, n)
	}
	return true
}

// maxIovecs is the kernel's UIO_MAXIOV.
const maxIovecs = 1024

func (s *sock) interrupt() { s.nc.SetReadDeadline(time.Unix(1, 0)) }

func (s *sock) resume() { s.nc.SetReadDeadline(time.Time{}) }

func (s *sock) abort() {
	s.rc.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}
