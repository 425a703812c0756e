package layer

import (
	"context"
	"errors"
	"fmt"

	"mica/engine"
	"mica/layer/catalog"
	"mica/thin"
)

// A SnapSpec describes a new active snapshot or view.
type SnapSpec struct {
	Name, Parent string
	Labels       map[string]string
	// SizeBytes of an active one; 0: that of the parent; smaller than the parent's is ErrInvalid.
	SizeBytes int64
	// SizeHint is a size in bytes that is taken if it is more than the parent's.
	SizeHint int64
	// Unpack: it is made to unpack a layer of an image, by the host.
	Unpack bool
}

// A SnapMount is how an active snapshot or a view is mounted.
type SnapMount struct {
	Source  string // the link to the node
	FSType  string
	Options []string
}

// Prepare makes an active snapshot, and its node.
func (n *SnapStore) Prepare(ctx context.Context, o SnapSpec) (SnapMount, error) {
	m, err := n.prepare(ctx, o)
	if err != nil {
		return m, fmt.Errorf("prepare snapshot %q: %w", shorten(o.Name), err)
	}
	return m, nil
}

func (n *SnapStore) prepare(ctx context.Context, o SnapSpec) (m SnapMount, err error) {
	s := n.s
	if err := s.writable(); err != nil {
		return m, err
	}
	if err := errors.Join(checkSnapName(o.Name), checkSnapLabels(o.Labels)); err != nil {
		return m, err
	}
	soon := s.cat.Expect()
	defer soon.End()
	if err := s.admit(ctx); err != nil {
		return m, err
	}
	src, release, err := n.holdParent(ctx, o.Parent)
	if err != nil {
		return m, err
	}
	defer release()
	size := src.body.SizeBytes
	if o.SizeBytes != 0 {
		if err := checkSize(o.SizeBytes); err != nil {
			return m, err
		}
		if o.SizeBytes < size {
			return m, fmt.Errorf("%w size of %d bytes: the parent has %d", ErrInvalid, o.SizeBytes, size)
		}
		size = o.SizeBytes
	} else if o.SizeHint > size && checkSize(o.SizeHint) == nil {
		size = o.SizeHint
	}
	unlock, err := s.locks.lock(ctx, n.ref(o.Name))
	if err != nil {
		return m, err
	}
	defer unlock()
	if err := n.mustBeNew(o.Name); err != nil {
		return m, err
	}
	rec := record[snapBody]{Record: catalog.Record{Kind: kindSnap, Key: n.key(o.Name), Parent: src.ref}}
	rec.body = snapBody{Kind: SnapActive, ParentName: o.Parent, Updated: snapNow(),
		Attach: &attachBody{As: AsBlock, Boot: s.boot}, deviceBody: deviceBody{SizeBytes: size, FSType: src.body.FSType,
			Owner: n.Owner(), Labels: o.Labels, OwnStale: true,
			GuestOwned: src.body.GuestOwned || n.o.GuestOwned && !o.Unpack}}
	rec.body.Created = rec.body.Updated
	var own int64 // blocks that growing took
	var grown func(int64)
	if size > src.body.SizeBytes && !src.body.GuestOwned {
		grown = func(n int64) { own = n }
	}
	if err := makeDevice(ctx, s, &rec, &rec.body.deviceBody, src.dev, soon, grown); err != nil {
		return m, err
	}
	dirty := int64(0)
	if o.Unpack {
		dirty = bulkDirty
	}
	if _, err := s.openSnap(ctx, rec, own, false, dirty); err != nil {
		cctx, cancel := s.short(ctx)
		defer cancel()
		return m, errors.Join(fmt.Errorf("attach: %w", err), n.drop(cctx, rec, nil))
	}
	s.hub.emit(EventCreate, rec.Ref(), o.Parent)
	return n.snapMount(rec)
}

// admit refuses new active snapshots while there is no room for what a mount alone writes.
func (s *Store) admit(ctx context.Context) error {
	st, err := s.pool.Status(ctx)
	if err != nil {
		return err
	}
	free := int64(st.DataBlocks) - int64(st.DataUsed) - int64(st.DataFreeing)
	if st.Mode == engine.ModeOutOfDataSpace.String() || st.Mode == engine.ModeWrite.String() && free < freeBlocksForFreeze {
		return fmt.Errorf("%w: %d of %d data blocks of %d bytes are free, want %d", ErrNoSpace, max(free, 0), st.DataBlocks, st.BlockSize, freeBlocksForFreeze)
	}
	return nil
}

// mustBeNew returns ErrExists if there is a snapshot of that name.
func (n *SnapStore) mustBeNew(name string) error {
	old, err := n.record(name)
	switch {
	case err == nil:
		return fmt.Errorf("snapshot %q %w: %s, parent %q", shorten(name), ErrExists, old.body.Kind, shorten(old.body.ParentName))
	case errors.Is(err, ErrNotFound):
		return nil
	}
	return err
}

// openSnap opens and exports an active snapshot's device.
func (s *Store) openSnap(ctx context.Context, r record[snapBody], own int64, adopt bool, dirty int64) (*live, error) {
	key := r.Key
	lost := func(err error) { s.noteLostWrites(key, r.Device, err) }
	return s.openNoting(ctx, r.body.ID, r.Device, r.body.SizeBytes, own, *r.body.Attach, adopt, dirty, r.Ref(), lost)
}

// noteLostWrites writes down that a write to a snapshot's device failed, so that it is not
// committed. Called once for each opening.
func (s *Store) noteLostWrites(key string, dev thin.DevID, cause error) {
	s.log.Warn("a write failed; the snapshot cannot be committed", "snapshot", key, "device", dev, "err", cause)
	s.background(func(ctx context.Context) {
		_, err := s.editSnap(ctx, key, func(b *snapBody) error {
			b.LostWrites = b.Kind == SnapActive
			return nil
		})
		if err != nil && !errors.Is(err, ErrNotFound) && ctx.Err() == nil {
			s.log.Error("record of a failed write", "snapshot", key, "err", err)
		}
	})
}

// snapMount describes the mount of an active snapshot or view; its export must be live.
func (n *SnapStore) snapMount(r record[snapBody]) (SnapMount, error) {
	l := n.s.liveOf(r.body.ID)
	if l == nil || l.a == nil || l.dead.Load() {
		return SnapMount{}, fmt.Errorf("snapshot %q: its node is gone: %w", shorten(nameOf(r.Key)), ErrNotFound)
	}
	ro := r.body.Kind == SnapView
	o := append(n.s.mountOptions(r.body.FSType, ro), n.o.MountOptions...)
	return SnapMount{Source: l.a.Link(), FSType: r.body.FSType, Options: o}, nil
}

// Mount describes how an active snapshot or view is mounted. If its node is not there (after a
// reboot, or because somebody took it away), it is made again.
func (n *SnapStore) Mount(ctx context.Context, name string) (SnapMount, Snap, error) {
	s := n.s
	r, err := n.record(name)
	if err != nil {
		return SnapMount{}, Snap{}, err
	}
	if r.body.Kind == SnapCommitted {
		return SnapMount{}, Snap{}, fmt.Errorf("mounts of snapshot %q: it is committed, which is not mounted: %w", shorten(name), ErrState)
	}
	if m, err := n.snapMount(r); err == nil {
		return m, s.describeSnap(r), nil
	}
	m, err := n.mountAgain(ctx, name)
	if err != nil {
		return m, Snap{}, fmt.Errorf("mounts of snapshot %q: %w", shorten(name), err)
	}
	return m, s.describeSnap(r), nil
}

func (n *SnapStore) mountAgain(ctx context.Context, name string) (m SnapMount, err error) {
	s := n.s
	r, unlock, err := n.lock(ctx, name)
	if err != nil {
		return m, err
	}
	defer unlock()
	if m, err := n.snapMount(r); err == nil {
		return m, nil // somebody was quicker
	}
	if err := s.usable(r.Ref()); err != nil {
		return m, err
	}
	if r.body.Kind == SnapView {
		return n.viewAgain(ctx, r)
	}
	if l := s.liveOf(r.body.ID); l != nil {
		if err := s.endLive(ctx, l); err != nil {
			return m, fmt.Errorf("its node was taken away: %w", err)
		}
	}
	own := int64(-1)
	if !r.body.OwnStale {
		own = r.body.OwnBlocks
	}
	if r.body.Attach.Boot != s.boot || !r.body.OwnStale {
		r, err = s.editSnap(ctx, r.Key, func(b *snapBody) error { // before the first write can happen
			b.Attach.Boot, b.OwnStale = s.boot, true
			return nil
		})
		if err != nil {
			return m, err
		}
	}
	if _, err := s.openSnap(ctx, r, own, false, 0); err != nil {
		return m, fmt.Errorf("attach: %w", err)
	}
	return n.snapMount(r)
}
