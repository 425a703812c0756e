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
	var mu sync.Mutex // of out and stops
	stops := make(map[uint64]context.CancelFunc)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var c call
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("helper: call: %w", err)
		}
		mu.Lock()
		if c.Cancel != 0 {
			if stop := stops[c.Cancel]; stop != nil {
				stop()
			}
			mu.Unlock()
			continue
		}
		cctx, stop := context.WithCancel(ctx)
		stops[c.ID] = stop
		mu.Unlock()
		go func() {
			b := perform(cctx, c, calls, known)
			mu.Lock()
			defer mu.Unlock()
			stop()
			delete(stops, c.ID)
			out.Write(append(b, '\n'))
		}()
	}
	// Calls that still run end with the process: nobody waits for them.
	return lines.Err()
}

// perform does a call on a thread that has a table of descriptors of its own and ends with the
// call, so that a process that is killed while one call waits for a device does not keep the
// descriptors of the others open until then.
func perform(ctx context.Context, c call, calls Calls, known Errors) []byte {
	runtime.LockOSThread()
	a := answer{ID: c.ID}
	var v any
	err := unix.Unshare(unix.CLONE_FILES)
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
		setThreadName("mica-helper") // the first thread does not end
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
