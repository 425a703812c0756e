package layer

import (
	"sync"
	"time"
)

// eventsKept is how many past events a reader can still ask for, and how many a slow one may be
// behind before it loses some.
const eventsKept = 1024

// hub hands events to readers.
type hub struct {
	mu     sync.Mutex
	next   uint64
	ring   []Event // oldest first
	subs   map[*subscriber]struct{}
	closed bool
}

type subscriber struct {
	ch   chan Event
	wake chan struct{}
	quit chan struct{}
	mu   sync.Mutex
	buf  []Event
}

// newHub starts with ids above those of any earlier run: they begin at the time in microseconds,
// and nobody makes a million events a second for long.
func newHub() *hub {
	return &hub{next: uint64(time.Now().UnixMicro()), subs: map[*subscriber]struct{}{}}
}

func (h *hub) emit(kind, object, detail string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.next++
	e := Event{ID: h.next, Kind: kind, Object: object, Time: time.Now().UTC(), Detail: detail}
	h.ring = append(h.ring, e)
	if len(h.ring) > eventsKept {
		h.ring = append(h.ring[:0], h.ring[len(h.ring)-eventsKept:]...)
	}
	for s := range h.subs {
		s.push(e)
	}
}

func (s *subscriber) push(e Event) {
	s.mu.Lock()
	s.buf = append(s.buf, e)
	if len(s.buf) > eventsKept {
		s.buf = append(s.buf[:0], s.buf[1:]...)
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (h *hub) subscribe(after uint64) (<-chan Event, func()) {
	s := &subscriber{ch: make(chan Event), wake: make(chan struct{}, 1), quit: make(chan struct{})}
	h.mu.Lock()
	if after > 0 {
		for _, e := range h.ring {
			if e.ID > after {
				s.push(e)
			}
		}
	}
	if h.closed {
		close(s.quit)
	} else {
		h.subs[s] = struct{}{}
	}
	h.mu.Unlock()
	go s.loop()
	var once sync.Once
	return s.ch, func() {
		once.Do(func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if _, ok := h.subs[s]; ok {
				delete(h.subs, s)
				close(s.quit)
			}
		})
	}
}

func (s *subscriber) loop() {
	defer close(s.ch)
	for {
		s.mu.Lock()
		batch := s.buf
		s.buf = nil
		s.mu.Unlock()
		for _, e := range batch {
			select {
			case s.ch <- e:
			case <-s.quit:
				return
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-s.wake:
		case <-s.quit:
			return
		}
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subs {
		delete(h.subs, s)
		close(s.quit)
	}
}
