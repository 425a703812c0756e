package fuse

import (
	"sync"

	"mica/export/loop"
)

// A reaper remembers the minors that the kernel made for us and takes those that are free away
// again, some time after the last use: removing one costs more than a whole attach, and the
// next attach may want it.
type reaper struct {
	mu   sync.Mutex
	made map[int]bool // guarded by mu; minor to "in use"
}

func (r *reaper) used(d loop.Device) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.made == nil {
		r.made = make(map[int]bool)
	}
	if _, ours := r.made[d.Number]; ours || d.Created {
		r.made[d.Number] = true
	}
}

func (r *reaper) free(d loop.Device) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ours := r.made[d.Number]; ours {
		r.made[d.Number] = false
	}
}

// all removes every free minor of ours.
func (r *reaper) all() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for n, busy := range r.made {
		if !busy {
			loop.Remove(n) // refused if somebody else uses it by now
			delete(r.made, n)
		}
	}
}
