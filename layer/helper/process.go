package helper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// How a helper is started.
type startKind int

const (
	noStream  startKind = iota
	streamIn            // descriptor 3 is read by the helper
	streamOut           // descriptor 3 is written by the helper
	thawing             // no stream; dies by SIGTERM, so that it can thaw
)

// A process is one helper.
type process struct {
	op     string
	cmd    *exec.Cmd
	stdin  io.WriteCloser // stays open while the answer is wanted
	dec    *json.Decoder
	stdout io.ReadCloser
	data   *os.File // our end of descriptor 3
	stderr *tail
	once   sync.Once
	done   chan struct{} // the process has ended and was reaped
	ended  error         // how; set before done is closed
}

func (c *Client) start(req Request, kind startKind) (*process, error) {
	if len(c.Command) == 0 {
		return nil, errors.New("no helper command")
	}
	line, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	p := &process{op: req.Op, stderr: &tail{}, done: make(chan struct{})}
	p.cmd = exec.Command(c.Command[0], c.Command[1:]...)
	p.cmd.Dir = "/"
	p.cmd.Stderr = p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if kind == thawing {
		p.cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	}
	if req.Op != opMount && req.Op != opUmount {
		p.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
	}
	var theirs *os.File
	if kind == streamIn || kind == streamOut {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		p.data, theirs = w, r
		if kind == streamOut {
			p.data, theirs = r, w
		}
		p.cmd.ExtraFiles = []*os.File{theirs}
	}
	fail := func(err error) (*process, error) {
		if p.data != nil {
			p.data.Close()
		}
		return nil, fmt.Errorf("start helper %s: %w", c.Command[0], err)
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		theirs.Close()
		return fail(err)
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		theirs.Close()
		return fail(err)
	}
	started := make(chan error, 1)
	go p.run(started)
	err = <-started
	if theirs != nil {
		theirs.Close()
	}
	if err != nil {
		return fail(err)
	}
	p.dec = json.NewDecoder(io.LimitReader(p.stdout, 1<<20))
	if _, err := p.stdin.Write(append(line, '\n')); err != nil {
		p.finish()
		return nil, fmt.Errorf("helper %s: %w", req.Op, err)
	}
	return p, nil
}

// run starts the process and reaps it. PDEATHSIG is sent when the thread that started the process
// ends, so this goroutine keeps its thread until then.
func (p *process) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := p.cmd.Start()
	started <- err
	if err != nil {
		close(p.done)
		return
	}
	// Not cmd.Wait: it would close the pipe that the answer may still be in.
	state, err := p.cmd.Process.Wait()
	if err == nil && !state.Success() {
		err = errors.New(state.String())
	}
	p.ended = err
	close(p.done)
}

// receive waits for the next answer. When ctx ends, the helper is killed and the cause returned.
func (p *process) receive(ctx context.Context) (Response, error) {
	type answer struct {
		r   Response
		err error
	}
	ch := make(chan answer, 1)
	go func() {
		var a answer
		a.err = p.dec.Decode(&a.r)
		ch <- a
	}()
	select {
	case a := <-ch:
		if a.err != nil {
			p.kill()
			return Response{}, p.died(a.err)
		}
		if a.r.Err != nil {
			return Response{}, a.r.Err.err(p.op)
		}
		return a.r, nil
	case <-ctx.Done():
		p.kill()
		return Response{}, fmt.Errorf("%s: %w", p.op, context.Cause(ctx))
	}
}

// died describes a helper that ended without an answer.
func (p *process) died(err error) error {
	select {
	case <-p.done:
	case <-time.After(time.Second):
	}
	how := err
	select {
	case <-p.done:
		if p.ended != nil {
			how = p.ended
		}
	default:
	}
	text := p.stderr.String()
	if text != "" {
		text = ": " + text
	}
	return fmt.Errorf("%s: %w: %w%s", p.op, ErrDied, how, text)
}

// kill ends the helper and what it started.
func (p *process) kill() {
	select {
	case <-p.done:
		return
	default:
	}
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
}

// wait waits until the process has ended, or ctx has.
func (p *process) wait(ctx context.Context) {
	select {
	case <-p.done:
	case <-ctx.Done():
	}
}

// finish closes our ends and sees the helper off: it has a moment to end by itself, then it is
// killed. One that hangs in the kernel is left to be reaped when it can.
func (p *process) finish() {
	p.once.Do(func() {
		p.stdin.Close()
		if p.data != nil {
			p.data.Close()
		}
		select {
		case <-p.done:
		case <-time.After(2 * time.Second):
			p.kill()
			select {
			case <-p.done:
			case <-time.After(3 * time.Second):
			}
		}
		p.stdout.Close()
	})
}

// tail keeps the last part of what a helper says.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if n := len(t.buf) - 4096; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(bytes.ToValidUTF8(t.buf, nil)))
}
