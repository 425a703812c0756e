package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"mica/thin"
)

// How often a deletion that fails (the device is open) is tried again.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second
	// deleteWorkers is how many devices are deleted at the same time: one large one must not
	// hold up the small ones.
	deleteWorkers = 3
)

// A deletion is one device on its way out.
//
//	waiting --(due, worker free)--> running --(deleted)--> clearing --> gone
//	   ^                               |
//	   +--------(failed: later)--------+
type deletion struct {
	m        Removal
	intent   bool // a removal intent in the file; otherwise covered by the reservation
	deleted  bool // the pool has committed the delete; only the intent is left
	running  bool
	attempts int
	lastErr  error
	due      time.Time
}

// A Pending is one line of the deletion queue.
type Pending struct {
	Removal
	Attempts int
	Running  bool
	LastErr  string
}

func now() time.Time { return time.Now().UTC() }

func decodeRemoval(id thin.DevID, v []byte) (Removal, error) {
	m := Removal{Device: id}
	if err := json.Unmarshal(v, &m); err != nil {
		return m, fmt.Errorf("catalog: removal of device %d: %w", id, err)
	}
	return m, nil
}

// Pending lists the devices that are being deleted, oldest first.
func (c *Catalog) Pending() []Pending {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Pending, 0, len(c.dels))
	for _, d := range c.dels {
		out = append(out, Pending{Removal: d.m, Attempts: d.attempts, Running: d.running, LastErr: errText(d.lastErr)})
	}
	slices.SortFunc(out, func(a, b Pending) int {
		if n := a.Since.Compare(b.Since); n != 0 {
			return n
		}
		return int(a.Device) - int(b.Device)
	})
	return out
}

// StartDeletes lets the background queue begin, after Options.HoldDeletes.
func (c *Catalog) StartDeletes() {
	c.mu.Lock()
	c.holdDeletes = false
	c.mu.Unlock()
	signal(c.delete)
}

// Retry tries the deletion of a device again at once: it is free now.
func (c *Catalog) Retry(id thin.DevID) {
	c.mu.Lock()
	if d := c.dels[id]; d != nil {
		d.due = time.Time{}
	}
	c.mu.Unlock()
	signal(c.delete)
}

// WaitDeletes waits until nothing is left to delete but what has failed at least once and waits
// for its next try.
func (c *Catalog) WaitDeletes(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.delDone.Broadcast()
	})
	defer stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if c.readOnly != nil || c.closed || c.holdDeletes {
			return nil
		}
		busy := false
		for _, d := range c.dels {
			busy = busy || d.running || d.due.IsZero()
		}
		if !busy {
			return nil
		}
		c.delDone.Wait()
	}
}

// deleteLoop starts workers for what is due.
func (c *Catalog) deleteLoop() {
	defer c.wg.Done()
	slots := make(chan struct{}, deleteWorkers)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-c.delete:
		case <-timer.C:
		}
		for {
			d, wait := c.nextDeletion(len(slots) < cap(slots))
			if d == nil {
				timer.Reset(wait)
				break
			}
			slots <- struct{}{}
			c.wg.Add(1)
			go func() {
				defer c.wg.Done()
				c.runDeletion(d)
				<-slots
				signal(c.delete)
			}()
		}
	}
}

// nextDeletion takes the oldest deletion that is due, if a worker is free, and says how long to
// wait otherwise.
func (c *Catalog) nextDeletion(slot bool) (*deletion, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait := time.Minute
	if c.readOnly != nil || c.closed || c.holdDeletes || !slot {
		return nil, wait
	}
	var best *deletion
	t := time.Now()
	for _, d := range c.dels {
		if d.running {
			continue
		}
		if w := d.due.Sub(t); w > 0 {
			wait = min(wait, w)
			continue
		}
		if best == nil || d.m.Since.Before(best.m.Since) {
			best = d
		}
	}
	if best != nil {
		best.running = true
	}
	return best, wait
}

// runDeletion deletes one device and clears its intent, or arranges the next try.
func (c *Catalog) runDeletion(d *deletion) {
	err := c.deleteDevice(d)
	c.mu.Lock()
	d.running = false
	d.attempts++
	d.lastErr = err
	if err == nil {
		delete(c.dels, d.m.Device)
		if !d.intent {
			// A reservation: the id may serve again.
			if _, ok := c.held[d.m.Device]; ok {
				delete(c.held, d.m.Device)
				c.free = append(c.free, d.m.Device)
			}
		}
	} else {
		delay := min(retryFirst<<min(d.attempts, 8), retryMost)
		d.due = time.Now().Add(delay)
	}
	c.delDone.Broadcast()
	c.mu.Unlock()
	if err == nil && c.o.OnDeleted != nil {
		c.o.OnDeleted(d.m)
	}
}

func (c *Catalog) deleteDevice(d *deletion) error {
	if !d.deleted {
		if err := c.fault("remove:before-delete"); err != nil {
			return err
		}
		err := c.pool.Delete(c.ctx, d.m.Device)
		if err != nil && !errors.Is(err, thin.ErrNotFound) {
			return err
		}
		d.deleted = true
		if err := c.fault("remove:after-delete"); err != nil {
			return err
		}
	}
	if !d.intent {
		return nil
	}
	return c.submit(c.ctx, &request{Step: Step{FileOnly: true}, cleared: []thin.DevID{d.m.Device}})
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}
