package kernel

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/thin"
)

// maxID is the highest device id that the kernel takes.
const maxID = 1<<24 - 1

func checkID(what string, ids ...thin.DevID) error {
	for _, id := range ids {
		if id > maxID {
			return fmt.Errorf("%s: device id %d does not fit 24 bits", what, id)
		}
	}
	return nil
}

// message sends a message to the pool, which commits, while this process does not suspend it: a
// trim reads the committed state and relies on nobody committing meanwhile.
func (p *Pool) message(send func(pool string) error) error {
	p.tableMu.RLock()
	defer p.tableMu.RUnlock()
	return send(p.name)
}

// committed looks whether the commit that the kernel makes after a message has worked: the message
// itself does not tell.
func (p *Pool) committed(what string) error {
	st, err := p.poolStatus(true)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if st.Failed || st.Mode == "ro" && st.NeedsCheck {
		return fmt.Errorf("%s: the commit failed: %w: %w", what, engine.ErrFailed, p.writable())
	}
	return nil
}

// CreateThin makes an empty device.
func (p *Pool) CreateThin(ctx context.Context, id thin.DevID) error {
	what := fmt.Sprintf("create thin %d", id)
	if err := checkID(what, id); err != nil {
		return err
	}
	defer p.names.lock(id)()
	if err := p.message(func(pool string) error { return p.dm.CreateThin(pool, uint32(id)) }); err != nil {
		return p.messageErr(what, err)
	}
	p.devices.Add(1)
	return p.committed(what)
}

// CreateSnap is CreateSnaps of one.
func (p *Pool) CreateSnap(ctx context.Context, id, origin thin.DevID) error {
	return p.CreateSnaps(ctx, []engine.SnapPair{{ID: id, Origin: origin}})
}

// CreateSnaps suspends the origins that are active, all of them, makes the snapshots, and lets the
// origins go on. If one cannot be made, those before it are deleted again; a crash in between
// leaves some.
func (p *Pool) CreateSnaps(ctx context.Context, pairs []engine.SnapPair) (err error) {
	if len(pairs) == 0 {
		return nil
	}
	what := fmt.Sprintf("create snapshot %d of thin %d", pairs[0].ID, pairs[0].Origin)
	ids := make([]thin.DevID, 0, 2*len(pairs))
	origins := map[thin.DevID]bool{}
	for _, pr := range pairs {
		if err := checkID(what, pr.ID, pr.Origin); err != nil {
			return err
		}
		ids = append(ids, pr.ID, pr.Origin)
		origins[pr.Origin] = true
	}
	defer p.names.lock(ids...)()
	p.tableMu.RLock() // see message
	defer p.tableMu.RUnlock()
	var held []string
	defer func() {
		for _, name := range held {
			if rerr := p.dm.Resume(name); rerr != nil {
				err = errors.Join(err, fmt.Errorf("%s: let the origin go on: %w", what, rerr))
			}
		}
	}()
	for origin := range origins {
		name := thinName(p.id, origin)
		// No file system is frozen (the caller has, if it wants to), and what waits for space
		// goes on waiting.
		err := p.dm.Suspend(name, true, true)
		switch {
		case errors.Is(err, unix.ENXIO): // not active: nobody writes to it
		case err != nil:
			return fmt.Errorf("%s: suspend the origin: %w", what, err)
		default:
			held = append(held, name)
		}
	}
	for i, pr := range pairs {
		what := fmt.Sprintf("create snapshot %d of thin %d", pr.ID, pr.Origin)
		err := p.messageErr(what, p.dm.CreateSnap(p.name, uint32(pr.ID), uint32(pr.Origin)))
		if err == nil {
			p.devices.Add(1)
			continue
		}
		for _, done := range pairs[:i] {
			if derr := p.dm.DeleteThin(p.name, uint32(done.ID)); derr != nil {
				err = errors.Join(err, fmt.Errorf("take back snapshot %d: %w", done.ID, derr))
				continue
			}
			p.devices.Add(-1)
		}
		return err
	}
	return p.committed(what)
}

// Delete removes a device. The kernel does it in one transaction of its own; what only this device
// has is discarded before, in steps.
func (p *Pool) Delete(ctx context.Context, id thin.DevID) error {
	what := fmt.Sprintf("delete thin %d", id)
	if err := checkID(what, id); err != nil {
		return err
	}
	defer p.names.lock(id)()
	p.mu.Lock()
	h := p.open[id]
	p.mu.Unlock()
	if h != nil {
		return fmt.Errorf("%s: it is open: %w", what, engine.ErrInUse)
	}
	if err := p.dropLeftovers(ctx, id); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.discardOwn(ctx, id); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	before, _ := p.poolStatus(true)
	if err := p.message(func(pool string) error { return p.dm.DeleteThin(pool, uint32(id)) }); err != nil {
		return p.messageErr(what, err)
	}
	p.devices.Add(-1)
	if after, err := p.poolStatus(true); err == nil && after.DataUsed < before.DataUsed {
		p.trim.later() // the delete itself has freed some
	}
	return p.committed(what)
}

// SetTransactionID replaces the pool's transaction id if it is old.
func (p *Pool) SetTransactionID(ctx context.Context, old, next uint64) error {
	what := fmt.Sprintf("set transaction id %d", next)
	err := p.message(func(pool string) error { return p.dm.SetTransactionID(pool, old, next) })
	if errors.Is(err, unix.EINVAL) {
		if st, serr := p.poolStatus(true); serr == nil && !st.Failed {
			return fmt.Errorf("%s: it is %d, not %d", what, st.TransactionID, old)
		}
	}
	if err != nil {
		return p.messageErr(what, err)
	}
	return p.committed(what)
}
