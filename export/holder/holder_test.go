package holder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "role-holder" {
		idle := DefaultIdle
		if len(os.Args) > 3 {
			idle, _ = time.ParseDuration(os.Args[3])
		}
		if err := run(context.Background(), os.Args[2], idle, true); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// inProcess runs a holder in this process, without what changes the process.
func inProcess(t *testing.T, idle time.Duration) (socket string, done <-chan error) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		ch <- run(ctx, socket, idle, false)
		close(ended)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	for range 200 {
		if c, err := Dial(socket); err == nil {
			c.Close()
			return socket, ch
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("holder does not listen")
	return "", nil
}

func dial(t *testing.T, socket string) *Client {
	t.Helper()
	c, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// memFile is a descriptor whose identity can be told by its contents.
func memFile(t *testing.T, text string) int {
	t.Helper()
	fd, err := unix.MemfdCreate("t", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
	return fd
}

func text(t *testing.T, fd int) string {
	t.Helper()
	b := make([]byte, 100)
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestPutGetDrop(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	c := dial(t, socket)
	fd := memFile(t, "one")
	if err := c.Put("a", json.RawMessage(`{"n":1}`), fd); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	c2 := dial(t, socket)
	got, blob, err := c2.Get("a")
	if err != nil {
		t.Fatal(err)
	}
	if s := text(t, got); s != "one" || string(blob) != `{"n":1}` {
		t.Fatalf("got %q, %s", s, blob)
	}
	if flags, _ := unix.FcntlInt(uintptr(got), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("descriptor is inherited by children")
	}
	unix.Close(got)
	if err := c2.SetBlob("a", json.RawMessage(`{"n":2}`)); err != nil {
		t.Fatal(err)
	}
	// Put replaces.
	fd = memFile(t, "two")
	if err := c.Put("a", json.RawMessage(`{"n":3}`), fd); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	got, blob, err = c.Get("a")
	if err != nil || text(t, got) != "two" || string(blob) != `{"n":3}` {
		t.Fatalf("after replacing: %s, %v", blob, err)
	}
	unix.Close(got)
	if l, err := c.List(); err != nil || len(l) != 1 || l[0].Name != "a" {
		t.Fatalf("list: %v, %v", l, err)
	}
	if err := c.Quit(false); !errors.Is(err, ErrHolding) {
		t.Fatalf("quit while holding: %v", err)
	}
	if err := c.Drop("a"); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"drop": c.Drop("a"), "blob": c.SetBlob("a", nil), "get": func() error { _, _, err := c.Get("a"); return err }()} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of nothing: %v", what, err)
		}
	}
}

// TestKeepsOpenFile: the open file description lives as long as the holder has it, and no longer.
func TestKeepsOpenFile(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	c := dial(t, socket)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	if err := c.Put("w", nil, p[1]); err != nil {
		t.Fatal(err)
	}
	unix.Close(p[1])
	if _, err := unix.Read(p[0], make([]byte, 1)); err != unix.EAGAIN {
		t.Fatalf("read of a held pipe: %v, want EAGAIN", err)
	}
	if err := c.Drop("w"); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(p[0], make([]byte, 1)); n != 0 || err != nil {
		t.Fatalf("read of a dropped pipe: %d, %v, want its end", n, err)
	}
}

// TestLastMessage: what a process sent before it died is seen by the next one.
func TestLastMessage(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	fd := memFile(t, "x")
	defer unix.Close(fd)
	for i := range 200 {
		raw, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		for j := range 5 {
			if err := send(raw, message{Op: "put", Name: fmt.Sprintf("%d-%d", i, j)}, fd); err != nil {
				t.Fatal(err)
			}
		}
		raw.Close()
		c, err := Dial(socket)
		if err != nil {
			t.Fatal(err)
		}
		l, err := c.List()
		if err != nil {
			t.Fatal(err)
		}
		// The connection may be broken by our not reading the answers, after the first message.
		if len(l) == 0 || !strings.HasPrefix(l[0].Name, fmt.Sprint(i)) {
			t.Fatalf("round %d: %v", i, l)
		}
		for _, e := range l {
			if err := c.Drop(e.Name); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
	}
}

// TestSetBlobSoon: a blob that was sent is there, whatever becomes of the sender; a refusal is told.
func TestSetBlobSoon(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	fd := memFile(t, "x")
	defer unix.Close(fd)
	nobody := func(err error) {
		if !errors.Is(err, ErrGone) { // the sender closes its connection
			t.Errorf("refused: %v", err)
		}
	}
	for i := range 200 {
		name, want := fmt.Sprint(i), fmt.Sprintf(`{"n":%d}`, i)
		c, err := Dial(socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Put(name, json.RawMessage(`{}`), fd); err != nil {
			t.Fatal(err)
		}
		if err := c.SetBlobSoon(name, json.RawMessage(want), nobody); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			c.Close() // without the answer
			c = dial(t, socket)
		}
		got, blob, err := c.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(got)
		if string(blob) != want {
			t.Fatalf("round %d: the blob is %s, want %s", i, blob, want)
		}
		c.Close()
	}
	c := dial(t, socket)
	refused := make(chan error, 1)
	if err := c.SetBlobSoon("nobody", json.RawMessage(`{}`), func(err error) { refused <- err }); err != nil {
		t.Fatal(err)
	}
	if err := <-refused; !errors.Is(err, ErrNotFound) {
		t.Errorf("a blob for a name that is not held: %v, want ErrNotFound", err)
	}
	if _, err := c.List(); err != nil { // the exchange after it has its own answer
		t.Error(err)
	}
}

func TestList(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	c := dial(t, socket)
	fd := memFile(t, "x")
	defer unix.Close(fd)
	pad := strings.Repeat("x", 1000)
	const n = 500
	for i := range n {
		if err := c.Put(fmt.Sprintf("name%04d", i), json.RawMessage(`"`+pad+`"`), fd); err != nil {
			t.Fatal(err)
		}
	}
	l, err := c.List()
	if err != nil || len(l) != n {
		t.Fatalf("%d entries, %v; want %d", len(l), err, n)
	}
	for i, e := range l {
		if e.Name != fmt.Sprintf("name%04d", i) || len(e.Blob) != len(pad)+2 {
			t.Fatalf("entry %d: %s, blob of %d bytes", i, e.Name, len(e.Blob))
		}
	}
	if err := c.Quit(true); err != nil {
		t.Fatal(err)
	}
	<-c.Gone()
	if _, err := c.List(); !errors.Is(err, ErrGone) {
		t.Fatalf("list of a holder that is gone: %v", err)
	}
}

func TestBadMessages(t *testing.T) {
	socket, _ := inProcess(t, time.Minute)
	c := dial(t, socket)
	fd := memFile(t, "x")
	defer unix.Close(fd)
	if _, err := c.List(); err != nil { // so that the other end is there
		t.Fatal(err)
	}
	fds := openFDs(t)
	for name, err := range map[string]error{
		"no name":     c.Put("", nil, fd),
		"long name":   c.Put(strings.Repeat("n", maxName+1), nil, fd),
		"large blob":  c.Put("n", json.RawMessage(`"`+strings.Repeat("b", maxBlob)+`"`), fd),
		"bad blob":    c.Put("n", json.RawMessage(`{`), fd),
		"no fd":       c.plain(message{Op: "put", Name: "n"}, -1),
		"unknown op":  c.plain(message{Op: "sing", Name: "n"}, fd),
		"fd for list": nil,
	} {
		if err == nil && name != "fd for list" {
			t.Errorf("%s: accepted", name)
		}
	}
	// Not JSON, several descriptors, nothing.
	raw, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, maxPacket)
	for _, c := range []struct {
		b   []byte
		oob []byte
	}{
		{[]byte("{"), nil}, {[]byte("[]"), unix.UnixRights(fd)},
		{[]byte(`{"op":"put","name":"n"}`), unix.UnixRights(fd, fd)},
		{[]byte(`{"op":"put","name":"n"}`), unix.UnixRights(fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd)},
		{[]byte(`{"op":"get","name":"n"}`), unix.UnixRights(fd)},
		{bytes.Repeat([]byte(" "), 100), nil},
	} {
		if _, _, err := raw.WriteMsgUnix(c.b, c.oob, nil); err != nil {
			t.Fatal(err)
		}
		var a answer
		if got, err := receive(raw, buf, &a); err != nil || a.Code == "" || got >= 0 {
			t.Errorf("%.30q: answer %+v, %v", c.b, a, err)
		}
	}
	raw.Close()
	if l, err := c.List(); err != nil || len(l) != 0 {
		t.Fatalf("held after bad messages: %v, %v", l, err)
	}
	for range 100 {
		if openFDs(t) <= fds {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d descriptors, %d before", openFDs(t), fds)
}

func openFDs(t *testing.T) int {
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func TestIdle(t *testing.T) {
	socket, done := inProcess(t, 150*time.Millisecond)
	c, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(400 * time.Millisecond)
	fd := memFile(t, "x")
	if err := c.Put("a", nil, fd); err != nil {
		t.Fatalf("ended while somebody was connected: %v", err)
	}
	unix.Close(fd)
	c.Close()
	time.Sleep(400 * time.Millisecond)
	c, err = Dial(socket)
	if err != nil {
		t.Fatalf("ended while it held something: %v", err)
	}
	if err := c.Drop("a"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("idle holder does not end")
	}
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("socket left: %v", err)
	}
}

// TestProcess starts a real holder process and looks at what it is.
func TestProcess(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	argv := []string{"/proc/self/exe", "role-holder", socket, "3s"}
	// A descriptor that children inherit must not stay in the holder.
	leak, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()

	// Many start one: exactly one lives.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := Connect(ctx, socket, argv...)
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	wg.Wait()
	c, err := Connect(ctx, socket, argv...)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, _ := c.c.SyscallConn()
	var pid int
	raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			t.Fatal(err)
		}
		pid = int(cred.Pid)
	})
	proc := fmt.Sprintf("/proc/%d", pid)
	if cwd, _ := os.Readlink(proc + "/cwd"); cwd != "/" {
		t.Errorf("directory %q", cwd)
	}
	if sid, _ := unix.Getsid(pid); sid != pid {
		t.Errorf("session %d, want its own %d", sid, pid)
	}
	fds, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fds {
		to, _ := os.Readlink(proc + "/fd/" + f.Name())
		switch {
		case f.Name() < "3" && len(f.Name()) == 1:
			if to != "/dev/null" {
				t.Errorf("descriptor %s is %s", f.Name(), to)
			}
		case strings.HasPrefix(to, "socket:"), strings.HasPrefix(to, "anon_inode:"), to == socket+".lock":
		default:
			t.Errorf("descriptor %s is %s", f.Name(), to)
		}
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}

	// It survives its starter's connection, holds, and ends alone.
	fd := memFile(t, "x")
	if err := c.Put("a", nil, fd); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	c.Close()
	time.Sleep(3500 * time.Millisecond)
	c = dial(t, socket)
	if err := c.Drop("a"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	for range 100 {
		if _, err := os.Stat(socket); os.IsNotExist(err) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if _, err := Dial(socket); err == nil {
		t.Fatal("still there")
	}
	// A stale socket, as after SIGKILL, is no obstacle, and every dead holder is reaped.
	c, err = Connect(ctx, socket, argv...)
	if err != nil {
		t.Fatal(err)
	}
	raw, _ = c.c.SyscallConn()
	raw.Control(func(fd uintptr) {
		cred, _ := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		syscall.Kill(int(cred.Pid), syscall.SIGKILL)
	})
	<-c.Gone()
	c.Close()
	c, err = Connect(ctx, socket, argv...)
	if err != nil {
		t.Fatalf("after SIGKILL: %v", err)
	}
	if err := c.Quit(false); err != nil {
		t.Fatal(err)
	}
	<-c.Gone()
	c.Close()
	for range 100 {
		started.mu.Lock()
		started.pids = reapLocked()
		n := len(started.pids)
		started.mu.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("holders not reaped: %v", started.pids)
}

func TestStartFails(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ctx := context.Background()
	if _, err := Connect(ctx, socket, "/nonexistent/program"); err == nil {
		t.Error("started a program that is not there")
	}
	if _, err := Connect(ctx, socket, "/bin/true"); err == nil {
		t.Error("connected to a program that is no holder")
	}
	if _, err := Connect(ctx, socket); err == nil {
		t.Error("connected to nothing")
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	begin := time.Now()
	err := StartHolder(short, "/bin/sleep", "1")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 900*time.Millisecond {
		t.Errorf("start of what never gets ready: %v after %v", err, time.Since(begin))
	}
	time.Sleep(1200 * time.Millisecond)
}

// TestOtherUser: the socket is of no use to another user, whatever its mode.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root can act as another user")
	}
	dir, err := os.MkdirTemp("/dev/shm", "holder")
	if err != nil {
		t.Skipf("SKIPPED: no /dev/shm: %v", err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o777)
	socket := filepath.Join(dir, "s")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- run(ctx, socket, time.Minute, false) }()
	for range 200 {
		if os.Chmod(socket, 0o777) == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("SKIPPED: no python3 to act as another user")
	}
	script := `
import os, socket, sys
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
try:
    s.send(b'{"op":"list"}')
    print(repr(s.recv(100)))
except OSError as e:
    print(repr(b''))
`
	out, err := exec.Command("python3", "-c", script, socket).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "b''" {
		t.Errorf("another user got %s, %v", out, err)
	}
	cancel()
	<-done
}
