package engine

import "sync"

// eventBuffer is how many events a subscriber may be behind before it misses some.
const eventBuffer = 64

// Events hands what happens to a pool to those who listen. Sending never waits: who does not read
// misses events. The zero Events is ready; safe for concurrent use.
type Events struct {
	mu     sync.Mutex
	subs   map[chan Event]struct{} // guarded by mu; nil after Close
	first  []Event                 // guarded by mu; for the first who listens
	closed bool                    // guarded by mu
}

// Send gives an event to all who listen.
func (e *Events) Send(kind EventKind, detail string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.subs {
		send(ch, Event{Kind: kind, Detail: detail})
	}
}

// Keep sets an event aside for the first who listens: it happened before anybody could.
func (e *Events) Keep(kind EventKind, detail string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.first = append(e.first, Event{Kind: kind, Detail: detail})
}

func send(ch chan Event, ev Event) {
	select {
	case ch <- ev:
	default:
	}
}

// Subscribe returns a channel of events from now on. It is closed by cancel, or by Close.
func (e *Events) Subscribe() (events <-chan Event, cancel func()) {
	ch := make(chan Event, eventBuffer)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		close(ch)
		return ch, func() {}
	}
	if e.subs == nil {
		e.subs = map[chan Event]struct{}{}
	}
	for _, ev := range e.first {
		send(ch, ev)
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

// Close ends all subscriptions. Closing twice is fine.
func (e *Events) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.subs {
		close(ch)
	}
	e.subs, e.closed = nil, true
}
