package helper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultFreeze is how long a file system stays frozen at the most.
const DefaultFreeze = 2 * time.Second

// freeze stops writes to a file system that somebody else has mounted, for as long as the daemon
// keeps standard input open, and for FreezeMS at the most. It answers twice: when the file system
// is frozen (or need not be), and when it is thawed.
//
// The daemon has written down that this node may be frozen before it started the helper: if the
// helper dies by force in between, the daemon, or the next one, thaws by that record. The helper
// keeps a lock on it until it has ended, in the kernel too: as long as it waits there, for a device
// whose daemon is gone, it may freeze later, after somebody has found nothing to thaw.
func (h *job) freeze() (resp Response, err error) {
	state, err := probe(h.req.Node)
	if err != nil || state == StateIdle {
		return Response{State: state}, err
	}
	if h.req.Record != "" {
		rec, err := os.Open(h.req.Record)
		if err != nil {
			return resp, fmt.Errorf("record of the freeze: %w", err)
		}
		if err := unix.Flock(int(rec.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return resp, fmt.Errorf("lock the record of the freeze: %w", err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(rec.Fd()), &st); err != nil || st.Nlink == 0 {
			return resp, fmt.Errorf("the record of the freeze %s is gone", h.req.Record)
		}
		// The descriptor, and with it the lock, goes when the process has ended.
		h.record = rec
	}
	// The freeze must be taken back whatever ends us but SIGKILL. Nobody may listen to what we
	// answer any more.
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(term)

	dir, ro, err := h.joinMount()
	if err != nil || ro {
		if ro {
			return Response{State: StateReadOnly}, nil
		}
		if errors.Is(err, syscall.EBUSY) || errors.Is(err, ErrFileSystem) {
			return Response{State: StateForeign}, nil
		}
		return resp, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return resp, err
	}
	defer unix.Close(fd)
	// Most of the dirty data goes before the freeze, so that writers wait for little. A pool
	// that is full shows here.
	for range 2 {
		if err := unix.Syncfs(fd); err != nil {
			return resp, fmt.Errorf("sync before the freeze: %w", err)
		}
	}
	limit := time.Duration(h.req.FreezeMS) * time.Millisecond
	if limit <= 0 {
		limit = DefaultFreeze
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	if err := freezeFD(fd); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return resp, fmt.Errorf("freeze %s: somebody else has frozen it: %w", h.req.Node, err)
		}
		return resp, fmt.Errorf("freeze %s: %w", h.req.Node, err)
	}
	thawed := false
	defer func() {
		if !thawed {
			thawFD(fd)
		}
	}()
	told := make(chan error, 1)
	go func() { // a daemon that does not read must not keep it frozen
		told <- h.out.Encode(Response{State: StateFrozen})
	}()
	stop := make(chan struct{})
	go func() {
		h.in.ReadByte() // a line or the end
		close(stop)
	}()
	resp.State = StateThawed
	select {
	case <-stop:
	case <-term:
	case <-timer.C:
		resp.State = StateExpired
	}
	thawed = true
	if err := thawFD(fd); err != nil {
		return resp, fmt.Errorf("thaw %s: %w", h.req.Node, err)
	}
	if err := <-told; err != nil {
		return resp, err
	}
	return resp, nil
}

// joinMount mounts a node that is mounted elsewhere: the same superblock, seen from here. ro:
// it is mounted read-only there.
func (h *job) joinMount() (dir string, ro bool, err error) {
	dir, err = h.mountActive(h.req.Node)
	if errors.Is(err, syscall.EBUSY) {
		if _, err := h.mountView("view", h.req.Node); err == nil {
			return "", true, nil
		}
		// Mounted read-only without noload.
		if _, err := h.mount("ro", h.req.Node, privateFlags|unix.MS_RDONLY, activeOptions(h.req.FSType)); err == nil {
			return "", true, nil
		}
	}
	return dir, false, err
}

// thaw takes back a freeze that a helper could not take back itself.
func (h *job) thaw() (resp Response, err error) {
	// A frozen file system keeps its device claimed even when nobody has it mounted any more.
	if state, err := probe(h.req.Node); err != nil || state == StateIdle {
		return Response{State: state}, err
	}
	dir, ro, err := h.joinMount()
	if err != nil || ro {
		return Response{State: StateReadOnly}, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return resp, err
	}
	defer unix.Close(fd)
	switch err := thawFD(fd); {
	case err == nil:
		return Response{State: StateThawed}, nil
	case errors.Is(err, syscall.EINVAL):
		return Response{State: StateIdle}, nil // was not frozen
	default:
		return resp, fmt.Errorf("thaw %s: %w", h.req.Node, err)
	}
}
