package kernel

import (
	"slices"
	"sync"

	"mica/thin"
)

// names are locks by device id. The zero value is ready.
type names struct {
	mu   sync.Mutex
	held map[thin.DevID]*nameLock // guarded by mu
}

type nameLock struct {
	mu   sync.Mutex
	refs int // guarded by names.mu
}

// lock takes the locks of ids, each once, in their order, and returns what gives them back.
func (n *names) lock(ids ...thin.DevID) (unlock func()) {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	ids = slices.Compact(ids)
	locks := make([]*nameLock, len(ids))
	n.mu.Lock()
	if n.held == nil {
		n.held = map[thin.DevID]*nameLock{}
	}
	for i, id := range ids {
		l := n.held[id]
		if l == nil {
			l = &nameLock{}
			n.held[id] = l
		}
		l.refs++
		locks[i] = l
	}
	n.mu.Unlock()
	for _, l := range locks {
		l.mu.Lock()
	}
	return func() {
		for _, l := range locks {
			l.mu.Unlock()
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		for i, id := range ids {
			if locks[i].refs--; locks[i].refs == 0 {
				delete(n.held, id)
			}
		}
	}
}
