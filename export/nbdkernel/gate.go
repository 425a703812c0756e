package nbdkernel

import (
	"sync"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// A gate keeps a request that the kernel sends again from overtaking itself. With several
// connections, a request that is not answered in time counts as lost: the kernel shuts its
// connection and sends it on another one. Should the first still be under way in the device, it could
// end after the second was answered and after newer data was written, and put the old data back.
//
// So a request on one connection waits while another connection that was shut has requests under
// way, and on a connection that was shut nothing is begun any more. Both are told by a poll of the
// sockets, after the request has been counted: the kernel shuts a socket before it sends anything
// again.
//
// With one connection there is nothing to guard: the kernel gets another socket only when
// everything of the old one has ended.
type gate struct {
	mu    sync.Mutex
	ended *sync.Cond // of mu: a request has ended
	conns map[*lane]struct{}
}

// A lane is one connection.
type lane struct {
	g     *gate
	fd    int // socket; open while the lane is in the gate
	under int // guarded by gate.mu; requests in the device
}

func newGate() *gate {
	g := &gate{conns: make(map[*lane]struct{})}
	g.ended = sync.NewCond(&g.mu)
	return g
}

func (g *gate) add(fd int) *lane {
	l := &lane{g: g, fd: fd}
	g.mu.Lock()
	g.conns[l] = struct{}{}
	g.mu.Unlock()
	return l
}

// remove takes a lane out; nothing of it is under way, and its socket is still open.
func (l *lane) remove() {
	l.g.mu.Lock()
	delete(l.g.conns, l)
	l.g.ended.Broadcast()
	l.g.mu.Unlock()
}

// enter counts a request. False: the connection was shut, nothing may be begun.
func (l *lane) enter() bool {
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	l.under++
	for {
		wait := false
		for o := range l.g.conns {
			if o.under > 0 && isShut(o.fd) {
				if o == l {
					l.leaveLocked()
					return false
				}
				wait = true
			}
		}
		if !wait {
			return true
		}
		l.g.ended.Wait()
	}
}

func (l *lane) leave() {
	l.g.mu.Lock()
	l.leaveLocked()
	l.g.mu.Unlock()
}

func (l *lane) leaveLocked() {
	l.under--
	if l.under == 0 {
		l.g.ended.Broadcast()
	}
}

// isShut reports whether the other end of a socket was shut.
func isShut(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(p, 0)
		if err != unix.EINTR {
			return n == 1 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
		}
	}
}

// gated is a device as one lane sees it.
type gated struct {
	dev.Device
	l *lane
}

func (d gated) through(fn func() error) error {
	if !d.l.enter() {
		return dev.ErrClosed
	}
	defer d.l.leave()
	return fn()
}

func (d gated) ReadAt(p []byte, off int64) (n int, err error) {
	err = d.through(func() (err error) { n, err = d.Device.ReadAt(p, off); return err })
	return n, err
}

func (d gated) WriteAt(p []byte, off int64) (n int, err error) {
	err = d.through(func() (err error) { n, err = d.Device.WriteAt(p, off); return err })
	return n, err
}

func (d gated) Flush() error { return d.through(d.Device.Flush) }

func (d gated) Discard(off, n int64) error {
	x, ok := d.Device.(dev.Discarder)
	if !ok {
		return dev.ErrUnsupported
	}
	return d.through(func() error { return x.Discard(off, n) })
}

func (d gated) WriteZeroes(off, n int64, keep bool) error {
	x, ok := d.Device.(dev.Zeroer)
	if !ok {
		return dev.ErrUnsupported
	}
	return d.through(func() error { return x.WriteZeroes(off, n, keep) })
}

// gatedTrier is gated for a device that can try.
type gatedTrier struct {
	gated
	t dev.Trier
}

func (d gatedTrier) TryReadAt(p []byte, off int64) error {
	return d.through(func() error { return d.t.TryReadAt(p, off) })
}

func (d gatedTrier) TryWriteAt(p []byte, off int64) error {
	return d.through(func() error { return d.t.TryWriteAt(p, off) })
}

// wrap is d as the lane sees it.
func (l *lane) wrap(d dev.Device) dev.Device {
	g := gated{d, l}
	if t, ok := d.(dev.Trier); ok {
		return gatedTrier{g, t}
	}
	return g
}
