package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"mica/layer/archive"
	"mica/layer/catalog"
	"mica/thin"
)

// ErrNotDerived: of two trees to compare, the upper was not made from the lower.
var ErrNotDerived = errors.New("not made from the other")

// A mounted is what a mount source shows: an active snapshot, a container, or a device that does
// not change.
type mounted struct {
	ref string // of the record
	id  string // of the attachment
	rec record[containerBody]
	ro  bool // it does not change
}

// source finds the object whose node a mount source is: a link or the node itself. ErrNotFound if
// it is none of this store's.
func (s *Store) source(path string) (m mounted, err error) {
	var l *live
	s.mu.Lock()
	for _, v := range s.live {
		if v.a != nil && path != "" && (v.a.Link() == path || v.a.Node() == path) {
			l = v
		}
	}
	s.mu.Unlock()
	if l == nil || l.dead.Load() {
		return m, fmt.Errorf("mount source %q: %w", path, ErrNotFound)
	}
	m.id = l.id
	found := func(ref string, rec catalog.Record, body deviceBody, ro bool) {
		m.ref, m.ro = ref, ro
		m.rec = record[containerBody]{Record: rec, body: containerBody{deviceBody: body}}
	}
	err = s.wrap(s.cat.View(func(tx *catalog.Tx) error {
		for _, kind := range []string{kindSnap, kindContainer, kindExport} {
			err := tx.Each(kind, "", "", func(r catalog.Record) (bool, error) {
				if kind == kindExport {
					ex, err := decode[exportBody](r)
					if err == nil && ex.body.ID == l.id {
						r.Device, r.Parent = ex.body.Device, ex.body.Object
						found(r.Ref(), r, deviceBody{ID: l.id, SizeBytes: ex.body.SizeBytes, FSType: ex.body.FSType}, true)
					}
					return m.ref == "", err
				}
				if r.Device != l.dev {
					return true, nil
				}
				d, err := decode[containerBody](r) // has all that is needed of both kinds
				if err == nil && d.body.ID == l.id {
					found(r.Ref(), r, d.body.deviceBody, l.ro)
				}
				return m.ref == "", err
			})
			if err != nil || m.ref != "" {
				return err
			}
		}
		return nil
	}))
	if err == nil && m.ref == "" {
		err = fmt.Errorf("mount source %q: removed: %w", path, ErrNotFound)
	}
	return m, err
}

// Owns tells whether a mount source is a node of this store.
func (s *Store) Owns(path string) bool {
	_, err := s.source(path)
	return err == nil
}

// SnapNames are the names of the snapshots that a mount source shows: one active one, or the views that
// share it.
func (s *Store) SnapNames(path string) []string {
	m, err := s.source(path)
	if err != nil {
		return nil
	}
	var names []string
	list(s, kindSnap, "", "", func(r record[snapBody]) (bool, error) {
		if r.body.ID == m.id {
			names = append(names, nameOf(r.Key))
		}
		return true, nil
	})
	return names
}

// DiffMounts writes the layer tar that leads from the tree on the mount source lower (empty: an
// empty tree) to the one on upper. What may change meanwhile is compared as a copy of the moment
// of the call, quiesced like any other. upper must have been made from lower: ErrNotDerived.
func (s *Store) DiffMounts(ctx context.Context, lower, upper string, w io.Writer) (Level, error) {
	level, err := s.diffMounts(ctx, lower, upper, w)
	if err != nil {
		return "", fmt.Errorf("difference between %q and %q: %w", lower, upper, err)
	}
	return level, nil
}

func (s *Store) diffMounts(ctx context.Context, lower, upper string, w io.Writer) (Level, error) {
	if err := s.writable(); err != nil {
		return "", err
	}
	up, err := s.source(upper)
	if err != nil {
		return "", err
	}
	var low mounted
	if lower != "" {
		if low, err = s.source(lower); err != nil {
			return "", err
		}
		if !low.ro {
			return "", fmt.Errorf("the lower one can be written: %w", ErrNotDerived)
		}
		made, err := s.madeFrom(up, low.rec.Device)
		if err != nil {
			return "", err
		}
		if !made {
			return "", ErrNotDerived
		}
	}
	for _, m := range []mounted{low, up} {
		if m.rec.body.GuestOwned {
			return "", ErrGuestOwned
		}
	}
	dev, level, release, err := s.pinned(ctx, up)
	if err != nil {
		return "", err
	}
	defer release()
	var from treeDev
	if lower != "" {
		from = treeDev{low.rec.Device, low.rec.body.SizeBytes}
	}
	return level, s.diffTrees(ctx, from, treeDev{dev, up.rec.body.SizeBytes}, up.rec.body.FSType, up.ref, w)
}

// pinned returns a device that has the contents of m as of now, and does not change until release.
func (s *Store) pinned(ctx context.Context, m mounted) (dev thin.DevID, level Level, release func(), err error) {
	if m.ro {
		return m.rec.Device, LevelFileSystem, func() {}, nil
	}
	unlock, err := s.locks.lock(ctx, m.ref)
	if err != nil {
		return 0, "", nil, err
	}
	defer unlock()
	if s.liveOf(m.id) == nil {
		return 0, "", nil, fmt.Errorf("%s: removed: %w", m.ref, ErrNotFound)
	}
	dev, level, _, err = s.takeCopy(ctx, m.rec, QuiesceOptions{})
	return dev, level, func() { s.cat.Abandon(dev) }, err
}

// madeFrom tells whether dev is m's device, or one of those that it was made from.
func (s *Store) madeFrom(m mounted, dev thin.DevID) (made bool, err error) {
	made = m.rec.Device == dev
	err = s.cat.View(func(tx *catalog.Tx) error {
		for ref, depth := m.rec.Parent, 0; ref != "" && !made && depth < 100_000; depth++ {
			kind, key, _ := strings.Cut(ref, "/")
			r, err := tx.Get(kind, key)
			if err != nil {
				return err
			}
			id := r.Device
			if id == 0 && kind == kindSnap {
				d, err := decode[snapBody](r)
				if err != nil {
					return err
				}
				l, err := tx.Get(kindLayer, d.body.ChainID)
				if err != nil {
					return err
				}
				id = l.Device
			}
			made, ref = id == dev, r.Parent
		}
		return nil
	})
	return made, s.wrap(err)
}

// Limits bound what ApplyMount takes, and what is unpacked for it.
func (s *Store) Limits() archive.Limits { return s.o.Limits }

// ApplyMount changes the tree on a mount source as the uncompressed layer tar r says. It is on the
// device when ApplyMount returns nil; after an error it is half changed.
func (s *Store) ApplyMount(ctx context.Context, path string, r io.Reader) error {
	if err := s.writable(); err != nil {
		return err
	}
	m, err := s.source(path)
	if err != nil {
		return err
	}
	unlock, err := s.locks.lock(ctx, m.ref)
	if err != nil {
		return err
	}
	defer unlock()
	l := s.liveOf(m.id)
	switch {
	case l == nil || l.a == nil:
		return fmt.Errorf("%s: removed: %w", m.ref, ErrNotFound)
	case l.ro:
		return fmt.Errorf("apply to %s: it cannot be written: %w", m.ref, ErrState)
	case m.rec.body.GuestOwned:
		return fmt.Errorf("apply to %s: %w", m.ref, ErrGuestOwned)
	}
	st, err := s.files.Apply(ctx, l.a.Node(), m.rec.body.FSType, false, r)
	for _, warning := range st.Warnings {
		s.log.Warn("apply", "object", m.ref, "entry", warning)
	}
	if err == nil && l.lostWrites() {
		err = fmt.Errorf("writes failed: %w", ErrNoSpace)
	}
	if err != nil {
		return fmt.Errorf("apply to %s: %w", m.ref, err)
	}
	return nil
}
