package nbd

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A tlsLink is a link through TLS.
type tlsLink struct {
	*wire
	tc    *tls.Conn
	waitf func(uintptr) bool
	idle  func() // of the call of recv that is under way
}

// A wire is the connection under a tls.Conn. During the handshake it is the socket with its
// deadline. Afterwards (s is set) its Read never waits: it fails with os.ErrDeadlineExceeded
// when nothing has arrived, which tls.Conn takes as a read deadline that has passed, and keeps
// what it has of a record. So tlsLink.recv can wait without holding buffers.
type wire struct {
	net.Conn
	s *sock // nil during the handshake; set by the reader before there are workers

	mu   sync.Mutex // one write at a time: of a reply's records, or of TLS itself
	out  *buffer    // records of the reply that is being sent; guarded by mu
	n    int        // bytes in out
	last bool       // the goodbye: do not wait for the client
}

// startTLS is the server side of a TLS handshake, within the connection's deadline.
func startTLS(nc net.Conn, t *TLS) (*tlsLink, error) {
	w := &wire{Conn: nc}
	tc := tls.Server(w, t.current())
	if err := tc.Handshake(); err != nil {
		return nil, err
	}
	return &tlsLink{wire: w, tc: tc}, nil
}

// Read and Write are the handshake's, after startTLS: of options, through TLS.
func (l *tlsLink) Read(p []byte) (int, error)  { return l.tc.Read(p) }
func (l *tlsLink) Write(p []byte) (int, error) { return l.tc.Write(p) }

// transmit ends the handshake phase; l is a link from now on.
func (l *tlsLink) transmit() (err error) {
	l.wire.s, err = newSock(l.wire.Conn)
	l.waitf = l.readable
	return err
}

func (w *wire) Read(p []byte) (int, error) {
	if w.s == nil {
		return w.Conn.Read(p)
	}
	n, again, err := recvNow(w.s.fd, p)
	if again {
		return 0, os.ErrDeadlineExceeded
	}
	return n, err
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.s == nil:
		return w.Conn.Write(p)
	case w.last:
		w.s.iov, w.s.sendErr = []unix.Iovec{iovec(p)}, nil
		w.s.sendNow()
		return len(p), nil
	case w.out == nil || len(p) > len(w.out.b):
		if err := w.flushLocked(); err != nil {
			return 0, err
		}
		if err := w.s.send([][]byte{p}); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	if w.n+len(p) > len(w.out.b) {
		if err := w.flushLocked(); err != nil {
			return 0, err
		}
	}
	w.n += copy(w.out.b[w.n:], p)
	return len(p), nil
}

// flushLocked sends what was gathered.
func (w *wire) flushLocked() error {
	if w.n == 0 {
		return nil
	}
	n := w.n
	w.n = 0
	return w.s.send([][]byte{w.out.b[:n]})
}

// gather makes writes wait for each other until release.
func (w *wire) gather() {
	b := getBuffer(batchSize)
	w.mu.Lock()
	w.out, w.n = b, 0
	w.mu.Unlock()
}

func (w *wire) release() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.flushLocked()
	w.out.put()
	w.out, w.n = nil, 0
	return err
}

func (l *tlsLink) recv(p func() []byte, idle func()) (int, error) {
	for {
		n, err := l.tc.Read(p())
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		l.idle = idle
		if err := l.wire.s.rc.Read(l.waitf); err != nil {
			return 0, err
		}
	}
}

// readable is called by the poller, as sock.recvReady is.
func (l *tlsLink) readable(fd uintptr) bool {
	if readable(int(fd)) {
		return true
	}
	l.idle()
	return false
}

// send copies small pieces together, so that a header does not become a record of its own.
func (l *tlsLink) send(bufs [][]byte) error {
	plain := getBuffer(inlineMax)
	defer plain.put()
	l.gather()
	n := 0
	var err error
	write := func(p []byte) {
		if err == nil && len(p) > 0 {
			_, err = l.tc.Write(p)
		}
	}
	for _, b := range bufs {
		for len(b) > 0 && err == nil {
			if n == 0 && len(b) >= inlineMax {
				k := len(b) &^ (inlineMax - 1)
				write(b[:k])
				b = b[k:]
				continue
			}
			k := copy(plain.b[n:inlineMax], b)
			n, b = n+k, b[k:]
			if n == inlineMax {
				write(plain.b[:n])
				n = 0
			}
		}
	}
	write(plain.b[:n])
	if rerr := l.release(); err == nil {
		err = rerr
	}
	return err
}

func (l *tlsLink) interrupt() { l.wire.s.interrupt() }
func (l *tlsLink) resume()    { l.wire.s.resume() }
func (l *tlsLink) abort()     { l.wire.s.abort() }

// goodbye tells the client that the stream ends here, if it takes that now. Nobody sends or
// receives any more.
func (l *tlsLink) goodbye() {
	l.wire.mu.Lock()
	l.wire.last = true
	l.wire.mu.Unlock()
	l.tc.CloseWrite()
}
