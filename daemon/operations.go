package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"mica/daemon/api"
)

// Bounds of what is remembered.
const (
	maxOperations  = 1000 // running, waiting and ended
	keepOperations = time.Hour
	maxSteps       = 1000
)

// operations is the list of long work: running, and ended not long ago.
//
// An operation runs in a goroutine of its own, or in that of the request that streams its data.
// close cancels all and waits.
type operations struct {
	base  context.Context // parent of every operation; cancelled by close
	stop  context.CancelFunc
	slots chan struct{} // one for each that may run
	hub   *hub
	wg    sync.WaitGroup

	mu     sync.Mutex
	byID   map[string]*operation // guarded by mu
	closed bool                  // guarded by mu
}

// An operation is one piece of long work.
type operation struct {
	id, kind, object string
	params           []byte // what it was asked to do, to tell a repetition from another request
	start            time.Time
	cancel           context.CancelFunc
	done             chan struct{} // closed at the end

	mu        sync.Mutex
	steps     []*step            // guarded by mu
	state     api.OperationState // guarded by mu
	end       time.Time          // guarded by mu
	result    json.RawMessage    // guarded by mu
	err       *api.Error         // guarded by mu
	cancelled bool               // cancel was asked for; guarded by mu
}

// A step is one part of an operation with its progress. Safe for concurrent use. A nil step
// takes progress and forgets it.
type step struct {
	op *operation
	v  api.Step // guarded by op.mu
}

func newOperations(slots int, h *hub) *operations {
	ctx, cancel := context.WithCancel(context.Background())
	return &operations{base: ctx, stop: cancel, slots: make(chan struct{}, slots), hub: h, byID: map[string]*operation{}}
}

// begin enters a new operation. An id that is known gives the operation that has it, with fresh
// false, if it is of the same kind with the same parameters, and CodeExists otherwise. ctx is
// cancelled when the operation is, when parent is, and at close; end must be called.
func (o *operations) begin(parent context.Context, id, kind, object string, params any) (ctx context.Context, op *operation, fresh bool, err error) {
	p, err := json.Marshal(params)
	if err != nil {
		return nil, nil, false, err
	}
	if id == "" {
		var b [8]byte
		rand.Read(b[:])
		id = hex.EncodeToString(b[:])
	} else if err := checkOperationID(id); err != nil {
		return nil, nil, false, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return nil, nil, false, api.Errorf(api.CodeClosing, "the daemon is shutting down")
	}
	if old := o.byID[id]; old != nil {
		if old.kind == kind && old.object == object && bytes.Equal(old.params, p) {
			return nil, old, false, nil
		}
		e := api.Errorf(api.CodeExists, "operation %q is a %s of %q with other parameters", id, old.kind, old.object)
		e.Name = id
		return nil, nil, false, e
	}
	o.forgetLocked(time.Now())
	if len(o.byID) >= maxOperations {
		return nil, nil, false, api.Errorf(api.CodeTooMany, "%d operations are running or waiting", len(o.byID))
	}
	ctx, cancel := context.WithCancel(parent)
	unhook := context.AfterFunc(o.base, cancel)
	op = &operation{id: id, kind: kind, object: object, params: p, start: time.Now(),
		cancel: func() { unhook(); cancel() }, done: make(chan struct{}), state: api.OperationRunning}
	o.byID[id] = op
	o.wg.Add(1)
	o.hub.publish(api.EventOperation, "operation/"+id, kind+" "+object+": running", time.Time{})
	return ctx, op, true, nil
}

// run does the work of an operation that begin gave, in the caller's goroutine, and ends it.
func (o *operations) run(ctx context.Context, op *operation, work func(context.Context, *operation) (any, error)) {
	defer o.wg.Done()
	var result any
	var err error
	select {
	case o.slots <- struct{}{}:
		result, err = work(ctx, op)
		<-o.slots
	case <-ctx.Done():
		err = ctx.Err()
	}
	op.finish(result, err)
	op.cancel()
	v := op.view()
	o.hub.publish(api.EventOperation, "operation/"+op.id, fmt.Sprintf("%s %s: %s", op.kind, op.object, v.State), time.Time{})
}

func (op *operation) finish(result any, err error) {
	op.mu.Lock()
	defer op.mu.Unlock()
	op.end = time.Now()
	if err == nil {
		op.result, err = json.Marshal(result)
	}
	switch {
	case err == nil:
		op.state = api.OperationDone
	case op.cancelled || errors.Is(err, context.Canceled):
		op.state = api.OperationCancelled
		op.err = &api.Error{Code: api.CodeCancelled, Message: "cancelled", Name: op.object}
		if !errors.Is(err, context.Canceled) {
			op.err.Message = "cancelled: " + err.Error()
		}
	default:
		op.state = api.OperationFailed
		op.err = api.FromError(err, op.object)
	}
	for _, s := range op.steps {
		if op.state == api.OperationDone {
			s.v.Ended = true
		}
	}
	close(op.done)
}

// step adds a part. total is 0 if it is not known yet.
func (op *operation) step(name, unit string, total int64) *step {
	op.mu.Lock()
	defer op.mu.Unlock()
	for _, s := range op.steps {
		if s.v.Name == name {
			return s
		}
	}
	if len(op.steps) >= maxSteps {
		return nil
	}
	s := &step{op: op, v: api.Step{Name: name, Unit: unit, Total: total}}
	op.steps = append(op.steps, s)
	return s
}

func (s *step) set(done, total int64) {
	if s == nil {
		return
	}
	s.op.mu.Lock()
	defer s.op.mu.Unlock()
	s.v.Done = done
	if total > 0 {
		s.v.Total = total
	}
}

func (s *step) ended() {
	if s == nil {
		return
	}
	s.op.mu.Lock()
	defer s.op.mu.Unlock()
	s.v.Ended = true
	s.v.Done = max(s.v.Done, s.v.Total)
}

// view is the operation as it is sent.
func (op *operation) view() api.Operation {
	op.mu.Lock()
	defer op.mu.Unlock()
	v := api.Operation{ID: op.id, Kind: op.kind, Object: op.object, State: op.state, Start: op.start.UTC(), Result: op.result, Error: op.err}
	if !op.end.IsZero() {
		t := op.end.UTC()
		v.End = &t
	}
	for _, s := range op.steps {
		v.Steps = append(v.Steps, s.v)
	}
	return v
}

// wait returns when the operation has ended, after d, or when ctx ends.
func (op *operation) wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-op.done:
	case <-t.C:
	case <-ctx.Done():
	}
}

func (o *operations) get(id string) (*operation, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if op := o.byID[id]; op != nil {
		return op, nil
	}
	return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("operation %q: not found", id), Name: id}
}

// list returns all, the oldest first.
func (o *operations) list() []api.Operation {
	o.mu.Lock()
	o.forgetLocked(time.Now())
	ops := make([]*operation, 0, len(o.byID))
	for _, op := range o.byID {
		ops = append(ops, op)
	}
	o.mu.Unlock()
	slices.SortFunc(ops, func(a, b *operation) int {
		return cmp.Or(a.start.Compare(b.start), cmp.Compare(a.id, b.id))
	})
	views := make([]api.Operation, 0, len(ops))
	for _, op := range ops {
		views = append(views, op.view())
	}
	return views
}

// cancelOrForget cancels an operation that runs; one that has ended is forgotten.
func (o *operations) cancelOrForget(op *operation) {
	select {
	case <-op.done:
		o.mu.Lock()
		if o.byID[op.id] == op {
			delete(o.byID, op.id)
		}
		o.mu.Unlock()
	default:
		op.mu.Lock()
		op.cancelled = true
		op.mu.Unlock()
		op.cancel()
	}
}

// forgetLocked drops what ended long ago, and the oldest of what has ended when there are many.
func (o *operations) forgetLocked(now time.Time) {
	var ended []*operation
	for id, op := range o.byID {
		op.mu.Lock()
		end := op.end
		op.mu.Unlock()
		switch {
		case end.IsZero():
		case now.Sub(end) > keepOperations:
			delete(o.byID, id)
		default:
			ended = append(ended, op)
		}
	}
	if over := len(o.byID) - maxOperations/2; over > 0 {
		slices.SortFunc(ended, func(a, b *operation) int { return a.start.Compare(b.start) })
		for _, op := range ended[:min(over, len(ended))] {
			delete(o.byID, op.id)
		}
	}
}

func (o *operations) running() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for _, op := range o.byID {
		select {
		case <-op.done:
		default:
			n++
		}
	}
	return n
}

// close refuses new operations, cancels those that run and waits for them, until ctx ends.
func (o *operations) close(ctx context.Context) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.stop()
	done := make(chan struct{})
	go func() { o.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d operations did not end: %w", o.running(), ctx.Err())
	}
}

func checkOperationID(id string) error {
	ok := len(id) <= 64
	for _, c := range []byte(id) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}
	if !ok {
		return api.Errorf(api.CodeInvalid, "operation id %q: want up to 64 letters, digits, '-' and '_'", id)
	}
	return nil
}
