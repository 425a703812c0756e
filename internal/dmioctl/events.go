package dmioctl

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A Poller waits for events of any device of this host and can be told to stop, which Wait
// cannot: a thread in DM_DEV_WAIT keeps its device from being removed. Linux 4.14 or later. Next
// is for one goroutine.
type Poller struct {
	f    *os.File // a control descriptor of its own: it remembers what it was told
	stop *os.File // eventfd
}

// NewPoller opens a poller.
func NewPoller() (*Poller, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	p := &Poller{f: f, stop: os.NewFile(uintptr(fd), "eventfd")}
	if err := p.Arm(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// Arm notes what has happened so far: events after it wake Next. Look at the devices between Arm
// and Next, so that none is missed.
func (p *Poller) Arm() error {
	buf := make([]byte, headerSize)
	buf[0] = 4
	buf[12], buf[13] = headerSize&0xff, headerSize>>8
	buf[16], buf[17] = headerSize&0xff, headerSize>>8
	for {
		err := ioctl(p.f, unix.DM_DEV_ARM_POLL, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("dm arm poll: %w", err)
		}
		return nil
	}
}

// Next waits until something has happened since Arm. It returns false after Stop.
func (p *Poller) Next() (bool, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(p.f.Fd()), Events: unix.POLLIN}, {Fd: int32(p.stop.Fd()), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("dm poll: %w", err)
		}
		return fds[1].Revents == 0, nil
	}
}

// Stop ends Next, now and for ever. Safe from other goroutines before Close.
func (p *Poller) Stop() {
	p.stop.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// Close closes the descriptors. No Next may be under way.
func (p *Poller) Close() {
	p.f.Close()
	p.stop.Close()
}
