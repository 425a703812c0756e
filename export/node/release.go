package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrGone: the node is not there, or is another device's by now.
	ErrGone = errors.New("node gone")
	// ErrNotSynced: the node was taken away, but what its last users had written through the page
	// cache could not be written to the device.
	ErrNotSynced = errors.New("node taken away with unwritten data")
)

// A Release takes a block device away that nobody uses. It is for drivers that refuse nobody: they
// take away also what is mounted.
type Release struct {
	Path string // of the node
	// Dev is the device's number. A node with another one is not touched.
	Dev uint64
	// Link is removed before Take, and made again if that fails; "" is none.
	Link string
	// Wait is how long to wait for openers that are neither mounts nor other exclusive users; udev
	// opens every changed device for some milliseconds. 0 is 2 seconds.
	Wait time.Duration
	// Take makes the driver take the device away. Nobody else has it open exclusively while it
	// runs, so nobody can mount it. Who opens it in that moment without that gets I/O errors.
	Take func() error
}

// Do waits for users that will go away, then takes the device away. It returns a *BusyError that
// names the users, ErrGone, or ErrNotSynced; the first two, and errors of Take, leave everything as
// it was. It opens the device and writes its page cache to it, and so waits for its server.
func (r Release) Do(ctx context.Context) error {
	if r.Wait == 0 {
		r.Wait = 2 * time.Second
	}
	deadline := time.Now().Add(r.Wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := r.once()
		if !errors.Is(err, ErrBusy) {
			return err
		}
		who := Users(r.Dev, r.Path)
		if time.Now().After(deadline) || who.Settled() {
			return &BusyError{Node: r.Path, Users: who}
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return &BusyError{Node: r.Path, Users: who}
		case <-t.C:
		}
	}
}

func (r Release) once() error {
	fd, err := r.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if len(Users(r.Dev, r.Path)) > 0 {
		return ErrBusy
	}
	// Buffered writes of openers that are gone. An error here is reported to nobody else.
	syncErr := unix.Fsync(fd)
	target := ""
	if r.Link != "" {
		target, err = os.Readlink(r.Link)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("link: %w", err)
		}
		if err == nil {
			if err := os.Remove(r.Link); err != nil {
				return fmt.Errorf("link: %w", err)
			}
		}
	}
	if err := r.Take(); err != nil {
		if target != "" {
			err = errors.Join(err, os.Symlink(target, r.Link))
		}
		return err
	}
	if syncErr != nil {
		return fmt.Errorf("%s: %w: %w", r.Path, ErrNotSynced, syncErr)
	}
	return nil
}

// open opens the node exclusively: mounts, swap and stacked devices refuse it.
func (r Release) open() (int, error) {
	var fd int
	var err error
	for {
		if fd, err = unix.Open(r.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0); err != unix.EINTR {
			break
		}
	}
	switch err {
	case nil:
	case unix.EBUSY:
		return -1, ErrBusy
	case unix.ENOENT, unix.ENXIO, unix.ENODEV:
		return -1, fmt.Errorf("%s: %w", r.Path, ErrGone)
	default:
		return -1, fmt.Errorf("%s: %w", r.Path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Rdev != r.Dev {
		unix.Close(fd)
		return -1, fmt.Errorf("%s has number %d:%d, not %d:%d: %w", r.Path, unix.Major(st.Rdev), unix.Minor(st.Rdev),
			unix.Major(r.Dev), unix.Minor(r.Dev), errors.Join(ErrGone, err))
	}
	return fd, nil
}
