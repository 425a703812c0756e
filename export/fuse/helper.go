package fuse

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"mica/export/loop"

	"golang.org/x/sys/unix"
)

// The helper process changes loop devices for an exporter. One JSON object a line on its standard
// input is a call, one on its standard output an answer, in any order. It ends with its input.
// It shares no descriptor with the exporter but these two, so that whatever it waits for, the
// exporter's death frees everything that the exporter held.

type call struct {
	ID     uint64       `json:"id"`
	Attach *loop.Config `json:"attach,omitempty"`
	Resize *resizeArgs  `json:"resize,omitempty"`
	Detach *detachArgs  `json:"detach,omitempty"`
	Cancel uint64       `json:"cancel,omitempty"` // id of a call that nobody waits for any more
}

type result struct {
	ID     uint64      `json:"id"`
	Device loop.Device `json:"device"`
	Code   string      `json:"code,omitempty"` // busy, not_bound, not_synced, error
	Error  string      `json:"error,omitempty"`
}

// A remoteError is an error of the helper.
type remoteError struct {
	text string
	kind error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.kind }

func (r result) err() error {
	switch r.Code {
	case "":
		return nil
	case "busy":
		return &remoteError{r.Error, loop.ErrBusy}
	case "not_bound":
		return &remoteError{r.Error, loop.ErrNotBound}
	case "not_synced":
		return &remoteError{r.Error, loop.ErrNotSynced}
	}
	return errors.New(r.Error)
}

// RunHelper is the whole life of a helper process: it does the calls that come on in until in
// ends. It changes the process's working directory to /.
func RunHelper(ctx context.Context, in io.Reader, out io.Writer) error {
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("helper: %w", err)
	}
	// The runtime makes its poller's descriptors when they are first needed. That must be now,
	// and not in a thread that has a table of its own.
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("helper: %w", err)
	}
	r.Close()
	w.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex // of out and calls
	calls := make(map[uint64]context.CancelFunc)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var c call
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("helper: call: %w", err)
		}
		mu.Lock()
		if c.Cancel != 0 {
			if stop := calls[c.Cancel]; stop != nil {
				stop()
			}
			mu.Unlock()
			continue
		}
		cctx, stop := context.WithCancel(ctx)
		calls[c.ID] = stop
		mu.Unlock()
		go func() {
			// The thread gets a table of descriptors of its own and ends with the call, so that
			// a process that is killed while one call waits for a device does not keep the
			// descriptors of the others open until then.
			runtime.LockOSThread()
			unshare := unix.Unshare(unix.CLONE_FILES)
			r := result{ID: c.ID, Code: "error", Error: fmt.Sprint("unshare descriptors: ", unshare)}
			if unshare == nil {
				if c.Attach != nil {
					setThreadName(callTag(c.Attach.Backing))
				}
				r = perform(cctx, c)
				setThreadName("mica-helper") // the first thread does not end
			}
			b, err := json.Marshal(r)
			if err != nil {
				panic(err) // strings and numbers only
			}
			mu.Lock()
			defer mu.Unlock()
			stop()
			delete(calls, c.ID)
			out.Write(append(b, '\n'))
		}()
	}
	// Calls that still run end with the process: nobody waits for them.
	return lines.Err()
}

// callTag names the thread that makes an attach, so that clean can see whether it still does.
func callTag(backing string) string {
	h := fnv.New32a()
	io.WriteString(h, backing)
	return fmt.Sprintf("mica-%08x", h.Sum32())
}

func perform(ctx context.Context, c call) result {
	r := result{ID: c.ID}
	var err error
	switch {
	case c.Attach != nil:
		r.Device, err = localOps{}.attach(ctx, *c.Attach)
	case c.Resize != nil:
		err = localOps{}.resize(ctx, *c.Resize)
	case c.Detach != nil:
		err = localOps{}.detach(ctx, *c.Detach)
	default:
		err = errors.New("empty call")
	}
	if err != nil {
		r.Error = err.Error()
		switch {
		case errors.Is(err, loop.ErrBusy):
			r.Code = "busy"
		case errors.Is(err, loop.ErrNotBound):
			r.Code = "not_bound"
		case errors.Is(err, loop.ErrNotSynced):
			r.Code = "not_synced"
		default:
			r.Code = "error"
		}
	}
	return r
}

// helperOps makes calls to a helper process and starts it when it is needed.
type helperOps struct {
	argv []string
	log  *slog.Logger

	mu     sync.Mutex
	next   uint64                 // guarded by mu; id
	in     io.WriteCloser         // guarded by mu; nil: no helper
	cmd    *exec.Cmd              // guarded by mu
	out    io.Closer              // guarded by mu
	waits  map[uint64]chan result // guarded by mu; of this helper
	closed bool                   // guarded by mu
	wg     sync.WaitGroup         // receive loops
}

var errHelperGone = errors.New("helper process ended")

// startLocked starts the helper and its receive loop.
func (h *helperOps) startLocked() error {
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
	h.in, h.cmd, h.out, h.waits = in, cmd, out, make(map[uint64]chan result)
	h.wg.Add(1)
	go h.receiveLoop(cmd, out, h.waits)
	return nil
}

func (h *helperOps) receiveLoop(cmd *exec.Cmd, out io.Reader, waits map[uint64]chan result) {
	defer h.wg.Done()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var r result
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			h.log.Error("fuse helper", "answer", lines.Text(), "error", err)
			cmd.Process.Kill()
			break
		}
		h.mu.Lock()
		ch := waits[r.ID]
		delete(waits, r.ID)
		h.mu.Unlock()
		if ch != nil {
			ch <- r // has room
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

// do makes a call and waits for its result. When ctx ends first, the helper is told to give up,
// and its result is lost.
func (h *helperOps) do(ctx context.Context, c call) (result, error) {
	h.mu.Lock()
	if err := h.startLocked(); err != nil {
		h.mu.Unlock()
		return result{}, err
	}
	h.next++
	c.ID = h.next
	ch := make(chan result, 1)
	h.waits[c.ID] = ch
	waits, in := h.waits, h.in
	err := h.sendLocked(c)
	h.mu.Unlock()
	if err != nil {
		return result{}, err
	}
	select {
	case r, ok := <-ch:
		if !ok {
			return result{}, errHelperGone
		}
		return r, r.err()
	case <-ctx.Done():
		h.mu.Lock()
		delete(waits, c.ID)
		if h.in == in {
			h.sendLocked(call{Cancel: c.ID})
		}
		h.mu.Unlock()
		return result{}, ctx.Err()
	}
}

func (h *helperOps) sendLocked(c call) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if _, err := h.in.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%w: %w", errHelperGone, err)
	}
	return nil
}

// pid starts the helper if need be.
func (h *helperOps) pid() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.startLocked() != nil {
		return 0
	}
	return h.cmd.Process.Pid
}

func (h *helperOps) attach(ctx context.Context, c loop.Config) (loop.Device, error) {
	r, err := h.do(ctx, call{Attach: &c})
	return r.Device, err
}

func (h *helperOps) resize(ctx context.Context, a resizeArgs) error {
	_, err := h.do(ctx, call{Resize: &a})
	return err
}

func (h *helperOps) detach(ctx context.Context, a detachArgs) error {
	_, err := h.do(ctx, call{Detach: &a})
	return err
}

// close ends the helper. One that waits for a device is killed, and left alone if it does not
// die at once.
func (h *helperOps) close() error {
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
