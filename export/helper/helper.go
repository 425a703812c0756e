// Package helper runs calls in a process of their own.
//
// Calls that can wait for a device that this process serves - opening a node, starting or taking
// away a device - must not be made by its own threads. If the process were killed at the wrong
// moment, such a thread would wait for an answer that nobody can give, and would keep the process's
// descriptors and locks. So they are made by a helper process, which shares no descriptor with the
// one that serves but its two pipes: whatever it waits for, the server's death frees everything that
// the server held.
//
// One JSON object a line on the helper's standard input is a call, one on its standard output an
// answer, in any order. It ends with its input.
package helper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Func does a call. args is JSON; the result is made JSON.
type Func func(ctx context.Context, args json.RawMessage) (any, error)

// Calls are what a helper can do, by name. Both processes have the same: the one that serves uses
// it without a helper, too.
type Calls map[string]Func

// Call makes a Func of a function with typed arguments and result.
func Call[A, R any](fn func(context.Context, A) (R, error)) Func {
	return func(ctx context.Context, args json.RawMessage) (any, error) {
		var a A
		if err := json.Unmarshal(args, &a); err != nil {
			return nil, fmt.Errorf("helper: arguments: %w", err)
		}
		return fn(ctx, a)
	}
}

// Errors are the conditions that callers branch on, by the name that stands for them on the pipe.
type Errors map[string]error

type call struct {
	ID     uint64          `json:"id"`
	Name   string          `json:"name,omitempty"`
	Tag    string          `json:"tag,omitempty"` // of the thread that makes it
	Args   json.RawMessage `json:"args,omitempty"`
	Cancel uint64          `json:"cancel,omitempty"` // id of a call that nobody waits for any more
}

type answer struct {
	ID    uint64          `json:"id"`
	Value json.RawMessage `json:"value,omitempty"`
	Codes []string        `json:"codes,omitempty"`
	Error string          `json:"error,omitempty"`
}

// A remoteError is an error of the helper.
type remoteError struct {
	text  string
	kinds []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.kinds }

func (a *answer) err(known Errors) error {
	if a.Error == "" {
		return nil
	}
	e := &remoteError{text: a.Error}
	for _, c := range a.Codes {
		if k := known[c]; k != nil {
			e.kinds = append(e.kinds, k)
		}
	}
	return e
}

// Run is the whole life of a helper process: it does the calls that come on in until in ends. It
// changes the process's working directory to /.
func Run(ctx context.Context, in io.Reader, out io.Writer, calls Calls, known Errors) error {
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
	s := &server{ctx: ctx, lines: bufio.NewScanner(in), out: out, calls: calls, known: known,
		stops: make(map[uint64]context.CancelFunc), end: make(chan error, 2)}
	go s.thread()
	go s.thread()
	// Calls that still run end with the process: nobody waits for them.
	if err := <-s.end; err != io.EOF {
		return err
	}
	return nil
}

// A server is a helper process. One of its threads waits for a call, another one for its turn to do
// so; others do calls, each one only, and end. So a call is done by the thread that was woken by it.
type server struct {
	ctx   context.Context
	calls Calls
	known Errors
	end   chan error // gets one for each thread that waits when in has ended

	turn  sync.Mutex // to wait for a call
	lines *bufio.Scanner

	mu    sync.Mutex // of out and stops
	out   io.Writer
	stops map[uint64]context.CancelFunc
}

// thread is the life of a thread. It has a table of descriptors of its own and ends with its call, so
// that a process that is killed while one call waits for a device does not keep the descriptors of the
// others open until then.
func (s *server) thread() {
	runtime.LockOSThread() // and it ends with the goroutine
	unshared := unix.Unshare(unix.CLONE_FILES)
	c, err := s.next()
	if err != nil {
		s.end <- err
		return
	}
	go s.thread()
	b := perform(c.ctx, c.call, s.calls, s.known, unshared)
	s.mu.Lock()
	c.stop()
	delete(s.stops, c.ID)
	s.out.Write(append(b, '\n'))
	s.mu.Unlock()
	setThreadName("mica-helper") // the first thread does not end
}

// A begun is a call that may be stopped.
type begun struct {
	call
	ctx  context.Context
	stop context.CancelFunc
}

// next waits for a call, and notes how to stop it. The error is io.EOF when in has ended.
func (s *server) next() (c begun, err error) {
	s.turn.Lock()
	defer s.turn.Unlock()
	for s.lines.Scan() {
		c = begun{}
		if err := json.Unmarshal(s.lines.Bytes(), &c.call); err != nil {
			return c, fmt.Errorf("helper: call: %w", err)
		}
		s.mu.Lock()
		if c.Cancel == 0 {
			c.ctx, c.stop = context.WithCancel(s.ctx)
			s.stops[c.ID] = c.stop
			s.mu.Unlock()
			return c, nil
		}
		if stop := s.stops[c.Cancel]; stop != nil {
			stop()
		}
		s.mu.Unlock()
	}
	if err := s.lines.Err(); err != nil {
		return c, err
	}
	return c, io.EOF
}

// perform does a call, on the calling thread.
func perform(ctx context.Context, c call, calls Calls, known Errors, unshared error) []byte {
	a := answer{ID: c.ID}
	var v any
	err := unshared
	if err != nil {
		err = fmt.Errorf("unshare descriptors: %w", err)
	} else {
		if c.Tag != "" {
			setThreadName(c.Tag)
		}
		if fn := calls[c.Name]; fn == nil {
			err = fmt.Errorf("helper knows no call %q", c.Name)
		} else {
			v, err = fn(ctx, c.Args)
		}
	}
	if err == nil {
		a.Value, err = json.Marshal(v)
	}
	if err != nil {
		a.Value, a.Error = nil, err.Error()
		for code, k := range known {
			if errors.Is(err, k) {
				a.Codes = append(a.Codes, code)
			}
		}
	}
	b, err := json.Marshal(a)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return b
}
