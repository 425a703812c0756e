package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/export/loop"
)

// A medium is the data or the metadata device of a pool as device-mapper takes it: a block
// device, or a file with a loop device on it. The lock is this process's; the loop device and
// the pool on it outlive the process.
type medium struct {
	path string
	file *dev.File // of a file: holds the lock
	lock *os.File  // of a block device: holds the lock
	loop loop.Device
	node string
	rdev uint64 // number of the block device
}

// lockRetry is the pause between attempts at a lock, which cannot wait for a limited time.
const lockRetry = 50 * time.Millisecond

// openMedium takes the lock, waiting for a predecessor that is about to die, and finds out which
// block device it is. A file has none yet: attach.
func openMedium(ctx context.Context, path string, readOnly bool, wait time.Duration, src Source) (*medium, error) {
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	tick := time.NewTicker(lockRetry)
	defer tick.Stop()
	for {
		m, err := tryMedium(path, readOnly)
		if !errors.Is(err, dev.ErrLocked) {
			return m, err
		}
		var by *dev.LockedError
		if errors.As(err, &by) {
			if rerr := Rescue(src, by.PID); rerr != nil {
				return nil, errors.Join(err, rerr)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-deadline.C:
			return nil, fmt.Errorf("waited %v: %w", wait, err)
		}
	}
}

func tryMedium(path string, readOnly bool) (*medium, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	m := &medium{path: path}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		m.file, err = dev.OpenFile(path, dev.OpenOptions{ReadOnly: readOnly, Lock: true, LoopOK: true})
		return m, err
	case unix.S_IFBLK:
		// O_EXCL would be refused by the pool of a dead predecessor; the kernel refuses a
		// table with a device that somebody else holds.
		if m.lock, err = os.OpenFile(path, os.O_RDONLY, 0); err != nil {
			return nil, err
		}
		if err := flock(m.lock); err != nil {
			m.lock.Close()
			return nil, err
		}
		m.node, m.rdev = path, st.Rdev
		return m, nil
	}
	return nil, fmt.Errorf("open %s: neither a regular file nor a block device", path)
}

func flock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for err == unix.EINTR {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	switch {
	case err == unix.EWOULDBLOCK:
		return &dev.LockedError{Path: f.Name(), PID: dev.LockHolder(int(f.Fd()))}
	case err != nil:
		return fmt.Errorf("flock %s: %w", f.Name(), err)
	}
	return nil
}

// isFile reports whether a loop device is needed.
func (m *medium) isFile() bool { return m.file != nil }

// attach puts a loop device on a file, and takes away what a predecessor left that did not get
// further than that.
func (m *medium) attach(ctx context.Context, readOnly bool) error {
	if !m.isFile() {
		return nil
	}
	for _, n := range m.loops() {
		d := loop.Device{Number: n, Node: fmt.Sprintf("/dev/loop%d", n)}
		if err := loop.Detach(ctx, d, loop.DetachOptions{Backing: loop.Backing(n)}); err != nil && !errors.Is(err, loop.ErrNotBound) {
			return fmt.Errorf("%s is under a loop device that is not ours: %w", m.path, err)
		}
	}
	d, err := loop.Attach(ctx, loop.Config{Backing: m.path, ReadOnly: readOnly})
	if err != nil {
		return err
	}
	if err := m.use(d); err != nil {
		m.detach(ctx)
		return err
	}
	return nil
}

// use makes a loop device on the file the medium's block device.
func (m *medium) use(d loop.Device) error {
	m.loop, m.node = d, d.Node
	var st unix.Stat_t
	if err := unix.Stat(d.Node, &st); err != nil {
		return &os.PathError{Op: "stat", Path: d.Node, Err: err}
	}
	m.rdev = st.Rdev
	return nil
}

// loops are the loop devices on the file.
func (m *medium) loops() []int {
	mine, err := os.Stat(m.path)
	if err != nil {
		return nil
	}
	return loop.Find(func(backing string) bool {
		if filepath.Base(backing) != filepath.Base(m.path) {
			return false // another file system's server may be this process
		}
		st, err := os.Stat(backing)
		return err == nil && os.SameFile(st, mine)
	})
}

// adopt finds the medium in a live table, where it is the device rdev.
func (m *medium) adopt(rdev uint64) error {
	if !m.isFile() {
		if rdev != m.rdev {
			return fmt.Errorf("the active pool is on device %s, not on %s (%s)", number(rdev), m.path, number(m.rdev))
		}
		return nil
	}
	for _, n := range m.loops() {
		d := loop.Device{Number: n, Node: fmt.Sprintf("/dev/loop%d", n)}
		var st unix.Stat_t
		if unix.Stat(d.Node, &st) == nil && st.Rdev == rdev {
			return m.use(d)
		}
	}
	return fmt.Errorf("the active pool is on device %s, which is not a loop device on %s", number(rdev), m.path)
}

// detach takes the loop device away, if there is one.
func (m *medium) detach(ctx context.Context) error {
	if !m.isFile() || m.loop.Node == "" {
		return nil
	}
	d := m.loop
	err := loop.Detach(ctx, d, loop.DetachOptions{Backing: loop.Backing(d.Number)})
	if errors.Is(err, loop.ErrNotBound) {
		err = nil
	}
	if err == nil && d.Created {
		err = loop.Remove(d.Number)
		if errors.Is(err, unix.EBUSY) {
			err = nil // somebody else took it meanwhile
		}
	}
	if err == nil {
		m.loop = loop.Device{}
	}
	return err
}

// size is the length in bytes of the file or the block device.
func (m *medium) size() (int64, error) {
	if m.isFile() {
		return m.file.Size(), nil
	}
	return ioctlSize(int(m.lock.Fd()))
}

// grow makes a file longer, and its loop device with it; a block device must be long enough
// already. With allocate the new part gets its space on the host.
func (m *medium) grow(sizeBytes int64, allocate bool) error {
	have, err := m.size()
	if err != nil {
		return err
	}
	if !m.isFile() {
		if have < sizeBytes {
			return fmt.Errorf("%s has %d bytes: make the device longer first: %w", m.path, have, dev.ErrOutOfRange)
		}
		return nil
	}
	if sizeBytes > have {
		if err := m.file.Resize(sizeBytes); err != nil {
			return err
		}
		if allocate {
			if err := m.file.Allocate(have, sizeBytes-have); err != nil && !errors.Is(err, dev.ErrUnsupported) {
				return errors.Join(err, m.file.Resize(have))
			}
		}
		if err := m.file.Flush(); err != nil {
			return err
		}
	}
	return loop.Resize(m.node)
}

// hostBytes is what a file occupies, -1 for a block device.
func (m *medium) hostBytes() int64 {
	if m == nil || !m.isFile() {
		return -1
	}
	n, err := m.file.HostBytes()
	if err != nil {
		return -1
	}
	return n
}

// close drops the lock.
func (m *medium) close() error {
	if m == nil {
		return nil
	}
	if m.file != nil {
		return m.file.Close()
	}
	return m.lock.Close()
}
