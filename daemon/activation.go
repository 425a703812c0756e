package daemon

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// firstActivated is the first descriptor that a service manager passes (SD_LISTEN_FDS_START).
const firstActivated = 3

// sockets makes the daemon's sockets, or takes those that a service manager listens on for it. The
// manager's stay when the daemon ends: clients that connect meanwhile wait for the next one.
type sockets struct {
	given map[string]net.Listener // by path
}

// activatedSockets takes over what LISTEN_FDS says, if it was said to this process.
func activatedSockets(getenv func(string) string) (*sockets, error) {
	pid, err := strconv.Atoi(getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return &sockets{}, nil
	}
	n, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 64 {
		return nil, fmt.Errorf("LISTEN_FDS is %q, want a number up to 64", getenv("LISTEN_FDS"))
	}
	return takeSockets(firstActivated, n)
}

// takeSockets makes listeners of n descriptors from first on.
func takeSockets(first, n int) (*sockets, error) {
	s := &sockets{given: map[string]net.Listener{}}
	for fd := first; fd < first+n; fd++ {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "socket")
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			s.close()
			return nil, fmt.Errorf("descriptor %d of the service manager: %w", fd, err)
		}
		u, ok := l.(*net.UnixListener)
		if !ok {
			l.Close()
			s.close()
			return nil, fmt.Errorf("descriptor %d of the service manager: %s is no Unix socket", fd, l.Addr())
		}
		u.SetUnlinkOnClose(false)
		path := l.Addr().String()
		if st, err := os.Lstat(path); err == nil && st.Mode().Perm()&0o002 != 0 {
			l.Close()
			s.close()
			return nil, fmt.Errorf("socket %s of the service manager: mode %04o: every user of this host can use it: set SocketMode=0600", path, st.Mode().Perm())
		}
		s.given[path] = l
	}
	return s, nil
}

// listen returns the service manager's socket at path, or a new one for a group.
func (s *sockets) listen(path, group string) (net.Listener, error) {
	if l, ok := s.given[path]; ok {
		delete(s.given, path)
		return l, nil
	}
	return listenAt(path, group)
}

// close closes those that nobody asked for, and says which.
func (s *sockets) close() (unused []string) {
	for path, l := range s.given {
		unused = append(unused, path)
		l.Close()
	}
	s.given = nil
	return unused
}
