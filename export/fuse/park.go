package fuse

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// A parker watches the descriptors of idle servers with one thread, so that an idle device
// costs no thread and no buffer. Its loop (watch) ends with close.
type parker struct {
	epfd, stopfd int
	done         sync.WaitGroup

	mu     sync.Mutex
	parked map[int32]*server // guarded by mu; by descriptor
	closed bool              // guarded by mu
}

func newParker() (*parker, error) {
	p := &parker{parked: make(map[int32]*server)}
	var err error
	if p.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if p.stopfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(p.epfd)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(p.stopfd)}
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, p.stopfd, &ev); err != nil {
		unix.Close(p.epfd)
		unix.Close(p.stopfd)
		return nil, fmt.Errorf("epoll: %w", err)
	}
	p.done.Add(1)
	go p.watch()
	return p, nil
}

// park starts the server again at its next request. False if it cannot.
func (p *parker) park(s *server) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	fd := int32(s.fd)
	p.parked[fd] = s
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: fd}
	err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, s.fd, &ev)
	if err == unix.EEXIST {
		err = unix.EpollCtl(p.epfd, unix.EPOLL_CTL_MOD, s.fd, &ev)
	}
	if err != nil {
		delete(p.parked, fd)
		return false
	}
	return true
}

// forget takes a server's descriptor out; before it is closed.
func (p *parker) forget(s *server) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.parked, int32(s.fd))
	if !p.closed {
		unix.EpollCtl(p.epfd, unix.EPOLL_CTL_DEL, s.fd, nil)
	}
}

// idle counts the parked servers, for tests.
func (p *parker) idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.parked)
}

func (p *parker) watch() {
	defer p.done.Done()
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(p.epfd, events, -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		for _, ev := range events[:n] {
			if int(ev.Fd) == p.stopfd {
				return
			}
			p.mu.Lock()
			s := p.parked[ev.Fd]
			delete(p.parked, ev.Fd)
			p.mu.Unlock()
			if s != nil {
				s.start()
			}
		}
	}
}

func (p *parker) close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	p.mu.Unlock()
	one := [8]byte{0: 1}
	unix.Write(p.stopfd, one[:])
	p.done.Wait()
	unix.Close(p.epfd)
	unix.Close(p.stopfd)
}
