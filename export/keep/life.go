package keep

import (
	"context"
	"fmt"
	"sync"
)

// A Life is that of one attachment.
//
// States: serving -> (detach) -> ended, serving -> (Leave) -> ended. A detach that is refused goes
// back to serving. One goroutine does a detach, also when the caller who asked for it no longer
// waits. Safe for concurrent use.
type Life struct {
	done chan struct{} // see Done
	once sync.Once     // closes done

	mu      sync.Mutex
	ended   bool      // guarded by mu
	leaving *teardown // guarded by mu; under way
}

// A teardown is a detach under way.
type teardown struct {
	done chan struct{}
	err  error // valid after done
}

// NewLife begins one.
func NewLife() *Life { return &Life{done: make(chan struct{})} }

// Done is closed when the attachment has ended or was cut off.
func (l *Life) Done() <-chan struct{} { return l.done }

// Cut says that the kernel's side is gone. If no detach is under way, Done is closed; Detach still
// clears away what is left.
func (l *Life) Cut() {
	l.mu.Lock()
	ours := l.leaving != nil || l.ended
	l.mu.Unlock()
	if !ours {
		l.once.Do(func() { close(l.done) })
	}
}

// End ends the attachment.
func (l *Life) End() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.once.Do(func() { close(l.done) })
}

// Detach runs fn, which takes the attachment away or leaves it as it was (gone false), once at a
// time; callers that come while it runs wait for the same one. If ctx ends first it goes on by
// itself. After the attachment has ended it does nothing.
func (l *Life) Detach(ctx context.Context, fn func() (gone bool, err error)) error {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return nil
	}
	t := l.leaving
	if t == nil {
		t = &teardown{done: make(chan struct{})}
		l.leaving = t
		go func() {
			gone, err := fn()
			if gone {
				l.End()
			} else {
				l.mu.Lock()
				l.leaving = nil
				l.mu.Unlock()
			}
			t.err = err
			close(t.done)
		}()
	}
	l.mu.Unlock()
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return fmt.Errorf("still under way: %w", ctx.Err())
	}
}

// Leave waits for a detach under way and reports whether the attachment is still there to be left
// to a successor.
func (l *Life) Leave() bool {
	l.mu.Lock()
	t, ended := l.leaving, l.ended
	l.mu.Unlock()
	if t != nil {
		<-t.done
		l.mu.Lock()
		ended = l.ended
		l.mu.Unlock()
	}
	return !ended
}
