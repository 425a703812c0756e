package layer

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"
)

// expiry is background work on one container: its time is over, or a detach waits for somebody.
type expiry struct {
	at       time.Time
	attempts int
	running  bool
	lastErr  string
	detach   bool // detach instead of remove; keyed "detach/NAME"
	since    time.Time
}

const (
	detachKey  = "detach/" // no container is called so
	retryLater = time.Second
	retryMax   = time.Minute
)

func (s *Store) noteExpiry(name string, at *time.Time) {
	s.mu.Lock()
	if at == nil {
		delete(s.expiries, name)
	} else {
		s.expiries[name] = expiry{at: *at, since: *at}
	}
	s.mu.Unlock()
	signalLoop(s.wake)
}

// deferDetach goes on trying to detach a container.
func (s *Store) deferDetach(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.expiries[detachKey+name]; !ok {
		s.expiries[detachKey+name] = expiry{at: time.Now().Add(retryLater), since: now(), detach: true}
	}
	signalLoop(s.wake)
}

// expireLoop does what is due: removes containers whose time is over, and tries again what was
// busy.
func (s *Store) expireLoop() {
	defer s.wg.Done()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
		next := s.runDue(s.ctx)
		timer.Reset(next)
	}
}

// runDue does what is due and returns how long to wait for the next.
func (s *Store) runDue(ctx context.Context) time.Duration {
	type due struct {
		key string
		e   expiry
	}
	var list []due
	t := time.Now()
	s.mu.Lock()
	for k, e := range s.expiries {
		if !e.at.After(t) {
			list = append(list, due{k, e})
		}
	}
	s.mu.Unlock()
	for _, d := range list {
		s.runExpiry(ctx, d.key, d.e)
	}
	wait := time.Minute
	if s.endLeaving(ctx) {
		wait = retryLater
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.expiries {
		wait = min(wait, max(time.Millisecond, time.Until(e.at)))
	}
	return wait
}

func (s *Store) runExpiry(ctx context.Context, key string, e expiry) {
	cctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var err error
	name, isDetach := strings.CutPrefix(key, detachKey)
	if isDetach {
		err = s.Detach(cctx, name, DetachOptions{})
	} else {
		// The container may have been given more time, or another of its name have come.
		var c Container
		if c, err = s.Container(cctx, name); err == nil && (c.Expires == nil || c.Expires.After(time.Now())) {
			s.noteExpiry(name, c.Expires)
			return
		}
		if err == nil {
			err = s.Remove(cctx, name, RemoveOptions{Snapshots: true})
		}
		if err == nil {
			s.hub.emit(EventExpire, kindContainer+"/"+name, "")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cur, ok := s.expiries[key]
	if !ok || !cur.at.Equal(e.at) {
		return
	}
	if err == nil || errors.Is(err, ErrNotFound) {
		delete(s.expiries, key)
		return
	}
	cur.attempts++
	cur.lastErr = err.Error()
	cur.at = time.Now().Add(min(retryLater<<min(cur.attempts-1, 6), retryMax))
	s.expiries[key] = cur
}

// endLeaving tries to detach devices of removed containers; true if some are left.
func (s *Store) endLeaving(ctx context.Context) bool {
	s.mu.Lock()
	var all []*leaving
	for _, l := range s.leaving {
		all = append(all, l)
	}
	s.mu.Unlock()
	left := s.endIdleExports(ctx)
	for _, lv := range all {
		l := s.liveOf(lv.id)
		if l != nil {
			cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			err := s.endLive(cctx, l)
			cancel()
			if err != nil {
				left = true
				s.mu.Lock()
				lv.attempts++
				lv.lastErr = err.Error()
				s.mu.Unlock()
				continue
			}
		}
		s.mu.Lock()
		delete(s.leaving, lv.dev)
		s.mu.Unlock()
		s.cat.Retry(lv.dev)
	}
	return left
}

// Queue is described at API.
func (s *Store) Queue() []QueueItem {
	var out []QueueItem
	s.mu.Lock()
	for _, l := range s.leaving {
		out = append(out, QueueItem{Kind: "detach", Object: l.object, Device: l.dev, Since: l.since, Attempts: l.attempts, LastErr: l.lastErr})
	}
	for _, l := range s.idle {
		out = append(out, QueueItem{Kind: "detach", Object: l.object, Device: l.dev, Since: l.since, Attempts: l.attempts, LastErr: l.lastErr})
	}
	t := time.Now()
	for k, e := range s.expiries {
		if e.at.After(t) && e.attempts == 0 && !e.detach {
			continue // its time has not come
		}
		kind, name := "expire", k
		if n, ok := strings.CutPrefix(k, detachKey); ok {
			kind, name = "detach", n
		}
		out = append(out, QueueItem{Kind: kind, Object: kindContainer + "/" + name, Since: e.since, Attempts: e.attempts, LastErr: e.lastErr})
	}
	s.mu.Unlock()
	for _, p := range s.cat.Pending() {
		out = append(out, QueueItem{Kind: "delete", Object: p.Object, Device: p.Device, Since: p.Since,
			Attempts: p.Attempts, Running: p.Running, LastErr: p.LastErr})
	}
	slices.SortFunc(out, func(a, b QueueItem) int {
		if n := a.Since.Compare(b.Since); n != 0 {
			return n
		}
		return strings.Compare(a.Kind+a.Object, b.Kind+b.Object)
	})
	return out
}

// WaitQueue is described at API.
func (s *Store) WaitQueue(ctx context.Context) error {
	for {
		s.mu.Lock()
		n := s.tasks
		s.mu.Unlock()
		if n == 0 {
			if err := s.cat.WaitDeletes(ctx); err != nil {
				return err
			}
			s.mu.Lock()
			n = s.tasks
			s.mu.Unlock()
			if n == 0 {
				return nil
			}
		}
		if !sleep(ctx, 2*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// task is background work that WaitQueue waits for.
func (s *Store) task(fn func(ctx context.Context)) {
	s.mu.Lock()
	s.tasks++
	s.mu.Unlock()
	done := func() {
		s.mu.Lock()
		s.tasks--
		s.mu.Unlock()
	}
	if !s.background(func(ctx context.Context) {
		defer done()
		fn(ctx)
	}) {
		done()
	}
}

// Events is described at API.
func (s *Store) Events(after uint64) (<-chan Event, func()) { return s.hub.subscribe(after) }
