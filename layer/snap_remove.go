package layer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mica/layer/catalog"
)

// detachSoon is how long a removal waits for its node to go away; what takes longer goes on in the
// background.
const detachSoon = 500 * time.Millisecond

// endLiveSoon is endLive for those who must not wait.
func (s *Store) endLiveSoon(ctx context.Context, l *live) error {
	cctx, cancel := context.WithTimeout(ctx, detachSoon)
	defer cancel()
	err := s.endLive(cctx, l)
	if err != nil && cctx.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}

// Remove removes a snapshot: out of the catalog at the return, its blocks are freed in the
// background. One that is mounted is removed all the same; its device goes when whoever has it
// mounted has let go (Queue says who). ErrInUse: others were made from it.
func (n *SnapStore) Remove(ctx context.Context, name string) error {
	if err := n.remove(ctx, name); err != nil {
		return fmt.Errorf("remove snapshot %q: %w", shorten(name), err)
	}
	return nil
}

func (n *SnapStore) remove(ctx context.Context, name string) error {
	s := n.s
	r, unlock, err := n.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	ref := r.Ref()
	s.mu.Lock()
	children, leases := s.refs[ref], s.leases[ref]
	s.mu.Unlock()
	switch {
	case children > 0:
		return fmt.Errorf("%w: %d snapshots were made from it", ErrInUse, children)
	case leases > 0:
		return fmt.Errorf("%w: a snapshot is being made from it", ErrInUse)
	}
	switch {
	case r.body.Kind == SnapView:
		err = n.removeView(ctx, r)
	case r.body.ChainID != "":
		err = n.removeAlias(ctx, r)
	default:
		var l *live
		if l = s.liveOf(r.body.ID); l != nil {
			if err := s.endLiveSoon(ctx, l); err == nil || s.liveOf(l.id) != l {
				l = nil
			}
		}
		err = n.drop(ctx, r, l)
	}
	if err != nil {
		return err
	}
	s.hub.emit(EventRemove, ref, "")
	return nil
}

// drop takes a snapshot with a device out of the catalog; the device is deleted when l, if it is
// not nil, has gone. The caller holds the snapshot's lock.
func (n *SnapStore) drop(ctx context.Context, r record[snapBody], l *live) error {
	s := n.s
	err := s.step(ctx, catalog.Step{Apply: func(tx *catalog.Tx) error {
		if err := tx.Delete(r.Kind, r.Key); err != nil {
			return err
		}
		return tx.Remove(removalOf(r.Ref(), r.Device, l, r.body.SizeBytes))
	}}, nil, []catalog.Record{r.Record})
	if err == nil && l != nil {
		s.leave(r.Device, r.Ref(), l)
	}
	return err
}

func (n *SnapStore) removeView(ctx context.Context, r record[snapBody]) error {
	s := n.s
	ex, err := s.exportByID(r.body.ID)
	if errors.Is(err, ErrNotFound) {
		return n.dropView(ctx, r, 0)
	}
	if err != nil {
		return err
	}
	unlock, err := s.locks.lock(ctx, exportLock(ex.body.Device))
	if err != nil {
		return err
	}
	defer unlock()
	return n.dropView(ctx, r, ex.body.Device)
}
