package daemon

import (
	"context"
	"sync"
	"time"

	"mica/daemon/api"
)

// A hub keeps the last events and wakes those who wait for more. Readers have no queue in it:
// each remembers the id of the last event that it has seen and asks for what came after, so that
// a slow reader costs nothing and at worst misses the oldest.
//
// IDs are microseconds since 1970 or, when events come faster, the last id plus one: they rise
// over restarts without being stored.
type hub struct {
	now func() time.Time

	mu     sync.Mutex
	ring   []api.Event   // oldest first, at most keep; guarded by mu
	keep   int           // immutable
	last   uint64        // id of the newest event; guarded by mu
	more   chan struct{} // closed at the next event or close; guarded by mu
	closed bool          // guarded by mu
}

func newHub(keep int, now func() time.Time) *hub {
	return &hub{now: now, keep: keep, more: make(chan struct{})}
}

// publish adds an event and returns its id. A zero t is now.
func (h *hub) publish(kind, object, detail string, t time.Time) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t.IsZero() {
		t = h.now()
	}
	h.last = max(h.last+1, uint64(h.now().UnixMicro()))
	if len(h.ring) >= h.keep {
		h.ring = append(h.ring[:0], h.ring[len(h.ring)-h.keep+1:]...)
	}
	h.ring = append(h.ring, api.Event{ID: h.last, Time: t.UTC(), Kind: kind, Object: object, Detail: detail})
	close(h.more)
	h.more = make(chan struct{})
	return h.last
}

func (h *hub) lastID() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

// after returns the events with ids above id that are kept. If there may have been others, an
// event of kind lost comes first; its id is the one before the oldest kept. more is closed when
// there is something new; end says that nothing will follow.
func (h *hub) after(id uint64) (events []api.Event, more <-chan struct{}, end bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id > h.last { // of a predecessor whose clock was ahead
		id = 0
		if len(h.ring) > 0 {
			events = append(events, h.lostLocked())
		}
	}
	first := len(h.ring)
	for first > 0 && h.ring[first-1].ID > id {
		first--
	}
	if first == 0 && id != 0 && len(h.ring) > 0 && id < h.ring[0].ID-1 && len(events) == 0 {
		events = append(events, h.lostLocked())
	}
	return append(events, h.ring[first:]...), h.more, h.closed
}

func (h *hub) lostLocked() api.Event {
	e := h.ring[0]
	return api.Event{ID: e.ID - 1, Time: e.Time, Kind: api.EventLost, Detail: "older events are no longer kept"}
}

// close lets every reader come to its end.
func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.closed = true
		close(h.more)
		h.more = make(chan struct{})
	}
}

// follow calls send for the events after id, in order, until ctx ends, the hub is closed or send
// fails. idle, if not nil, is called when nothing happened for the time beat.
func (h *hub) follow(ctx context.Context, id uint64, beat time.Duration, send func(api.Event) error, idle func() error) error {
	t := time.NewTimer(beat)
	defer t.Stop()
	for {
		events, more, end := h.after(id)
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
			id = e.ID
		}
		if end {
			return nil
		}
		t.Reset(beat)
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			if idle != nil {
				if err := idle(); err != nil {
					return err
				}
			}
		}
	}
}
