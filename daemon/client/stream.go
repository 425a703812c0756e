package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"mica/daemon/api"
	"mica/layer"
)

func decodeJSON(resp *http.Response, out any) error {
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("answer of the daemon: %w", err)
	}
	return nil
}

// errWentAway: the connection ended while a body was sent.
var errWentAway = errors.New("connection ended")

// abandonable is r for a request's body: when ctx ends, or after stop, its Read returns even if r's
// does not (a terminal, a pipe that nobody writes). The goroutine that reads r ends with the
// next thing that r gives.
func abandonable(ctx context.Context, r io.Reader) (body io.Reader, stop func()) {
	pr, pw := io.Pipe()
	unhook := context.AfterFunc(ctx, func() { pw.CloseWithError(context.Cause(ctx)) })
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{pw}, struct{ io.Reader }{r}, make([]byte, 256<<10))
		pw.CloseWithError(err)
	}()
	return pr, func() {
		unhook()
		pr.CloseWithError(errWentAway)
	}
}

// copyDiff copies a diff and sees to it that it is complete.
func copyDiff(ctx context.Context, w io.Writer, resp *http.Response) (layer.Level, error) {
	if _, err := io.Copy(w, resp.Body); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return "", fmt.Errorf("the diff ends before its time: the daemon's log says why: %w", err)
		}
		return "", err
	}
	level := resp.Trailer.Get(api.TrailerLevel)
	if level == "" {
		return "", errors.New("the diff is not complete: the daemon's log says why")
	}
	return layer.Level(level), nil
}

// pollWait is how long one request for an operation waits; progress is shown as often.
const pollWait = 300 * time.Millisecond

// Wait waits for the end of an operation and returns it, with its error if it failed. show, if
// not nil, sees it again and again. When ctx ends, the operation is cancelled, and Wait returns
// when it has ended.
func (c *Client) Wait(ctx context.Context, op api.Operation, show func(api.Operation)) (api.Operation, error) {
	for {
		if show != nil {
			show(op)
		}
		switch op.State {
		case api.OperationDone:
			return op, nil
		case api.OperationFailed, api.OperationCancelled:
			if op.Error == nil {
				return op, fmt.Errorf("operation %s: %s", op.ID, op.State)
			}
			return op, op.Error
		}
		next, err := c.Operation(ctx, op.ID, pollWait)
		if err != nil && ctx.Err() != nil {
			return c.giveUp(ctx, op)
		}
		if err != nil {
			return op, err
		}
		op = next
	}
}

// giveUp cancels an operation whose waiter has gone.
func (c *Client) giveUp(ctx context.Context, op api.Operation) (api.Operation, error) {
	cause := context.Cause(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	ended, err := c.CancelOperation(ctx, op.ID, 50*time.Second)
	switch {
	case err != nil:
		return op, fmt.Errorf("%w; operation %s could not be cancelled: %w", cause, op.ID, err)
	case ended.State == api.OperationRunning:
		return ended, fmt.Errorf("%w; operation %s is still being undone", cause, op.ID)
	case ended.State == api.OperationDone:
		return ended, nil // it was faster
	}
	return ended, cause
}

// Result decodes the result of an operation that is done.
func Result[T any](op api.Operation) (v T, err error) {
	if err = json.Unmarshal(op.Result, &v); err != nil {
		err = fmt.Errorf("result of operation %s: %w", op.ID, err)
	}
	return v, err
}

// EventOptions choose events.
type EventOptions struct {
	// After is the id after which to begin; nil: from now on (with NoFollow: all that are kept).
	After    *uint64
	Kinds    []string
	Object   string // prefix
	NoFollow bool
}

// Events calls fn for events in order until ctx ends, fn fails, or, with NoFollow, there are no
// more. A connection that breaks, also because the daemon restarts, is made again behind the last
// event that was seen; a daemon that does not come back for retry ends it.
func (c *Client) Events(ctx context.Context, o EventOptions, retry time.Duration, fn func(api.Event) error) error {
	after := o.After
	lost, connected := time.Time{}, false
	for {
		err := c.eventsOnce(ctx, o, after, &connected, func(e api.Event) error {
			id := e.ID
			after, lost = &id, time.Time{}
			return fn(e)
		})
		var stop *stopError
		var apiErr *api.Error
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &stop):
			return stop.err
		case errors.As(err, &apiErr):
			return err
		case o.NoFollow, retry <= 0, !connected:
			return err
		}
		// The daemon ended, or the connection broke.
		if lost.IsZero() {
			lost = time.Now()
		}
		if time.Since(lost) > retry {
			if err == nil {
				err = fmt.Errorf("the daemon on %s ended", c.socket)
			}
			return err
		}
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// A stopError is an error of the caller's function.
type stopError struct{ err error }

func (e *stopError) Error() string { return e.err.Error() }

// maxEvent is the longest line of an event.
const maxEvent = 1 << 20

func (c *Client) eventsOnce(ctx context.Context, o EventOptions, after *uint64, connected *bool, fn func(api.Event) error) error {
	q := url.Values{"kind": o.Kinds}
	if after != nil {
		q.Set("after", strconv.FormatUint(*after, 10))
	}
	if o.Object != "" {
		q.Set("object", o.Object)
	}
	if o.NoFollow {
		q.Set("follow", "false")
	}
	resp, err := c.send(ctx, "GET", "/events", q, "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	*connected = true
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		var e api.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("event %q: %w", lines.Text(), err)
		}
		if err := fn(e); err != nil {
			return &stopError{err}
		}
	}
	return lines.Err()
}
