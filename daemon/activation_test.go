package daemon

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestActivatedSockets: sockets of a service manager are found by their paths, and stay there when
// the daemon closes them; what is no Unix socket is refused.
func TestActivatedSockets(t *testing.T) {
	dir := t.TempDir()
	const first = 500
	var paths []string
	for i := range 2 {
		path := filepath.Join(dir, strconv.Itoa(i)+".sock")
		paths = append(paths, path)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Dup2(int(f.Fd()), first+i); err != nil {
			t.Fatal(err)
		}
		f.Close()
		l.Close()
	}
	s, err := takeSockets(first, 2)
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.listen(paths[0], "")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	c, err := net.Dial("unix", paths[0])
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	l.Close()
	if unused := s.close(); len(unused) != 1 || unused[0] != paths[1] {
		t.Errorf("unused are %v, want %s", unused, paths[1])
	}
	for _, p := range paths {
		if _, err := os.Lstat(p); err != nil {
			t.Errorf("a socket of the service manager is gone: %v", err)
		}
	}
	// Others are made as ever.
	own, err := s.listen(filepath.Join(dir, "own.sock"), "")
	if err != nil {
		t.Fatal(err)
	}
	own.Close()

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := unix.Dup2(int(r.Fd()), first); err != nil {
		t.Fatal(err)
	}
	if _, err := takeSockets(first, 1); err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("a pipe: %v", err)
	}
}

func TestActivationEnvironment(t *testing.T) {
	env := func(pid, fds string) func(string) string {
		return func(k string) string { return map[string]string{"LISTEN_PID": pid, "LISTEN_FDS": fds}[k] }
	}
	me := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		pid, fds string
		fails    bool
	}{{"", "", false}, {"1", "3", false}, {me, "0", false}, {me, "many", true}, {me, "-1", true}, {me, "100000", true}} {
		s, err := activatedSockets(env(c.pid, c.fds))
		if (err != nil) != c.fails || err == nil && len(s.given) != 0 {
			t.Errorf("pid %q, fds %q: %v", c.pid, c.fds, err)
		}
	}
}

// TestSocketOfAnother: a path that somebody else has is not taken from them.
func TestSocketOfAnother(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenAt(file, ""); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root can make a socket of another user")
	}
	path := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chown(path, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if _, err := listenAt(path, ""); err == nil || !strings.Contains(err.Error(), "12345") {
		t.Errorf("a socket of another user: %v", err)
	}
}
