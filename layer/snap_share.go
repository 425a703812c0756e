package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"

	"mica/layer/catalog"
)

// Shared finds the committed snapshot that a layer with the chain id ref, made from parent, has
// already: unpacked before (for another of containerd's namespaces), or imported as a layer of an
// image of this store, which then gets a name here. ErrNotFound if there is none.
//
// labels are given to a new name, with LabelSnapRef.
func (n *SnapStore) Shared(ctx context.Context, ref, parent string, labels map[string]string) (Snap, error) {
	s := n.s
	if err := s.writable(); err != nil {
		return Snap{}, err
	}
	found, err := n.findRef(ctx, ref, parent)
	if err == nil || !errors.Is(err, ErrNotFound) {
		return found, err
	}
	if err := errors.Join(checkDigest("chain id", ref), checkSnapLabels(labels)); err != nil {
		return Snap{}, fmt.Errorf("layer %q: %w", shorten(ref), ErrNotFound)
	}
	if _, err := s.layerRecord(ref); err != nil {
		return Snap{}, err
	}
	src, release, err := n.holdParent(ctx, parent)
	if err != nil {
		return Snap{}, err
	}
	defer release()
	unlock, err := s.locks.lock(ctx, n.ref("@"+ref)) // one name, also if two ask at once
	if err != nil {
		return Snap{}, err
	}
	defer unlock()
	if found, err := n.findRef(ctx, ref, parent); err == nil {
		return found, nil
	}
	l, releaseLayer, err := s.holdLayer(ctx, ref)
	if err != nil {
		return Snap{}, err
	}
	defer releaseLayer()
	if l.body.GuestOwned || l.body.Parent != src.chain || parent != "" && src.chain == "" {
		return Snap{}, fmt.Errorf("layer %q on %q: %w", ref, shorten(parent), ErrNotFound)
	}
	return n.putAlias(ctx, l, src, parent, labels)
}

// putAlias gives a layer of an image a name here. The caller holds the layer.
func (n *SnapStore) putAlias(ctx context.Context, l record[layerBody], src source, parent string, labels map[string]string) (Snap, error) {
	s := n.s
	labels = maps.Clone(labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[LabelSnapRef] = l.Key
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
		rec.Key = n.key(fmt.Sprintf("@mica/%d/%s", seq, l.Key))
		return put(tx, rec)
	}}, []catalog.Record{rec.Record}, nil)
	if err != nil {
		s.lease(l.Key, -1)
		return Snap{}, err
	}
	s.hub.emit(EventCreate, rec.Ref(), l.Ref())
	return s.describeSnap(rec), nil
}

// findRef finds a committed snapshot by its label and its parent.
func (n *SnapStore) findRef(ctx context.Context, ref, parent string) (found Snap, err error) {
	ok := false
	err = n.s.wrap(n.s.cat.View(func(tx *catalog.Tx) error {
		return tx.Each(kindSnap, n.name+"/", "", func(r catalog.Record) (bool, error) {
			if !bytes.Contains(r.Body, []byte(ref)) {
				return true, ctx.Err() // without decoding: there may be many
			}
			d, err := decode[snapBody](r)
			if err != nil {
				return false, err
			}
			if d.body.Kind == SnapCommitted && d.body.ParentName == parent && d.body.Labels[LabelSnapRef] == ref && n.s.usable(d.Ref()) == nil {
				found, ok = n.s.describeSnap(d), true
			}
			return !ok, nil
		})
	}))
	if err == nil && !ok {
		err = fmt.Errorf("snapshot of layer %q on %q: %w", shorten(ref), shorten(parent), ErrNotFound)
	}
	return found, err
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
