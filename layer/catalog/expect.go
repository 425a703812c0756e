package catalog

import (
	"runtime"
	"time"
)

// gatherLimit is how long a step in the queue waits for those that are expected.
const gatherLimit = 5 * time.Millisecond

// An Expected is a step that is being made ready. Steps that are in the queue wait a moment for it, so
// that what begins at the same time shares one commit of the pool and one of the file. Without it, the
// first one to come would be committed alone, and each that comes meanwhile after it.
type Expected struct {
	c    *Catalog
	over bool // guarded by c.mu
}

// Expect tells that a step will come soon: nothing that may take long is done before. Pass it on in
// Step.Expected, and call End in any case.
func (c *Catalog) Expect() *Expected {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.coming++
	return &Expected{c: c}
}

// End says that the step has come, or will not. Only the first call counts.
func (e *Expected) End() {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.endLocked()
}

func (e *Expected) endLocked() {
	if !e.over {
		e.over = true
		e.c.coming--
		signal(e.c.arrived)
	}
}

// gather waits for the steps that are expected, unless somebody in the queue is waited for by them.
func (c *Catalog) gather() {
	// Who can run, does: the first step of many would otherwise be committed before the others of
	// its moment have begun.
	for seen, now := -1, c.expected(); now > seen; seen, now = now, c.expected() {
		runtime.Gosched()
	}
	var limit *time.Timer
	for {
		c.mu.Lock()
		wait := c.coming > 0 && len(c.queue) > 0
		for _, r := range c.queue {
			wait = wait && len(r.reserve) == 0
		}
		most := c.gatherLimit
		c.mu.Unlock()
		if !wait {
			break
		}
		if limit == nil {
			limit = time.NewTimer(most)
			defer limit.Stop()
		}
		select {
		case <-c.arrived:
		case <-limit.C:
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// expected counts what is in the queue or will be.
func (c *Catalog) expected() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.coming + len(c.queue)
}
