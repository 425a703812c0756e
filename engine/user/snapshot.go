package user

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"mica/engine"
	"mica/thin"
)

// CreateSnap makes id a copy of origin as of now. It is durable when it returns.
func (p *Pool) CreateSnap(ctx context.Context, id, origin thin.DevID) error {
	return p.CreateSnaps(ctx, []engine.SnapPair{{ID: id, Origin: origin}})
}

// CreateSnaps takes several snapshots at one moment: writes to their origins are held back, reads
// are not, while pending mappings go into the trees and each tree gets one more reference.
func (p *Pool) CreateSnaps(ctx context.Context, pairs []engine.SnapPair) error {
	return p.createSnaps(pairs, func() error { return nil })
}

// CreateSnapsAt is CreateSnaps and SetTransactionID in one commit: all of it or nothing.
func (p *Pool) CreateSnapsAt(ctx context.Context, pairs []engine.SnapPair, old, next uint64) error {
	return p.createSnaps(pairs, func() error { return p.meta.SetTransactionID(old, next) })
}

// createSnaps takes snapshots in one transaction with what then does. If then refuses, there are no
// snapshots either.
func (p *Pool) createSnaps(pairs []engine.SnapPair, then func() error) error {
	if len(pairs) == 0 {
		return nil
	}
	p.makeTime()
	if err := p.writable(); err != nil {
		return fmt.Errorf("create snapshot %d of thin %d: %w", pairs[0].ID, pairs[0].Origin, err)
	}
	gen, err := p.snapshot(pairs, then)
	if errors.Is(err, thin.ErrTime) {
		if cerr := p.compact(p.meta.Time()); cerr != nil {
			return fmt.Errorf("%w: %w", err, cerr)
		}
		gen, err = p.snapshot(pairs, then)
	}
	if errors.Is(err, thin.ErrNoMetaSpace) && p.failed() == nil {
		// A commit may free metadata blocks.
		if err := p.commitNow(); err != nil {
			return err
		}
		gen, err = p.snapshot(pairs, then)
	}
	if err != nil {
		return err
	}
	return p.commitTo(gen)
}

// snapshot takes the snapshots in memory and returns the generation that holds them.
func (p *Pool) snapshot(pairs []engine.SnapPair, then func() error) (gen uint64, err error) {
	for {
		frozen := p.openOrigins(pairs)
		// Most of what is pending goes into the trees before writes are held back.
		for _, d := range frozen {
			p.applyMu.Lock()
			err := p.applyLocked(d)
			p.applyMu.Unlock()
			if err != nil {
				return 0, err
			}
		}
		for _, d := range frozen {
			d.w.shutGate()
		}
		for _, d := range frozen {
			d.w.drain()
		}
		p.applyMu.Lock()
		// Opening and closing devices takes applyMu too.
		same := slices.Equal(frozen, p.openOrigins(pairs))
		if same {
			gen = p.commits.open.Load()
			err = p.snapshotLocked(pairs, frozen, then)
		}
		p.applyMu.Unlock()
		for _, d := range frozen {
			d.w.openGate()
		}
		if same {
			return gen, err
		}
	}
}

// openOrigins lists the origins that are open, each once.
func (p *Pool) openOrigins(pairs []engine.SnapPair) []*device {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []*device
	for _, s := range pairs {
		if d := p.devices[s.Origin]; d != nil && !slices.Contains(list, d) {
			list = append(list, d)
		}
	}
	return list
}

// snapshotLocked does the work while no writer of an origin is about. The caller holds applyMu.
func (p *Pool) snapshotLocked(pairs []engine.SnapPair, frozen []*device, then func() error) error {
	if err := p.checkPairs(pairs); err != nil {
		return err
	}
	for _, d := range frozen {
		if err := p.applyLocked(d); err != nil {
			return err
		}
	}
	if !p.meta.CanAdmit(int(p.pending.Load())+2*len(pairs), false) {
		return fmt.Errorf("create snapshot %d of thin %d: %w", pairs[0].ID, pairs[0].Origin, thin.ErrNoMetaSpace)
	}
	for i := 0; i <= len(pairs); i++ {
		var err error
		if i < len(pairs) {
			err = p.meta.CreateSnap(pairs[i].ID, pairs[i].Origin)
		} else {
			err = then()
		}
		if err == nil {
			continue
		}
		// All or none.
		for _, u := range pairs[:i] {
			if uerr := p.meta.UndoSnap(u.ID); uerr != nil {
				return p.fail(fmt.Errorf("%w; %w", err, uerr))
			}
		}
		p.refreshSnapTimes(frozen)
		return err
	}
	return p.refreshSnapTimes(frozen)
}

// refreshSnapTimes takes over what snapshots have made of the origins. Their gates are closed.
func (p *Pool) refreshSnapTimes(devs []*device) error {
	for _, d := range devs {
		det, err := p.meta.Details(d.id)
		if err != nil {
			return p.fail(err)
		}
		d.snapTime.Store(det.SnapshottedTime)
	}
	return nil
}

// checkPairs finds what would fail before anything is done.
func (p *Pool) checkPairs(pairs []engine.SnapPair) error {
	seen := map[thin.DevID]bool{}
	for _, s := range pairs {
		what := fmt.Sprintf("create snapshot %d of thin %d", s.ID, s.Origin)
		if s.ID > thin.MaxDevID {
			return fmt.Errorf("%s: device id %d does not fit 24 bits (at most %d)", what, s.ID, thin.MaxDevID)
		}
		if _, err := p.meta.Details(s.ID); err == nil || seen[s.ID] {
			return fmt.Errorf("%s: device id %d %w", what, s.ID, thin.ErrExists)
		}
		seen[s.ID] = true
		if _, err := p.meta.Details(s.Origin); err != nil {
			return fmt.Errorf("create snapshot %d: %w", s.ID, err)
		}
		p.mu.Lock()
		_, going := p.deleting[s.Origin]
		p.mu.Unlock()
		if going {
			return fmt.Errorf("%s: the origin is being deleted: %w", what, engine.ErrInUse)
		}
	}
	return nil
}
