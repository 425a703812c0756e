package dev

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
)

// An Op is a kind of request, or a set of kinds.
type Op uint

const (
	OpRead Op = 1 << iota
	OpWrite
	OpFlush
	OpDiscard
	OpZero
	OpAny = OpRead | OpWrite | OpFlush | OpDiscard | OpZero
)

func (o Op) String() string {
	var s []string
	for i, n := range []string{"read", "write", "flush", "discard", "write zeroes"} {
		if o&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, "|")
}

// ErrInjected is what a Rule without an error of its own fails with.
var ErrInjected = errors.New("injected fault")

// A Rule fails requests of a Fault device. The zero Rule fails every request.
type Rule struct {
	Ops   Op    // 0 = any
	Off   int64 // with Len: only requests that touch [Off, Off+Len); flushes always match
	Len   int64 // 0 = the whole device
	Skip  int   // let so many matching requests through first
	Times int   // fail so many, then no more; 0 = for ever
	Err   error // nil = ErrInjected
	// Before, if set, runs in the request's goroutine when the rule fires; it may wait. With
	// Pass the request then goes on to the device.
	Before func(op Op, off, n int64)
	Pass   bool
	// Decide, if set, says what becomes of a request on which the rule fires: nil lets it go on,
	// an error fails it, a write after its first part bytes have been written.
	Decide func(op Op, off, n int64) (part int64, err error)
}

// OpCounts counts requests that reached a Fault, failed ones included.
type OpCounts struct{ Reads, Writes, Flushes, Discards, Zeroes int64 }

// Sub returns the difference c - o.
func (c OpCounts) Sub(o OpCounts) OpCounts {
	return OpCounts{c.Reads - o.Reads, c.Writes - o.Writes, c.Flushes - o.Flushes, c.Discards - o.Discards, c.Zeroes - o.Zeroes}
}

// A Fault counts the requests of a device and fails those that its rules name. A request that
// fails has not touched the device, unless its rule decides otherwise. The extras of the device are forwarded. Safe for
// concurrent use.
type Fault struct {
	forward
	counts [5]atomic.Int64
	active atomic.Bool // there are rules
	mu     sync.Mutex
	rules  []*Rule // guarded by mu, as are the counters in them
}

// NewFault returns d with counters and without rules.
func NewFault(d Device) *Fault { return &Fault{forward: forward{d}} }

// Add adds a rule. Of several that match a request the first decides.
func (f *Fault) Add(r Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &r)
	f.active.Store(true)
}

// Clear removes all rules.
func (f *Fault) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
	f.active.Store(false)
}

// Counts returns the requests so far.
func (f *Fault) Counts() OpCounts {
	return OpCounts{f.counts[0].Load(), f.counts[1].Load(), f.counts[2].Load(), f.counts[3].Load(), f.counts[4].Load()}
}

// check counts a request and returns the error it is to fail with, and how much of it is done
// before that.
func (f *Fault) check(op Op, i int, off, n int64) (part int64, err error) {
	f.counts[i].Add(1)
	if !f.active.Load() {
		return 0, nil
	}
	r := f.match(op, off, n)
	if r == nil {
		return 0, nil
	}
	if r.Before != nil {
		r.Before(op, off, n)
	}
	if r.Pass {
		return 0, nil
	}
	err = r.Err
	if r.Decide != nil {
		if part, err = r.Decide(op, off, n); err == nil {
			return 0, nil
		}
	}
	if err == nil {
		err = ErrInjected
	}
	return part, fmt.Errorf("%v of bytes [%d, +%d): %w", op, off, n, err)
}

func (f *Fault) match(op Op, off, n int64) *Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.Ops != 0 && r.Ops&op == 0 || r.Times < 0 {
			continue
		}
		if r.Len != 0 && op != OpFlush && (off >= r.Off+r.Len || off+n <= r.Off) {
			continue
		}
		if r.Skip > 0 {
			r.Skip--
			continue
		}
		if r.Times > 0 {
			if r.Times--; r.Times == 0 {
				r.Times = -1
			}
		}
		return r
	}
	return nil
}

func (f *Fault) ReadAt(p []byte, off int64) (int, error) {
	if _, err := f.check(OpRead, 0, off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.Device.ReadAt(p, off)
}

func (f *Fault) WriteAt(p []byte, off int64) (int, error) {
	if part, err := f.check(OpWrite, 1, off, int64(len(p))); err != nil {
		n := 0
		if part > 0 {
			n, _ = f.Device.WriteAt(p[:min(part, int64(len(p)))], off)
		}
		return n, err
	}
	return f.Device.WriteAt(p, off)
}

func (f *Fault) Flush() error {
	if _, err := f.check(OpFlush, 2, 0, 0); err != nil {
		return err
	}
	return f.Device.Flush()
}

func (f *Fault) Discard(off, n int64) error {
	if _, err := f.check(OpDiscard, 3, off, n); err != nil {
		return err
	}
	return f.forward.Discard(off, n)
}

func (f *Fault) WriteZeroes(off, n int64, keepAllocated bool) error {
	if _, err := f.check(OpZero, 4, off, n); err != nil {
		return err
	}
	return f.forward.WriteZeroes(off, n, keepAllocated)
}
