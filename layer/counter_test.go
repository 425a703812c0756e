package layer

import "sync"

// A safeCounter says when a crash comes: at the n-th call after it was armed, and at every call
// after that.
type safeCounter struct {
	mu    sync.Mutex
	armed bool
	left  int
}

// arm lets n calls pass; negative: all. A counter that is armed stays as it is unless it is disarmed.
func (c *safeCounter) arm(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n < 0 {
		c.armed = false
	} else if !c.armed {
		c.armed, c.left = true, n
	}
}

func (c *safeCounter) hit() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.armed {
		return false
	}
	if c.left > 0 {
		c.left--
		return false
	}
	return true
}
