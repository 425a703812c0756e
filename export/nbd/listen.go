package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A listener is a Unix socket that removes its file when it is closed, if it is still its own.
type listener struct {
	*net.UnixListener
	path     string
	dev, ino uint64
	once     sync.Once
	err      error
}

// longestPath is what fits into a sockaddr_un with a final zero byte.
const longestPath = 107

// listenUnix makes a socket of mode 0600 at path. Servers that do the same at the same time are
// kept apart by a lock on the directory.
func listenUnix(path string) (*listener, error) {
	if path == "" || len(path) > longestPath {
		return nil, fmt.Errorf("listen on %q: path of %d bytes, want 1 to %d", path, len(path), longestPath)
	}
	if path[0] == '@' {
		return nil, fmt.Errorf("listen on %q: abstract sockets have no permissions", path)
	}
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The mode of the descriptor at bind is the mode of the file, so that it never is more.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	ul := ln.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		ul.Close()
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&0o177 != 0 {
		if err := os.Chmod(path, 0o600); err != nil {
			ul.Close()
			return nil, err
		}
	}
	return &listener{UnixListener: ul, path: path, dev: st.Dev, ino: st.Ino}, nil
}

// Close stops listening and removes the file, unless somebody has put another one there.
func (l *listener) Close() error {
	l.once.Do(func() {
		unlock, err := lockDir(filepath.Dir(l.path))
		if err == nil {
			var st unix.Stat_t
			if unix.Lstat(l.path, &st) == nil && st.Dev == l.dev && st.Ino == l.ino {
				err = os.Remove(l.path)
			}
			unlock()
		}
		l.err = errors.Join(l.UnixListener.Close(), err)
	})
	return l.err
}

// removeStale removes a socket at path that nobody listens on.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("a file that is not a socket is there (%v)", fi.Mode().Type())
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		defer c.Close()
		return fmt.Errorf("process %d answers there: %w", peerPID(c), ErrInUse)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("cannot tell whether a server is there: %w", err)
	}
	return os.Remove(path)
}

// peerPID is the process that listens at the other end, 0 if unknown.
func peerPID(c net.Conn) (pid int) {
	if rc, err := c.(*net.UnixConn).SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			if u, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				pid = int(u.Pid)
			}
		})
	}
	return pid
}

// lockDir locks a directory against others that do the same.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "lock", Path: dir, Err: err}
	}
	return func() { f.Close() }, nil
}
