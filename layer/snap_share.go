package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"mica/layer/catalog"
)

// Shared finds the committed snapshot that a layer with the chain id ref, made from parent, has
// already: unpacked before, for another of containerd's namespaces; or unpacked by another snapshotter
// of this store; or imported as a layer of an image. In the latter cases it gets a name here.
// ErrNotFound if there is none.
//
// labels are given to a new name, with LabelSnapRef.
func (n *SnapStore) Shared(ctx context.Context, ref, parent string, labels map[string]string) (Snap, error) {
	s := n.s
	if err := s.writable(); err != nil {
		return Snap{}, err
	}
	found, others, err := n.findRef(ctx, ref, parent)
	if err == nil || !errors.Is(err, ErrNotFound) {
		return found, err
	}
	notFound := err
	if err := errors.Join(checkDigest("chain id", ref), checkSnapLabels(labels)); err != nil {
		return Snap{}, fmt.Errorf("layer %q: %w", shorten(ref), ErrNotFound)
	}
	if _, err := s.layerRecord(ref); err != nil && len(others) == 0 {
		return Snap{}, err
	}
	src, release, err := n.holdParent(ctx, parent)
	if err != nil {
		return Snap{}, err
	}
	defer release()
	unlock, err := s.locks.lock(ctx, "@"+ref) // one name, also if two ask at once
	if err != nil {
		return Snap{}, err
	}
	defer unlock()
	if found, others, err = n.findRef(ctx, ref, parent); err == nil {
		return found, nil
	}
	if parent != "" && src.chain == "" {
		return Snap{}, notFound // what is below it here has no layer to be compared
	}
	for _, key := range append([]string{ref}, s.otherLayers(ctx, others, src)...) {
		l, releaseLayer, err := s.holdLayer(ctx, key)
		if err != nil {
			continue
		}
		defer releaseLayer()
		if !l.body.GuestOwned && l.body.Parent == src.chain {
			return n.putAlias(ctx, l, src, parent, ref, labels)
		}
	}
	return Snap{}, notFound
}

// otherLayers makes layers of what other snapshotters have unpacked on the same parent, and returns
// their keys.
func (s *Store) otherLayers(ctx context.Context, others []record[snapBody], src source) (keys []string) {
	for _, r := range others {
		key, err := s.shareSnap(ctx, r, src)
		if err != nil {
			s.log.Info("a layer that another snapshotter unpacked is not shared", "snapshot", r.Key, "because", err)
			continue
		}
		keys = append(keys, key)
	}
	return keys
}

// shareSnap makes a layer of a committed snapshot's device, whose name goes on as one of the layer's
// names, and returns the layer's key. It is no chain id: only whoever unpacked it has said what is in
// it, and an import of an image must not take that for true.
func (s *Store) shareSnap(ctx context.Context, r record[snapBody], src source) (key string, err error) {
	unlock, err := s.locks.lock(ctx, r.Ref())
	if err != nil {
		return "", err
	}
	defer unlock()
	if r, err = load[snapBody](s, kindSnap, r.Key); err != nil {
		return "", err
	}
	if r.body.ChainID != "" {
		return r.body.ChainID, nil
	}
	below, err := s.layerBelow(r)
	if err != nil {
		return "", err
	}
	if below != src.chain {
		return "", fmt.Errorf("it was made from another layer, %q: %w", below, ErrNotDerived)
	}
	l := record[layerBody]{Record: catalog.Record{Kind: kindLayer, Device: r.Device, Parent: r.Parent}}
	if below != "" {
		l.Parent = layerRef(below)
	}
	l.body = layerBody{deviceBody: r.body.deviceBody, Parent: below}
	l.body.ID, l.body.Owner, l.body.Labels = "", OwnerMica, nil
	err = s.step(ctx, catalog.Step{Apply: func(tx *catalog.Tx) error {
		cur, err := get[snapBody](tx, kindSnap, r.Key)
		if err != nil {
			return err
		}
		seq, err := tx.Seq()
		if err != nil {
			return err
		}
		l.Key = fmt.Sprintf("shared:%d:%s", seq, strings.TrimPrefix(cur.body.Labels[LabelSnapRef], "sha256:"))
		cur.Device, cur.body.ChainID = 0, l.Key
		if err := put(tx, cur); err != nil {
			return err
		}
		return put(tx, l)
	}}, nil, nil)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.refs[l.Parent]++
	s.leases[l.Key]++ // as long as the name exists
	s.mu.Unlock()
	s.hub.emit(EventCreate, l.Ref(), r.Ref())
	return l.Key, nil
}

// layerBelow is the layer that a snapshot was made from: empty if that is the base. ErrNotDerived if it
// is a snapshot with a device of its own.
func (s *Store) layerBelow(r record[snapBody]) (chain string, err error) {
	if r.body.ParentName == "" {
		return "", nil
	}
	_, key, _ := strings.Cut(r.Parent, "/")
	p, err := load[snapBody](s, kindSnap, key)
	if err == nil && p.body.ChainID == "" {
		err = fmt.Errorf("its parent %q is no layer: %w", shorten(p.Key), ErrNotDerived)
	}
	return p.body.ChainID, err
}

// putAlias gives a layer of an image a name here. The caller holds the layer.
func (n *SnapStore) putAlias(ctx context.Context, l record[layerBody], src source, parent, ref string, labels map[string]string) (Snap, error) {
	s := n.s
	labels = maps.Clone(labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[LabelSnapRef] = ref
	rec := record[snapBody]{Record: catalog.Record{Kind: kindSnap, Parent: src.ref}}
	rec.body = snapBody{Kind: SnapCommitted, ParentName: parent, ChainID: l.Key, Updated: snapNow(), deviceBody: deviceBody{
		SizeBytes: l.body.SizeBytes, FSType: l.body.FSType, Owner: n.Owner(), Labels: labels}}
	rec.body.Created = rec.body.Updated
	s.lease(l.Key, 1) // as long as the name exists
	err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		if _, err := get[layerBody](tx, kindLayer, l.Key); err != nil {
			return err
		}
		seq, err := tx.Seq()
		if err != nil {
			return err
		}
		// No namespace of containerd begins with an "@".
		rec.Key = n.key(fmt.Sprintf("@mica/%d/%s", seq, ref))
		return put(tx, rec)
	}}, []catalog.Record{rec.Record}, nil)
	if err != nil {
		s.lease(l.Key, -1)
		return Snap{}, err
	}
	s.hub.emit(EventCreate, rec.Ref(), l.Ref())
	return s.describeSnap(rec), nil
}

// findRef finds a committed snapshot by its label and its parent. If there is none here, others are those
// of other snapshotters with the label.
func (n *SnapStore) findRef(ctx context.Context, ref, parent string) (found Snap, others []record[snapBody], err error) {
	ok := false
	err = n.s.wrap(n.s.cat.View(func(tx *catalog.Tx) error {
		return tx.Each(kindSnap, "", "", func(r catalog.Record) (bool, error) {
			if !bytes.Contains(r.Body, []byte(ref)) {
				return true, ctx.Err() // without decoding: there may be many
			}
			d, err := decode[snapBody](r)
			if err != nil {
				return false, err
			}
			switch {
			case d.body.Kind != SnapCommitted || d.body.Labels[LabelSnapRef] != ref || n.s.usable(d.Ref()) != nil:
			case !strings.HasPrefix(r.Key, n.name+"/"):
				if !d.body.GuestOwned && (parent == "") == (d.body.ParentName == "") {
					others = append(others, d)
				}
			case d.body.ParentName == parent:
				found, ok = n.s.describeSnap(d), true
			}
			return !ok, nil
		})
	}))
	if err == nil && !ok {
		err = fmt.Errorf("snapshot of layer %q on %q: %w", shorten(ref), shorten(parent), ErrNotFound)
	}
	return found, others, err
}

// removeAlias takes a name of an image layer away. The caller holds its lock.
func (n *SnapStore) removeAlias(ctx context.Context, r record[snapBody]) error {
	s := n.s
	err := s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		return tx.Delete(kindSnap, r.Key)
	}}, nil, []catalog.Record{r.Record})
	if err != nil {
		return err
	}
	s.lease(r.body.ChainID, -1)
	s.collectAll()
	return nil
}
