package nbdkernel

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"mica/dev"
	"mica/export/nbd"

	"golang.org/x/sys/unix"
)

// A server serves the connections of one device.
//
// Goroutines: one for each connection (connLoop), which replaces a connection that breaks; and what
// the connections have themselves.
type server struct {
	name     string
	index    int // of the device; immutable after attach
	backend  string
	d        dev.Device
	readOnly bool
	raw      *nbd.Raw
	gate     *gate // nil for one connection
	log      *slog.Logger
	onEnd    func() // the device was disconnected by somebody else

	started chan struct{} // closed when index is known
	stop    chan struct{} // closed by leave: no connection is replaced any more
	once    sync.Once     // closes stop
	wg      sync.WaitGroup

	mu    sync.Mutex
	conns map[*nbd.RawConn]struct{} // guarded by mu
}

// A pair is a socket pair: our end, ready to be served, and the kernel's.
type pair struct {
	nc     net.Conn
	kernel int
	c      *nbd.RawConn
	lane   *lane // nil for one connection
}

func (s *server) newPair() (*pair, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "nbd")
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		unix.Close(fds[1])
		return nil, err
	}
	// The kernel sends a request in one piece if the buffer has room for it.
	unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 1<<20)
	p := &pair{nc: nc, kernel: fds[1]}
	d := s.d
	if s.gate != nil {
		fd := -1
		if rc, err := nc.(*net.UnixConn).SyscallConn(); err == nil {
			rc.Control(func(f uintptr) { fd = int(f) })
		}
		p.lane = s.gate.add(fd)
		d = p.lane.wrap(d)
	}
	if p.c, err = s.raw.Conn(nc, s.name, d, s.readOnly); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// given closes our copy of the kernel's end, which the kernel has by now.
func (p *pair) given() {
	if p.kernel >= 0 {
		unix.Close(p.kernel)
		p.kernel = -1
	}
}

// close closes both ends; nothing is under way.
func (p *pair) close() {
	p.given()
	if p.lane != nil {
		p.lane.remove()
	}
	p.nc.Close()
}

// start makes n connections, hands their other ends to give, which returns the device's index, and
// serves them.
func (s *server) start(n int, give func(fds []int) (int, error)) error {
	s.started, s.stop = make(chan struct{}), make(chan struct{})
	s.conns = make(map[*nbd.RawConn]struct{})
	var pairs []*pair
	var fds []int
	for range n {
		p, err := s.newPair()
		if err != nil {
			for _, p := range pairs {
				p.close()
			}
			return err
		}
		pairs, fds = append(pairs, p), append(fds, p.kernel)
	}
	for _, p := range pairs { // the kernel may send requests before give returns
		s.wg.Go(func() { s.connLoop(p) })
	}
	index, err := give(fds)
	for _, p := range pairs {
		p.given()
	}
	s.index = index
	close(s.started)
	if err != nil {
		s.leave()
	}
	return err
}

// connLoop serves one connection, and the ones that replace it.
func (s *server) connLoop(p *pair) {
	for p != nil {
		s.mu.Lock()
		s.conns[p.c] = struct{}{}
		s.mu.Unlock()
		if s.leaving() {
			p.c.Leave()
		}
		err := p.c.Run()
		goodbye := p.c.Goodbye()
		s.mu.Lock()
		delete(s.conns, p.c)
		s.mu.Unlock()
		p.close() // everything of it has ended: the kernel may send it again
		<-s.started
		if s.leaving() {
			return
		}
		if goodbye || backendOf(s.index) != s.backend {
			s.onEnd()
			return
		}
		s.log.Warn("the kernel gave up a connection; it gets another", "device", nodeOf(s.index), "error", err)
		p = s.replace()
	}
}

// replace gives the kernel a new connection. nil: the device is gone, or we are leaving.
func (s *server) replace() *pair {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		p, err := s.newPair()
		if err == nil {
			err = with(func(k *control) error { return k.reconnect(s.index, s.backend, []int{p.kernel}) })
			if err == nil {
				p.given()
				return p
			}
			p.close()
		}
		if backendOf(s.index) != s.backend {
			s.onEnd()
			return nil
		}
		if !errors.Is(err, unix.ENOSPC) { // the kernel may not have noticed yet
			s.log.Error("reconnect", "device", nodeOf(s.index), "error", err)
		}
		select {
		case <-s.stop:
			return nil
		case <-time.After(pause):
		}
	}
}

func (s *server) leaving() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// leave ends all connections once everything that was begun is answered. The device stays, if
// nobody has disconnected it, and waits for another server. Leaving twice is fine.
func (s *server) leave() {
	s.once.Do(func() { close(s.stop) })
	s.mu.Lock()
	for c := range s.conns {
		c.Leave()
	}
	s.mu.Unlock()
	s.wg.Wait()
}
