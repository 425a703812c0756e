package user

import (
	"sync"

	"mica/engine"
)

// eventBuffer is how many events a subscriber may be behind before it misses some.
const eventBuffer = 64

// events hands events to subscribers. Sending never waits: who does not read loses events.
type events struct {
	mu   sync.Mutex
	subs map[chan engine.Event]struct{} // guarded by mu; nil after close
	done bool
	// first is what happened while the pool was opened, for the first who listens; guarded by mu
	first []engine.Event
}

func (e *events) send(ev engine.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.subs {
		select {
		case ch <- ev:
		default:
		}
	}
}

func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.subs {
		close(ch)
	}
	e.subs, e.done = nil, true
}

// Events returns a channel of events from now on. It is closed by cancel or with the pool.
func (p *Pool) Events() (<-chan engine.Event, func()) {
	e := &p.events
	ch := make(chan engine.Event, eventBuffer)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.done {
		close(ch)
		return ch, func() {}
	}
	if e.subs == nil {
		e.subs = map[chan engine.Event]struct{}{}
	}
	for _, ev := range e.first {
		ch <- ev
	}
	e.first = nil
	e.subs[ch] = struct{}{}
	return ch, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if _, ok := e.subs[ch]; ok {
			delete(e.subs, ch)
			close(ch)
		}
	}
}
