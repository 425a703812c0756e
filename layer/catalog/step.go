package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"mica/engine"
	"mica/thin"
)

// A Create is one device to make in a step.
type Create struct {
	ID     thin.DevID
	Origin thin.DevID // 0: an empty device
}

// A Step is one change of pool and catalog: all of it or nothing.
type Step struct {
	// Creates are made first; their ids come from Alloc.
	Creates []Create
	// Created, if not nil, is called when the devices are durable in the pool (nil) or could not
	// be made, before the catalog commits. It must not block.
	Created func(error)
	// Consume are ids from Alloc whose devices exist already and get a record in this step.
	Consume []thin.DevID
	// Apply changes the records. It may be called more than once and must depend on the
	// transaction only. An error undoes the step.
	Apply func(*Tx) error
	// Expected, if not nil, is what Expect gave for this step.
	Expected *Expected
	// FileOnly: no device comes or goes and no record changes its device (labels, attachments):
	// the step costs the pool nothing.
	FileOnly bool
}

// request is a step on its way through the committer.
type request struct {
	Step
	done    chan struct{}
	err     error
	made    bool         // the creates are in the pool
	removed []Removal    // intents that Apply wrote
	healed  []string     // refs that are broken no longer: gone, or with a new device
	cleared []thin.DevID // removal intents to drop
	reserve []thin.DevID // ids to reserve
	// unreserve are ids that turned out to be somebody else's devices
	unreserve []thin.DevID
}

// Do carries a step out. When it returns nil, the step is durable. When it returns an error, no
// record changed, and devices that were made are deleted in the background and their ids freed
// (Alloc's ids of a failed step are used up; do not Release them). Cancelling ctx takes a step
// out of the queue; once begun it is finished.
func (c *Catalog) Do(ctx context.Context, s Step) error {
	return c.submit(ctx, &request{Step: s})
}

func (c *Catalog) submit(ctx context.Context, r *request) error {
	r.done = make(chan struct{})
	c.mu.Lock()
	if err := c.acceptLocked(); err != nil {
		c.mu.Unlock()
		return c.refuse(r, err)
	}
	c.queue = append(c.queue, r)
	if r.Expected != nil {
		r.Expected.endLocked()
	}
	c.mu.Unlock()
	signal(c.wake)
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	if i := slices.Index(c.queue, r); i >= 0 {
		c.queue = slices.Delete(c.queue, i, i+1)
		c.mu.Unlock()
		return c.refuse(r, ctx.Err())
	}
	c.mu.Unlock()
	<-r.done // begun: finish
	return r.err
}

func (c *Catalog) acceptLocked() error {
	if c.readOnly != nil {
		return c.readOnly
	}
	if c.closed {
		return ErrClosed
	}
	return nil
}

// refuse ends a request that was not begun.
func (c *Catalog) refuse(r *request, err error) error {
	if r.Created != nil {
		r.Created(err)
	}
	c.undo(r)
	return err
}

// undo gives back what a failed request held.
func (c *Catalog) undo(r *request) {
	for _, cr := range r.Creates {
		if r.made {
			c.Abandon(cr.ID)
		} else {
			c.Release(cr.ID)
		}
	}
	for _, id := range r.Consume {
		c.Abandon(id)
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// commitLoop takes what is waiting and makes one step of it.
func (c *Catalog) commitLoop() {
	defer c.wg.Done()
	for {
		select {
		case <-c.wake:
		case <-c.ctx.Done():
			c.mu.Lock()
			left := c.queue
			c.queue = nil
			c.mu.Unlock()
			for _, r := range left {
				r.err = c.refuse(r, ErrClosed)
				close(r.done)
			}
			return
		}
		c.gather()
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		ro := c.readOnly
		c.mu.Unlock()
		if len(batch) == 0 {
			continue
		}
		if ro != nil {
			for _, r := range batch {
				r.err = c.refuse(r, ro)
				close(r.done)
			}
			continue
		}
		if batch = c.admit(batch); len(batch) > 0 {
			c.commit(batch)
		}
	}
}

// commit carries out a batch and answers every request of it.
func (c *Catalog) commit(batch []*request) {
	ctx := context.WithoutCancel(c.ctx) // a step that was begun is finished, also during Close
	c.mu.Lock()
	txid := c.txid
	c.mu.Unlock()
	live, next := c.createAll(ctx, batch, txid)
	if len(live) == 0 && next == txid {
		return
	}
	if next == txid && slices.ContainsFunc(live, func(r *request) bool { return !r.FileOnly }) {
		if c.fault("step:before-txid") != nil {
			c.fail(live, c.ReadOnly())
			return
		}
		if err := c.pool.SetTransactionID(ctx, txid, txid+1); err != nil {
			err = fmt.Errorf("pool transaction id %d to %d: %w", txid, txid+1, err)
			if errors.Is(err, engine.ErrFailed) {
				c.setReadOnly(err)
			}
			c.fail(live, err)
			return
		}
		next = txid + 1
		if c.fault("step:after-txid") != nil {
			c.fail(live, c.ReadOnly())
			return
		}
	}
	live, err := c.write(live, next)
	if err != nil {
		c.writeFailed(ctx, live, txid, next, err)
		return
	}
	c.mu.Lock()
	c.txid = next
	for _, r := range live {
		c.settleLocked(r)
	}
	c.mu.Unlock()
	crashed := c.fault("step:after-commit") != nil
	for _, r := range live {
		if crashed {
			r.err = c.ReadOnly()
		}
		close(r.done)
	}
	signal(c.delete)
}

// createAll makes the devices of a batch and answers the requests whose devices cannot be made.
// next is the pool's transaction id then: where the pool can, it goes up in the same commit.
func (c *Catalog) createAll(ctx context.Context, batch []*request, txid uint64) (live []*request, next uint64) {
	var pairs []engine.SnapPair
	single := false
	for _, r := range batch {
		for _, cr := range r.Creates {
			pairs = append(pairs, engine.SnapPair{ID: cr.ID, Origin: cr.Origin})
			single = single || cr.Origin == 0
		}
	}
	next = txid
	if len(pairs) > 0 && c.fault("step:before-create") != nil {
		c.fail(batch, c.ReadOnly())
		return nil, next
	}
	if len(pairs) > 0 && !single {
		var err error
		sp, one := c.pool.(stepPool)
		if one {
			err = sp.CreateSnapsAt(ctx, pairs, txid, txid+1)
		} else {
			err = c.pool.CreateSnaps(ctx, pairs)
		}
		switch {
		case err == nil:
			for _, r := range batch {
				r.made = len(r.Creates) > 0
			}
			if one {
				next++
			}
		case errors.Is(err, engine.ErrFailed): // whether they exist is not known
			c.setReadOnly(err)
			c.fail(batch, err)
			return nil, next
		case len(batch) == 1:
			c.failCreate(ctx, batch[0], err)
			return nil, next
		}
	}
	for _, r := range batch {
		if len(r.Creates) > 0 && !r.made {
			if err := c.createOne(ctx, r.Creates); err != nil {
				c.failCreate(ctx, r, err)
				continue
			}
			r.made = true
		}
		live = append(live, r)
	}
	if len(pairs) > 0 && c.fault("step:after-create") != nil {
		c.fail(live, c.ReadOnly())
		return nil, txid
	}
	for _, r := range live {
		if r.Created != nil {
			r.Created(nil)
		}
	}
	return live, next
}

// createOne makes the devices of one request, all or none.
func (c *Catalog) createOne(ctx context.Context, creates []Create) error {
	var pairs []engine.SnapPair
	var empty []thin.DevID
	for _, cr := range creates {
		if cr.Origin == 0 {
			if err := c.pool.CreateThin(ctx, cr.ID); err != nil {
				for _, id := range empty {
					c.pool.Delete(ctx, id)
				}
				return err
			}
			empty = append(empty, cr.ID)
			continue
		}
		pairs = append(pairs, engine.SnapPair{ID: cr.ID, Origin: cr.Origin})
	}
	if len(pairs) == 0 {
		return nil
	}
	if err := c.pool.CreateSnaps(ctx, pairs); err != nil {
		for _, id := range empty {
			c.pool.Delete(ctx, id)
		}
		return err
	}
	return nil
}

// failCreate answers a request whose devices could not be made. An id that turns out to exist is
// not ours: it is never deleted and never handed out again.
func (c *Catalog) failCreate(ctx context.Context, r *request, err error) {
	ids := make([]thin.DevID, 0, len(r.Creates))
	for _, cr := range r.Creates {
		ids = append(ids, cr.ID)
	}
	r.err = fmt.Errorf("create %s: %w", nameDevices(ids), err)
	if errors.Is(err, thin.ErrExists) {
		r.Creates = nil
		c.disown(ctx, ids)
	}
	if r.Created != nil {
		r.Created(r.err)
	}
	c.undo(r)
	close(r.done)
}

// write commits the records of a batch and transaction id next. A request whose Apply fails is
// answered and left out; live are those that are in. An error means that the file may or may
// not hold the batch (writeFailed finds out).
func (c *Catalog) write(batch []*request, next uint64) (live []*request, err error) {
	live = batch
	for {
		var bad *request
		var badErr error
		if c.fault("step:before-commit") != nil {
			return live, c.ReadOnly()
		}
		err := c.db.Update(func(tx *bbolt.Tx) error {
			for _, r := range live {
				if err := r.apply(tx, &c.o); err != nil {
					bad, badErr = r, err
					return err
				}
			}
			return putUint(tx.Bucket(bucketMeta), keyTxID, next)
		})
		if bad == nil {
			return live, err
		}
		bad.err = badErr
		live = slices.DeleteFunc(slices.Clone(live), func(r *request) bool { return r == bad })
		c.undo(bad)
		close(bad.done)
	}
}

// apply makes one request's changes of the file.
func (r *request) apply(tx *bbolt.Tx, o *Options) error {
	r.removed = nil
	if r.Apply != nil {
		t := &Tx{tx: tx}
		if err := r.Apply(t); err != nil {
			return err
		}
		r.removed = t.removed
		r.healed = t.gone
		for _, p := range t.put {
			if slices.Contains(r.Consume, p.Device) || slices.ContainsFunc(r.Creates, func(c Create) bool { return c.ID == p.Device }) {
				r.healed = append(r.healed, p.Ref())
			}
		}
	}
	res := tx.Bucket(bucketReserved)
	for _, id := range r.unreserve {
		if err := res.Delete(idKey(id)); err != nil {
			return err
		}
	}
	for _, cr := range r.Creates {
		if err := res.Delete(idKey(cr.ID)); err != nil {
			return err
		}
	}
	for _, id := range r.Consume {
		if err := res.Delete(idKey(id)); err != nil {
			return err
		}
	}
	for _, id := range r.reserve {
		if err := res.Put(idKey(id), nil); err != nil {
			return err
		}
	}
	if n := len(r.reserve); n > 0 {
		if err := putUint(tx.Bucket(bucketMeta), keyNext, uint64(o.nextAfter(r.reserve[n-1]))); err != nil {
			return err
		}
	}
	for _, id := range r.cleared {
		if err := tx.Bucket(bucketRemovals).Delete(idKey(id)); err != nil {
			return err
		}
	}
	return nil
}

// settleLocked takes a committed request into the state in memory.
func (c *Catalog) settleLocked(r *request) {
	for _, cr := range r.Creates {
		delete(c.held, cr.ID)
	}
	for _, id := range r.Consume {
		delete(c.held, id)
	}
	for _, id := range r.reserve {
		c.free = append(c.free, id)
	}
	for _, m := range r.removed {
		c.dels[m.Device] = &deletion{m: m, intent: true}
	}
	for _, id := range r.cleared {
		delete(c.taken, id)
	}
	for _, ref := range r.healed {
		delete(c.broken, ref)
	}
}

// fail answers requests of a batch that came to nothing.
func (c *Catalog) fail(batch []*request, err error) {
	for _, r := range batch {
		if r.err == nil {
			r.err = err
		}
		if r.Created != nil && !r.made {
			r.Created(err)
		}
		c.undo(r)
		close(r.done)
	}
}

// writeFailed finds out what a failed commit left. If the file still is as before, the step is
// undone, and the store goes on (a full host disk). If it is not, or the pool cannot go back,
// nothing more may change: a failed sync is never retried into success.
func (c *Catalog) writeFailed(ctx context.Context, live []*request, txid, next uint64, err error) {
	err = fmt.Errorf("catalog %s: commit: %w", c.o.Path, err)
	if c.ReadOnly() != nil {
		c.fail(live, err)
		return
	}
	var now uint64
	verr := c.db.View(func(tx *bbolt.Tx) (err error) {
		now, err = getUint(tx.Bucket(bucketMeta), keyTxID)
		return err
	})
	switch {
	case next == txid && verr == nil:
		// Nothing of the pool depends on it. Whether a file-only step is in the file is not
		// known; the caller is told that it is not, and will say it again.
	case verr != nil || now != txid:
		c.setReadOnly(err)
	default:
		if e := c.pool.SetTransactionID(ctx, next, txid); e != nil {
			c.setReadOnly(fmt.Errorf("%w; pool transaction id back to %d: %w", err, txid, e))
		}
	}
	c.fail(live, err)
}
