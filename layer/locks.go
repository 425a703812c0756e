package layer

import (
	"context"
	"slices"
	"sync"
)

// locks are locks by name that a context can stop waiting for. A name costs memory only while
// somebody holds or wants it.
//
// Order, outermost first: container (several in the order of their names), image, layer.
type locks struct {
	mu sync.Mutex
	m  map[string]*namedLock // guarded by mu
}

type namedLock struct {
	ch   chan struct{} // holds one token while locked
	refs int           // guarded by locks.mu
}

// lock takes all names, in their order, and returns what gives them back.
func (l *locks) lock(ctx context.Context, names ...string) (unlock func(), err error) {
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	var held []string
	unlock = func() {
		for _, n := range slices.Backward(held) {
			l.unlock(n)
		}
		held = nil
	}
	for _, n := range names {
		nl := l.want(n)
		select {
		case nl.ch <- struct{}{}:
			held = append(held, n)
		case <-ctx.Done():
			l.drop(n)
			unlock()
			return nil, ctx.Err()
		}
	}
	return unlock, nil
}

func (l *locks) want(n string) *namedLock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = map[string]*namedLock{}
	}
	nl := l.m[n]
	if nl == nil {
		nl = &namedLock{ch: make(chan struct{}, 1)}
		l.m[n] = nl
	}
	nl.refs++
	return nl
}

func (l *locks) unlock(n string) {
	l.mu.Lock()
	<-l.m[n].ch
	l.mu.Unlock()
	l.drop(n)
}

func (l *locks) drop(n string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	nl := l.m[n]
	if nl.refs--; nl.refs == 0 {
		delete(l.m, n)
	}
}
