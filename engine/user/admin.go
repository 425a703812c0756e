package user

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"mica/engine"
	"mica/thin"
)

// change runs a change of the metadata in the open transaction and makes it durable.
func (p *Pool) change(what string, do func() error) error {
	if err := p.writable(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	p.applyMu.Lock()
	err := do()
	gen := p.commits.open.Load()
	p.applyMu.Unlock()
	if err != nil {
		if ferr := p.meta.Failed(); ferr != nil {
			return p.fail(err)
		}
		return err
	}
	return p.commitTo(gen)
}

// CreateThin makes an empty device.
func (p *Pool) CreateThin(ctx context.Context, id thin.DevID) error {
	what := fmt.Sprintf("create thin %d", id)
	do := func() error {
		if !p.meta.CanAdmit(int(p.pending.Load())+2, false) {
			return fmt.Errorf("%s: %w", what, thin.ErrNoMetaSpace)
		}
		return p.meta.CreateThin(id)
	}
	err := p.change(what, do)
	if errors.Is(err, thin.ErrNoMetaSpace) && p.failed() == nil {
		if err := p.commitNow(); err != nil {
			return err
		}
		err = p.change(what, do)
	}
	return err
}

// SetTransactionID replaces the pool's transaction id if it is old.
func (p *Pool) SetTransactionID(ctx context.Context, old, next uint64) error {
	return p.change("set transaction id", func() error { return p.meta.SetTransactionID(old, next) })
}

// deleteSteps is how many steps of a delete go by between commits, so that neither the metadata
// reserve nor the freed data wait for the end of a large one, and a commit that others wait for
// has to do with some ten thousands of freed blocks only.
const deleteSteps = 32

// Delete removes a device. A large one goes in steps between which others commit; if it is
// interrupted the device is still there, with fewer mappings.
func (p *Pool) Delete(ctx context.Context, id thin.DevID) error {
	what := fmt.Sprintf("delete thin %d", id)
	if err := p.writable(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.beginDelete(id); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer func() {
		p.mu.Lock()
		delete(p.deleting, id)
		p.mu.Unlock()
	}()
	flushes := p.flushes.Load()
	for step := 1; ; step++ {
		if err := p.writable(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		begin := time.Now()
		done, err := p.deleteStep(id)
		if errors.Is(err, thin.ErrNoMetaSpace) && p.failed() == nil {
			err = p.tightly(func() (err error) {
				done, err = p.deleteStep(id)
				return err
			})
		}
		switch {
		case err != nil:
			return err
		case done:
			return p.commitNow()
		}
		p.wakeCommitLoop()
		runtime.Gosched() // whoever waits for the metadata comes first
		if p.giveWay(&flushes) {
			time.Sleep(min(time.Since(begin), time.Millisecond))
		}
		if step%deleteSteps == 0 {
			if err := p.commitNow(); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(fmt.Errorf("%s: interrupted, it has lost some of its blocks: %w", what, err), p.commitNow())
		}
	}
}

// giveWay tells whether a delete should rest after a step: devices were flushed since the last one, so
// that somebody waits for the processor; and nobody waits for the space.
func (p *Pool) giveWay(flushes *uint64) bool {
	now := p.flushes.Load()
	others := now != *flushes
	*flushes = now
	return others && !p.outOfSpace.Load()
}

// deleteStep does one step in the open transaction.
func (p *Pool) deleteStep(id thin.DevID) (done bool, err error) {
	p.applyMu.Lock()
	defer p.applyMu.Unlock()
	if done, err = p.meta.DeleteStep(id); err != nil && p.meta.Failed() != nil {
		return false, p.fail(err)
	}
	return done, err
}

// beginDelete marks a device so that nobody opens or snapshots it.
func (p *Pool) beginDelete(id thin.DevID) error {
	p.applyMu.Lock() // no snapshot of it is under way
	defer p.applyMu.Unlock()
	if _, err := p.meta.Details(id); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devices[id] != nil {
		return fmt.Errorf("it is open: %w", engine.ErrInUse)
	}
	if _, ok := p.deleting[id]; ok {
		return fmt.Errorf("it is being deleted already: %w", engine.ErrInUse)
	}
	p.deleting[id] = struct{}{}
	return nil
}

// ReserveMetadataSnap keeps the state as of now readable through the held root.
func (p *Pool) ReserveMetadataSnap(ctx context.Context) error {
	if err := p.writable(); err != nil {
		return fmt.Errorf("reserve metadata snapshot: %w", err)
	}
	for {
		if err := p.commitNow(); err != nil {
			return err
		}
		p.applyMu.Lock()
		if p.meta.Changed() { // somebody was quicker
			p.applyMu.Unlock()
			continue
		}
		err := p.meta.ReserveMetadataSnap()
		gen := p.commits.open.Load()
		p.applyMu.Unlock()
		if err != nil {
			return err
		}
		return p.commitTo(gen)
	}
}

// ReleaseMetadataSnap drops the held root.
func (p *Pool) ReleaseMetadataSnap(ctx context.Context) error {
	return p.change("release metadata snapshot", p.meta.ReleaseMetadataSnap)
}

// view commits what is pending and pins the result.
func (p *Pool) view() (*thin.View, error) {
	if !p.readOnly && p.failed() == nil {
		if err := p.commitNow(); err != nil {
			return nil, err
		}
	}
	return p.meta.Pin(), nil
}

// Delta lists where two devices differ and agree, as of a commit made in the call.
func (p *Pool) Delta(ctx context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error {
	v, err := p.view()
	if err != nil {
		return err
	}
	defer v.Unpin()
	return v.Delta(left, right, func(r thin.DeltaRange) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return fn(r)
	})
}

// Changes is Delta without what is the same. It does not read what the trees of the two devices share.
func (p *Pool) Changes(ctx context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error {
	v, err := p.view()
	if err != nil {
		return err
	}
	defer v.Unpin()
	return v.Changes(left, right, func(r thin.DeltaRange) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return fn(r)
	})
}

// Usage counts the blocks of every device, as of a commit made in the call.
func (p *Pool) Usage(ctx context.Context) (map[thin.DevID]thin.Usage, error) {
	v, err := p.view()
	if err != nil {
		return nil, err
	}
	defer v.Unpin()
	return v.Usage()
}
