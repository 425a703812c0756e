package helper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrEnded: the helper process has ended; what became of the call is not known.
var ErrEnded = errors.New("helper process ended")

// A Client makes calls to a helper process, which it starts when it is needed. Without a command
// calls are made by this process itself, for programs that serve for a short time. Safe for
// concurrent use.
//
// Goroutines: one for each helper process (receiveLoop). Close ends it.
type Client struct {
	argv  []string
	calls Calls
	known Errors
	log   *slog.Logger

	mu     sync.Mutex
	next   uint64                 // guarded by mu; id
	in     io.WriteCloser         // guarded by mu; nil: no helper
	cmd    *exec.Cmd              // guarded by mu
	out    io.Closer              // guarded by mu
	waits  map[uint64]chan answer // guarded by mu; of this helper
	closed bool                   // guarded by mu
	wg     sync.WaitGroup         // receive loops
}

// NewClient makes a client for helpers that argv starts; an empty argv makes none.
func NewClient(argv []string, calls Calls, known Errors, log *slog.Logger) *Client {
	return &Client{argv: argv, calls: calls, known: known, log: log}
}

// Do makes a call and decodes its value into result, unless that is nil. tag, if not empty, is the
// name of the thread that makes it. When ctx ends first, the helper is told to give up, and the
// result is lost.
func (h *Client) Do(ctx context.Context, name, tag string, args, result any) error {
	b, err := json.Marshal(args)
	if err != nil {
		return err
	}
	var a answer
	if len(h.argv) == 0 {
		v, err := h.calls[name](ctx, b)
		if err != nil {
			return err
		}
		if a.Value, err = json.Marshal(v); err != nil {
			return err
		}
	} else {
		a, err = h.remote(ctx, call{Name: name, Tag: tag, Args: b})
		if err == nil {
			err = a.err(h.known)
		}
		if err != nil {
			return err
		}
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(a.Value, result)
}

// PID is the helper's process, 0 if calls are made by this one. It starts the helper if need be.
func (h *Client) PID() int {
	if len(h.argv) == 0 {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.startLocked() != nil {
		return 0
	}
	return h.cmd.Process.Pid
}

// startLocked starts the helper and its receive loop.
func (h *Client) startLocked() error {
	if h.closed {
		return os.ErrClosed
	}
	if h.in != nil {
		return nil
	}
	cmd := exec.Command(h.argv[0], h.argv[1:]...)
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start helper: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		in.Close()
		return fmt.Errorf("start helper: %w", err)
	}
	if err := cmd.Start(); err != nil {
		in.Close()
		out.Close()
		return fmt.Errorf("start helper: %w", err)
	}
	h.in, h.cmd, h.out, h.waits = in, cmd, out, make(map[uint64]chan answer)
	h.wg.Add(1)
	go h.receiveLoop(cmd, out, h.waits)
	return nil
}

func (h *Client) receiveLoop(cmd *exec.Cmd, out io.Reader, waits map[uint64]chan answer) {
	defer h.wg.Done()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var a answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			h.log.Error("helper", "answer", lines.Text(), "error", err)
			cmd.Process.Kill()
			break
		}
		h.mu.Lock()
		ch := waits[a.ID]
		delete(waits, a.ID)
		h.mu.Unlock()
		if ch != nil {
			ch <- a // has room
		}
	}
	h.mu.Lock()
	if h.cmd == cmd {
		h.in.Close()
		h.in, h.cmd = nil, nil
	}
	for id, ch := range waits {
		delete(waits, id)
		close(ch)
	}
	h.mu.Unlock()
	reapWithin(cmd.Process.Pid, time.Second)
	cmd.Process.Release()
}

// reapWithin waits for a child that is ending. One that still waits for a device is left to
// init.
func reapWithin(pid int, limit time.Duration) {
	deadline := time.Now().Add(limit)
	for {
		got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
		if err != unix.EINTR && (err != nil || got == pid) || time.Now().After(deadline) {
			return
		}
		<-time.After(2 * time.Millisecond)
	}
}

func (h *Client) remote(ctx context.Context, c call) (answer, error) {
	h.mu.Lock()
	if err := h.startLocked(); err != nil {
		h.mu.Unlock()
		return answer{}, err
	}
	h.next++
	c.ID = h.next
	ch := make(chan answer, 1)
	h.waits[c.ID] = ch
	waits, in := h.waits, h.in
	err := h.sendLocked(c)
	h.mu.Unlock()
	if err != nil {
		return answer{}, err
	}
	select {
	case a, ok := <-ch:
		if !ok {
			return answer{}, ErrEnded
		}
		return a, nil
	case <-ctx.Done():
		h.mu.Lock()
		delete(waits, c.ID)
		if h.in == in {
			h.sendLocked(call{Cancel: c.ID})
		}
		h.mu.Unlock()
		return answer{}, ctx.Err()
	}
}

func (h *Client) sendLocked(c call) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if _, err := h.in.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%w: %w", ErrEnded, err)
	}
	return nil
}

// Close ends the helper. One that waits for a device is killed, and left alone if it does not
// die at once.
func (h *Client) Close() error {
	h.mu.Lock()
	h.closed = true
	if h.cmd != nil {
		h.in.Close()
		h.cmd.Process.Kill()
		h.out.Close() // ends the receive loop
	}
	h.mu.Unlock()
	h.wg.Wait()
	return nil
}
