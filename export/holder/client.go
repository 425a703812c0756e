package holder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// answerTime bounds one exchange. A holder does nothing that waits.
const answerTime = 10 * time.Second

// A Client is a connection to a holder. Safe for concurrent use; one exchange at a time. A
// goroutine (receiveLoop) reads answers until Close, or until the holder is gone.
type Client struct {
	c    *net.UnixConn
	gone chan struct{} // closed by receiveLoop
	in   chan received

	mu sync.Mutex // one exchange
}

type received struct {
	a   answer
	fd  int
	err error
}

// Dial connects to the holder on socket.
func Dial(socket string) (*Client, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("holder: %w", err)
	}
	if err := checkPeer(c); err != nil {
		c.Close()
		return nil, err
	}
	cl := &Client{c: c, gone: make(chan struct{}), in: make(chan received)}
	go cl.receiveLoop()
	return cl, nil
}

// Gone is closed when the holder has ended or Close was called.
func (c *Client) Gone() <-chan struct{} { return c.gone }

// Close ends the connection. The holder keeps what it holds.
func (c *Client) Close() error {
	err := c.c.Close()
	<-c.gone
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *Client) receiveLoop() {
	defer close(c.gone)
	buf := make([]byte, maxPacket)
	for {
		var r received
		r.fd, r.err = receive(c.c, buf, &r.a)
		var bad *badMessage
		if r.err != nil && !errors.As(r.err, &bad) {
			c.c.Close()
			return
		}
		t := time.NewTimer(answerTime)
		select {
		case c.in <- r:
			t.Stop()
		case <-t.C: // an answer that nobody waits for
			if r.fd >= 0 {
				unix.Close(r.fd)
			}
			c.c.Close()
			return
		}
	}
}

// exchange sends a message and waits for its answer. The descriptor of the answer belongs to the
// caller.
func (c *Client) exchange(m message, fd int) (answer, int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.send(m, fd); err != nil {
		return answer{}, -1, err
	}
	return c.answer(m)
}

func (c *Client) send(m message, fd int) error {
	err := send(c.c, m, fd)
	if errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		err = ErrGone
	}
	if err != nil {
		return fmt.Errorf("holder: %s %q: %w", m.Op, m.Name, err)
	}
	return nil
}

// answer waits for the answer to a message that was sent, under the same lock.
func (c *Client) answer(m message) (answer, int, error) {
	t := time.NewTimer(answerTime)
	defer t.Stop()
	select {
	case r := <-c.in:
		err := r.err
		if err == nil {
			err = r.a.err()
		}
		if err != nil {
			if r.fd >= 0 {
				unix.Close(r.fd)
			}
			return answer{}, -1, fmt.Errorf("%s %q: %w", m.Op, m.Name, err)
		}
		return r.a, r.fd, nil
	case <-c.gone:
		return answer{}, -1, fmt.Errorf("%s %q: %w", m.Op, m.Name, ErrGone)
	case <-t.C:
		c.c.Close() // a late answer must not be taken for the next one
		return answer{}, -1, fmt.Errorf("%s %q: no answer from the holder in %v", m.Op, m.Name, answerTime)
	}
}

func (c *Client) plain(m message, fd int) error {
	_, got, err := c.exchange(m, fd)
	if got >= 0 {
		unix.Close(got)
	}
	return err
}

// Put gives the holder a copy of fd under a name, in the place of what it held under it. blob is
// JSON of at most 4 KiB. When it returns nil the open file outlives this process.
func (c *Client) Put(name string, blob json.RawMessage, fd int) error {
	return c.plain(message{Op: "put", Name: name, Blob: blob}, fd)
}

// SetBlob changes the blob of a name that is held. ErrNotFound if it is not.
func (c *Client) SetBlob(name string, blob json.RawMessage) error {
	return c.plain(message{Op: "blob", Name: name, Blob: blob}, -1)
}

// SetBlobSoon is SetBlob without the wait for the answer: the holder does it, also if this process
// dies now, because what was sent stays in the socket. failed is told if it refused.
func (c *Client) SetBlobSoon(name string, blob json.RawMessage, failed func(error)) error {
	m := message{Op: "blob", Name: name, Blob: blob}
	c.mu.Lock()
	if err := c.send(m, -1); err != nil {
		c.mu.Unlock()
		return err
	}
	go func() {
		_, fd, err := c.answer(m)
		c.mu.Unlock() // the next exchange begins after this one
		if fd >= 0 {
			unix.Close(fd)
		}
		if err != nil {
			failed(err)
		}
	}()
	return nil
}

// Get returns a copy of the descriptor, close-on-exec, and its blob. The holder keeps its own.
// ErrNotFound if there is none.
func (c *Client) Get(name string) (fd int, blob json.RawMessage, err error) {
	a, fd, err := c.exchange(message{Op: "get", Name: name}, -1)
	if err != nil {
		return -1, nil, err
	}
	if fd < 0 {
		return -1, nil, fmt.Errorf("get %q: holder sent no descriptor", name)
	}
	return fd, a.Blob, nil
}

// Drop lets the holder close its descriptor. ErrNotFound if there is none.
func (c *Client) Drop(name string) error { return c.plain(message{Op: "drop", Name: name}, -1) }

// List returns what is held, sorted by name.
func (c *Client) List() ([]Entry, error) {
	var all []Entry
	after := ""
	for {
		a, fd, err := c.exchange(message{Op: "list", Name: after}, -1)
		if fd >= 0 {
			unix.Close(fd)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, a.Entries...)
		if !a.More || len(a.Entries) == 0 {
			return all, nil
		}
		after = a.Entries[len(a.Entries)-1].Name
	}
}

// Quit ends the holder. ErrHolding if it holds something, unless force.
func (c *Client) Quit(force bool) error {
	return c.plain(message{Op: "quit", Force: force}, -1)
}

var started struct {
	mu   sync.Mutex
	pids []int
}

// StartHolder runs argv (our own binary in the role that calls Run) in a session of its own, with
// /dev/null as standard descriptors and nothing else, and returns when its socket is there or
// it has ended. A holder that already listens makes the new one end at once. Holders that
// ended are reaped by the next call.
func StartHolder(ctx context.Context, argv ...string) error {
	if len(argv) == 0 {
		return errors.New("start holder: no command")
	}
	ready, child, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	// One thread will do, and the runtime must not keep files of the cgroup open.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GODEBUG=containermaxprocs=0,updatemaxprocs=0")
	cmd.ExtraFiles = []*os.File{child}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	child.Close()
	if err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	pid := cmd.Process.Pid
	cmd.Process.Release()
	started.mu.Lock()
	started.pids = append(reapLocked(), pid)
	started.mu.Unlock()

	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ready.SetReadDeadline(time.Now().Add(answerTime))
	var one [1]byte
	if _, err := ready.Read(one[:]); errors.Is(err, os.ErrDeadlineExceeded) {
		if ctx.Err() != nil {
			return fmt.Errorf("start holder %q: %w", argv, ctx.Err())
		}
		return fmt.Errorf("start holder %q: not ready after %v", argv, answerTime)
	}
	return nil
}

// reapLocked waits for holders that have ended and returns the others.
func reapLocked() []int {
	var alive []int
	for _, pid := range started.pids {
		if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err == nil && got == 0 {
			alive = append(alive, pid)
		}
	}
	return alive
}

// Connect dials the holder on socket and starts one with argv if there is none.
func Connect(ctx context.Context, socket string, argv ...string) (*Client, error) {
	var last error
	for range 3 {
		c, err := dialLive(socket)
		if err == nil || errors.Is(err, ErrPeer) {
			return c, err
		}
		last = err
		if len(argv) == 0 {
			break
		}
		if err := StartHolder(ctx, argv...); err != nil {
			return nil, err
		}
	}
	c, err := dialLive(socket)
	if err != nil {
		return nil, errors.Join(last, err)
	}
	return c, nil
}

// dialLive connects to a holder that answers: one that is ending may still take connections.
func dialLive(socket string) (*Client, error) {
	c, err := Dial(socket)
	if err != nil {
		return nil, err
	}
	if err := c.plain(message{Op: "ping"}, -1); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
