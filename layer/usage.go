package layer

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"mica/layer/catalog"
	"mica/thin"
)

// An ownPool is a pool that can count the blocks which a device provisioned since it was made and
// still maps. It walks the device's mappings: the store asks only where no count was kept (after
// a crash), and keeps the answer.
type ownPool interface {
	OwnBlocks(ctx context.Context, id thin.DevID) (uint64, error)
}

// ownBytes is the usage of a device: what was provisioned since it was made, less what was
// discarded. O(1), but where a crash left no count: then once by a walk.
func (s *Store) ownBytes(r catalog.Record, b deviceBody, l *live) int64 {
	if l != nil && !l.ro {
		if n := l.ownBlocks(); n >= 0 {
			return n * s.block
		}
		before, counts := int64(0), false
		if c, ok := l.t.(ownCounter); ok {
			before, counts = c.OwnChange(), true
		}
		n, err := s.countOwn(r)
		if err != nil {
			return 0
		}
		if counts {
			s.mu.Lock()
			if l.own < 0 {
				l.own = n - before
			}
			s.mu.Unlock()
		}
		return n * s.block
	}
	if !b.OwnStale {
		return b.OwnBlocks * s.block
	}
	n, err := s.countOwn(r)
	if err != nil {
		return 0
	}
	s.keepOwn(r, n)
	return n * s.block
}

// countOwn counts a device's own blocks.
func (s *Store) countOwn(r catalog.Record) (int64, error) {
	if p, ok := s.pool.(ownPool); ok {
		n, err := p.OwnBlocks(s.ctx, r.Device)
		return int64(n), err
	}
	// Without help from the engine: what differs from the layer that it was made from.
	return s.countDelta(s.ctx, r.Parent, r.Device)
}

// countDelta counts the blocks in which a device differs from the one of another record.
func (s *Store) countDelta(ctx context.Context, ref string, id thin.DevID) (int64, error) {
	var parent thin.DevID
	err := s.cat.View(func(tx *catalog.Tx) error {
		kind, key, _ := strings.Cut(ref, "/")
		p, err := tx.Get(kind, key)
		parent = p.Device
		return err
	})
	if err != nil {
		return 0, err
	}
	n := uint64(0)
	err = s.pool.Delta(ctx, parent, id, func(d thin.DeltaRange) error {
		if d.Kind == "different" || d.Kind == "right_only" {
			n += d.Len
		}
		return nil
	})
	return int64(n), err
}

// keepOwn writes a count down for a device that nobody has open, if its record is still the one
// that was counted. It is an optimisation: errors only mean that it will be counted again.
func (s *Store) keepOwn(r catalog.Record, n int64) {
	if s.writable() != nil {
		return
	}
	s.background(func(ctx context.Context) {
		s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
			cur, err := tx.Get(r.Kind, r.Key)
			if err != nil || cur.Device != r.Device || !bytes.Equal(cur.Body, r.Body) {
				return nil
			}
			switch r.Kind {
			case kindLayer:
				return putOwn(tx, cur, func(b *layerBody) { b.setOwn(n) })
			case kindSnapshot:
				return putOwn(tx, cur, func(b *snapshotBody) { b.setOwn(n) })
			case kindContainer:
				return putOwn(tx, cur, func(b *containerBody) {
					if b.Attach == nil {
						b.setOwn(n)
					}
				})
			case kindSnap:
				return putOwn(tx, cur, func(b *snapBody) {
					if b.Kind == SnapCommitted {
						b.setOwn(n)
					}
				})
			}
			return nil
		}}, nil, nil)
	})
}

func putOwn[T any](tx *catalog.Tx, r catalog.Record, set func(*T)) error {
	d, err := decode[T](r)
	if err != nil {
		return err
	}
	set(&d.body)
	return put(tx, d)
}

// DF is described at API.
func (s *Store) DF(ctx context.Context) (DF, error) {
	st, err := s.pool.Status(ctx)
	if err != nil {
		return DF{}, err
	}
	usage, err := s.pool.Usage(ctx)
	if err != nil {
		return DF{}, err
	}
	df := DF{BlockSize: st.BlockSize, TotalBytes: int64(st.DataBlocks) * st.BlockSize,
		UsedBytes: int64(st.DataUsed+st.DataFreeing) * st.BlockSize}
	df.FreeBytes = df.TotalBytes - df.UsedBytes
	add := func(kind, name, owner string, id thin.DevID, own int64) {
		u := usage[id]
		delete(usage, id)
		df.Entries = append(df.Entries, DFEntry{Kind: kind, Name: name, Owner: owner, Device: id,
			MappedBytes: int64(u.Mapped) * s.block, ExclusiveBytes: int64(u.Exclusive) * s.block,
			SharedBytes: int64(u.Mapped-u.Exclusive) * s.block, UsedBytes: own})
	}
	for _, kind := range []string{kindBase, kindLayer, kindContainer, kindSnapshot, kindSnap} {
		var recs []record[containerBody] // has all that is needed of every kind
		err := list(s, kind, "", "", func(r record[containerBody]) (bool, error) {
			recs = append(recs, r)
			return true, ctx.Err()
		})
		if err != nil {
			return DF{}, err
		}
		for _, r := range recs {
			var l *live
			if r.Device == 0 {
				continue // a view, or another name of a layer
			}
			if kind == kindContainer || kind == kindSnap {
				l = s.liveOf(r.body.ID)
			}
			add(kind, r.Key, r.body.Owner, r.Device, s.ownBytes(r.Record, r.body.deviceBody, l))
		}
	}
	for _, p := range s.cat.Pending() {
		if _, ok := usage[p.Device]; ok {
			add("removing", p.Object, "", p.Device, 0)
		}
	}
	foreign, err := s.cat.Foreign(ctx)
	if err != nil {
		return DF{}, err
	}
	for _, d := range foreign {
		if _, ok := usage[d.ID]; ok {
			add("foreign", "", "", d.ID, 0)
		}
	}
	return df, nil
}

// Status is described at API.
func (s *Store) Status(ctx context.Context) (Status, error) {
	st := Status{StoreID: s.cat.StoreID(), Catalog: s.o.Catalog, TransactionID: s.cat.TransactionID(),
		FSType: s.o.FSType, BaseSize: s.o.BaseSize, Reserved: s.cat.Reserved(), Queue: s.Queue()}
	if err := s.cat.ReadOnly(); err != nil {
		st.ReadOnly = err.Error()
	}
	ready, err := s.base.status()
	st.BaseReady = ready
	if err != nil {
		st.BaseError = err.Error()
	}
	if b, err := s.findBase(); err == nil {
		st.FSType, st.BaseSize = b.body.FSType, b.body.SizeBytes
	}
	err = s.cat.View(func(tx *catalog.Tx) error {
		for kind, n := range map[string]*int{kindImage: &st.Images, kindLayer: &st.Layers, kindContainer: &st.Containers, kindSnapshot: &st.Snapshots, kindSnap: &st.Snaps} {
			if err := tx.Each(kind, "", "", func(catalog.Record) (bool, error) { *n++; return true, nil }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return st, s.wrap(err)
	}
	for ref, why := range s.cat.AllBroken() {
		kind, name, _ := strings.Cut(ref, "/")
		st.Broken = append(st.Broken, kind+" "+name+": "+why)
	}
	slices.Sort(st.Broken)
	s.mu.Lock()
	st.Attached = len(s.live)
	s.mu.Unlock()
	foreign, err := s.cat.Foreign(ctx)
	for _, d := range foreign {
		st.Foreign = append(st.Foreign, d.ID)
	}
	return st, err
}
