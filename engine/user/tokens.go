package user

import (
	"sync"
	"sync/atomic"
)

// tokens counts the requests in flight of one kind on one device, in two counters that take
// turns, so that one can wait for all requests that began before a moment while new ones come
// and go. A gate can be closed against new ones. The zero value is ready.
//
// state is changed under mu only:
//
//	bit 0      the gate is closed
//	bits 1..   epoch; its lowest bit says which counter new requests use
type tokens struct {
	state   atomic.Uint64
	n       [2]atomic.Int64
	waiters atomic.Int32 // goroutines in drain
	_       [32]byte     // keep the readers' and the writers' counters on different cache lines

	drainMu sync.Mutex // one drain at a time; outside mu
	mu      sync.Mutex
	cond    sync.Cond // L is &mu, set by init
	closers int       // guarded by mu: how many want the gate closed
}

const (
	gateClosed = 1
	epochStep  = 2
)

func (t *tokens) init() { t.cond.L = &t.mu }

// tryEnter takes a token unless the gate is closed.
func (t *tokens) tryEnter() (token uint32, ok bool) {
	for {
		s := t.state.Load()
		if s&gateClosed != 0 {
			return 0, false
		}
		token = uint32(s/epochStep) & 1
		t.n[token].Add(1)
		if t.state.Load() == s {
			return token, true
		}
		t.exit(token) // the epoch or the gate changed in between: nobody has counted on us
	}
}

// enter takes a token, waiting for the gate.
func (t *tokens) enter() uint32 {
	for {
		if token, ok := t.tryEnter(); ok {
			return token
		}
		t.mu.Lock()
		for t.closers > 0 {
			t.cond.Wait()
		}
		t.mu.Unlock()
	}
}

// exit returns a token.
func (t *tokens) exit(token uint32) {
	if t.n[token].Add(-1) == 0 && t.waiters.Load() != 0 {
		t.mu.Lock()
		t.cond.Broadcast()
		t.mu.Unlock()
	}
}

// drain waits until every token taken before the call is back.
func (t *tokens) drain() {
	// A request keeps its counter, so two zeros seen one after the other suffice.
	if t.n[0].Load() == 0 && t.n[1].Load() == 0 {
		return
	}
	t.drainMu.Lock()
	defer t.drainMu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiters.Add(1)
	defer t.waiters.Add(-1)
	s := t.state.Load()
	old := s / epochStep & 1
	t.state.Store(s + epochStep)
	for t.n[old].Load() != 0 {
		t.cond.Wait()
	}
}

// shutGate keeps new requests waiting until openGate; drain then waits for those in flight.
// Calls nest: the gate opens with the last openGate.
func (t *tokens) shutGate() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closers++
	t.state.Store(t.state.Load() | gateClosed)
}

func (t *tokens) openGate() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closers--; t.closers == 0 {
		t.state.Store(t.state.Load() &^ gateClosed)
		t.cond.Broadcast()
	}
}
