package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// longestSocket is what fits into a sockaddr_un with a final zero byte.
const longestSocket = 107

// listenAt makes a socket in RUN: 0600, or 0660 for a group. RUN is locked, so a socket that is
// there belongs to nobody. What is there of another user, or no socket, is left alone.
func listenAt(path, group string) (net.Listener, error) {
	if len(path) > longestSocket {
		return nil, fmt.Errorf("socket %s: path of %d bytes, at most %d: choose a shorter --run", path, len(path), longestSocket)
	}
	mode, gid := os.FileMode(0o600), -1
	if group != "" {
		var err error
		if gid, err = groupID(group); err != nil {
			return nil, err
		}
		mode = 0o660
	}
	if err := mayReplace(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The mode of the descriptor at bind is the mode of the file, so that it never is more.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		err = os.Chown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func groupID(group string) (int, error) {
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("api.group: there is no group %q", group)
	}
	return strconv.Atoi(g.Gid)
}

// mayReplace says why what is at path cannot be replaced by a socket of ours.
func mayReplace(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("socket %s: there is something else of that name (%s); take it away first", path, st.Mode())
	}
	if s, ok := st.Sys().(*syscall.Stat_t); ok && int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("socket %s: it belongs to user %d, the daemon runs as user %d; take it away first", path, s.Uid, os.Geteuid())
	}
	return nil
}
