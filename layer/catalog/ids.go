package catalog

import (
	"context"
	"fmt"
	"slices"

	"mica/engine"
	"mica/thin"
)

// Alloc hands out n device ids. They are reserved in the file: a device made under one and not
// given a record before a crash is deleted at the next open. Every id must end in a Step
// (Creates or Consume), in Release or in Abandon.
func (c *Catalog) Alloc(ctx context.Context, n int) ([]thin.DevID, error) {
	select {
	case c.resMu <- struct{}{}:
		defer func() { <-c.resMu }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	if err := c.acceptLocked(); err != nil {
		c.mu.Unlock()
		return nil, err
	}
	var want []thin.DevID
	if short := n - len(c.free); short > 0 {
		var err error
		if want, err = c.pickLocked(max(short+c.coming, reserveBatch)); err != nil && len(want) < short {
			for _, id := range want { // too few: they are for somebody who needs no more
				delete(c.taken, id)
			}
			c.mu.Unlock()
			return nil, err
		}
	}
	c.mu.Unlock()
	if len(want) > 0 {
		if err := c.submit(ctx, &request{Step: Step{FileOnly: true}, reserve: want}); err != nil {
			c.mu.Lock()
			for _, id := range want {
				delete(c.taken, id)
			}
			c.mu.Unlock()
			return nil, fmt.Errorf("reserve %d device ids: %w", len(want), err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.free) < n {
		return nil, fmt.Errorf("reserve %d device ids: %d left", n, len(c.free))
	}
	ids := slices.Clone(c.free[:n])
	c.free = slices.Delete(c.free, 0, n)
	for _, id := range ids {
		c.held[id] = struct{}{}
	}
	return ids, nil
}

// pickLocked finds up to n ids that nothing names, and marks them taken.
func (c *Catalog) pickLocked(n int) ([]thin.DevID, error) {
	var ids []thin.DevID
	id := c.next
	for tried := thin.DevID(0); tried <= c.o.lastID-FirstID && len(ids) < n; tried++ {
		if _, ok := c.taken[id]; !ok {
			ids = append(ids, id)
			c.taken[id] = struct{}{}
		}
		id = c.o.nextAfter(id)
	}
	c.next = id
	if len(ids) < n {
		return ids, fmt.Errorf("no free device id among %d: remove something first", c.o.lastID-FirstID+1)
	}
	return ids, nil
}

// nextAfter is the id after which the search goes on.
func (o *Options) nextAfter(id thin.DevID) thin.DevID {
	if id >= o.lastID {
		return FirstID
	}
	return id + 1
}

// Release gives back ids under which no device was made.
func (c *Catalog) Release(ids ...thin.DevID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		if _, ok := c.held[id]; ok {
			delete(c.held, id)
			c.free = append(c.free, id)
		}
	}
}

// Abandon deletes the devices made under ids in the background, then releases the ids. A crash
// before that is covered by the reservation.
func (c *Catalog) Abandon(ids ...thin.DevID) {
	c.mu.Lock()
	for _, id := range ids {
		if _, ok := c.held[id]; ok && c.dels[id] == nil {
			c.dels[id] = &deletion{m: Removal{Device: id, Object: "unfinished operation", Since: now()}}
		}
	}
	c.mu.Unlock()
	signal(c.delete)
}

// CreateHeld makes devices under ids from Alloc, without a record yet: for work that must be
// done before an object may be seen. The ids then go into Step.Consume, or Abandon. On an error
// none was made, and the ids are given back.
func (c *Catalog) CreateHeld(ctx context.Context, creates []Create) error {
	if err := c.ReadOnly(); err != nil {
		return err
	}
	ids := make([]thin.DevID, len(creates))
	for i, cr := range creates {
		ids[i] = cr.ID
	}
	if err := c.fault("held:before-create"); err != nil {
		return err
	}
	if err := c.createOne(ctx, creates); err != nil {
		if engineUncertain(err) {
			c.Abandon(ids...)
		} else if !c.disown(ctx, ids) {
			c.Release(ids...)
		}
		return fmt.Errorf("create %s: %w", nameDevices(ids), err)
	}
	return c.fault("held:after-create")
}

// disown looks which of ids exist in the pool although we could not make them. Those are not
// ours: they leave the reservation and stay taken; the others are released. It reports whether
// it dealt with the ids.
func (c *Catalog) disown(ctx context.Context, ids []thin.DevID) bool {
	devs, err := c.pool.Devices(ctx)
	if err != nil {
		return false
	}
	var theirs []thin.DevID
	for _, id := range ids {
		if slices.ContainsFunc(devs, func(d thin.DeviceInfo) bool { return d.ID == id }) {
			theirs = append(theirs, id)
		} else {
			c.Release(id)
		}
	}
	if len(theirs) == 0 {
		return true
	}
	c.log.Warn("catalog: reserved device ids exist already; they are left alone", "ids", theirs)
	c.mu.Lock()
	for _, id := range theirs {
		delete(c.held, id)
	}
	c.mu.Unlock()
	// The reservation is dropped in the background: until then a crash would delete them.
	r := &request{Step: Step{FileOnly: true}, unreserve: theirs, done: make(chan struct{})}
	c.mu.Lock()
	c.queue = append(c.queue, r)
	c.mu.Unlock()
	signal(c.wake)
	return true
}

// engineUncertain tells errors after which a device may exist all the same.
func engineUncertain(err error) bool {
	return isAny(err, engine.ErrFailed, context.Canceled, context.DeadlineExceeded)
}

// nameDevices names devices in a message; of many, the first and the last.
func nameDevices(ids []thin.DevID) string {
	switch n := len(ids); {
	case n == 1:
		return fmt.Sprintf("device %d", ids[0])
	case n > 4:
		return fmt.Sprintf("%d devices, %d to %d", n, slices.Min(ids), slices.Max(ids))
	}
	return fmt.Sprintf("devices %v", ids)
}
