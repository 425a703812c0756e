package trial

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"mica/dev"
)

// Then says what comes after the first request that a Plan fails.
type Then int

const (
	Once     Then = iota // all goes well again
	SameKind             // all requests of that kind to that device fail
	Dead                 // all requests to that device fail
)

func (t Then) String() string { return [...]string{"once", "that kind for ever", "device dead"}[t] }

// A Plan fails requests of the media of a trial, which are counted together, from 0. When a flush
// fails, what it was to make durable may be lost whatever is flushed later, as with Linux.
type Plan struct {
	At   int64 // the first request that fails; negative: none
	Err  error // unix.EIO or unix.ENOSPC; reads fail with EIO always
	Then Then
	Torn bool // half of a write that fails is done

	n    atomic.Int64
	off  atomic.Bool
	mu   sync.Mutex
	hits []Hit // guarded by mu
}

// A Hit is a request that failed.
type Hit struct {
	Meta   bool
	Op     dev.Op
	Off, N int64
}

func (h Hit) String() string {
	what := "data"
	if h.Meta {
		what = "metadata"
	}
	return fmt.Sprintf("%s: %v of bytes [%d, +%d)", what, h.Op, h.Off, h.N)
}

// Count is how many requests there were.
func (p *Plan) Count() int64 { return p.n.Load() }

// First returns the first request that failed.
func (p *Plan) First() (Hit, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.hits) == 0 {
		return Hit{}, false
	}
	return p.hits[0], true
}

// Repair makes the media work again.
func (p *Plan) Repair() { p.off.Store(true) }

// Wrap is for Start.
func (p *Plan) Wrap(meta, data dev.Device) (dev.Device, dev.Device) {
	m, d := dev.NewFault(meta), dev.NewFault(data)
	m.Add(dev.Rule{Decide: p.decide(true, meta)})
	d.Add(dev.Rule{Decide: p.decide(false, data)})
	return m, d
}

func (p *Plan) decide(meta bool, d dev.Device) func(op dev.Op, off, n int64) (int64, error) {
	return func(op dev.Op, off, n int64) (int64, error) {
		i := p.n.Add(1) - 1
		if p.off.Load() {
			return 0, nil
		}
		p.mu.Lock()
		fail := i == p.At
		if !fail && len(p.hits) > 0 && p.hits[0].Meta == meta {
			fail = p.Then == Dead || p.Then == SameKind && p.hits[0].Op == op
		}
		if fail {
			p.hits = append(p.hits, Hit{meta, op, off, n})
		}
		p.mu.Unlock()
		if !fail {
			return 0, nil
		}
		if r, ok := d.(*dev.Recorder); ok && op == dev.OpFlush {
			r.Forget()
		}
		part := int64(0)
		if p.Torn && op == dev.OpWrite {
			part = n / 2 / SectorBytes * SectorBytes
		}
		if op == dev.OpRead {
			return 0, unix.EIO
		}
		return part, p.Err
	}
}
