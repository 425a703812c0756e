package layer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"mica/layer/catalog"
)

func (s *Store) layerRecord(chain string) (record[layerBody], error) {
	return load[layerBody](s, kindLayer, chain)
}

func (s *Store) describeLayer(l record[layerBody]) Layer {
	return Layer{ChainID: l.Key, Parent: l.body.Parent, DiffID: l.body.DiffID, Device: l.Device,
		SizeBytes: l.body.SizeBytes, Owner: l.body.Owner, Labels: l.body.Labels, Created: l.body.Created,
		UsedBytes: s.ownBytes(l.Record, l.body.deviceBody, nil), Broken: s.cat.Broken(l.Ref())}
}

// Layers is described at API.
func (s *Store) Layers(ctx context.Context) ([]Layer, error) {
	var out []Layer
	var recs []record[layerBody]
	err := list(s, kindLayer, "", "", func(l record[layerBody]) (bool, error) {
		recs = append(recs, l)
		return true, ctx.Err()
	})
	for _, l := range recs {
		out = append(out, s.describeLayer(l))
	}
	return out, err
}

// Layer is described at API.
func (s *Store) Layer(ctx context.Context, chainID string) (Layer, error) {
	l, err := s.layerRecord(chainID)
	if err != nil {
		return Layer{}, err
	}
	return s.describeLayer(l), nil
}

// chain lists the layers from the lowest up to top.
func (s *Store) chain(top string) ([]record[layerBody], error) {
	var out []record[layerBody]
	for c := top; c != ""; {
		l, err := s.layerRecord(c)
		if err != nil {
			return nil, err
		}
		if out = append(out, l); len(out) > 100_000 {
			return nil, fmt.Errorf("layer %s: over 100000 parents", top)
		}
		c = l.body.Parent
	}
	slices.Reverse(out)
	return out, nil
}

func (s *Store) describeImage(r record[imageBody]) (Image, error) {
	img := Image{Name: r.Key, ChainID: r.body.ChainID, Config: r.body.Config, Digest: r.body.Digest,
		MediaType: r.body.MediaType, Platform: r.body.Platform, Labels: r.body.Labels, Owner: r.body.Owner,
		Created: r.body.Created, Broken: s.cat.Broken(r.Ref())}
	layers, err := s.chain(r.body.ChainID)
	if errors.Is(err, ErrNotFound) && img.Broken != "" {
		return img, nil
	}
	for _, l := range layers {
		img.Layers = append(img.Layers, l.Key)
		img.UsedBytes += s.ownBytes(l.Record, l.body.deviceBody, nil)
	}
	return img, err
}

// Images is described at API.
func (s *Store) Images(ctx context.Context, f Filter) ([]Image, error) {
	var recs []record[imageBody]
	err := list(s, kindImage, f.Prefix, f.Cursor, func(r record[imageBody]) (bool, error) {
		if f.match(r.body.Owner, r.body.Labels, "") {
			recs = append(recs, r)
		}
		return f.Limit == 0 || len(recs) < f.Limit, ctx.Err()
	})
	var out []Image
	for _, r := range recs {
		img, derr := s.describeImage(r)
		if derr != nil && !errors.Is(derr, ErrNotFound) {
			return nil, derr
		}
		out = append(out, img)
	}
	return out, err
}

// Image is described at API.
func (s *Store) Image(ctx context.Context, name string) (Image, error) {
	r, err := load[imageBody](s, kindImage, name)
	if err != nil {
		return Image{}, err
	}
	return s.describeImage(r)
}

// match holds the filter against an object's owner, labels and image.
func (f Filter) match(owner string, labels map[string]string, image string) bool {
	want := f.Owner
	if want == "" {
		want = OwnerMica
	}
	if want != "*" && owner != want || f.Image != "" && image != f.Image {
		return false
	}
	for k, v := range f.Labels {
		if got, ok := labels[k]; !ok || v != "" && got != v {
			return false
		}
	}
	return true
}

// RemoveImage is described at API.
func (s *Store) RemoveImage(ctx context.Context, name string) error {
	r, unlock, err := lockRecord[imageBody](ctx, s, kindImage, name)
	if err != nil {
		return err
	}
	defer unlock()
	err = s.step(ctx, catalog.Step{FileOnly: true, Apply: func(tx *catalog.Tx) error {
		return tx.Delete(kindImage, name)
	}}, nil, []catalog.Record{r.Record})
	if err != nil {
		return fmt.Errorf("remove image %q: %w", name, err)
	}
	s.hub.emit(EventRemove, r.Ref(), "")
	s.collectAfter(ctx, r.body.ChainID)
	return nil
}

// TagImage is described at API.
func (s *Store) TagImage(ctx context.Context, name, newName string) (Image, error) {
	if err := s.writable(); err != nil {
		return Image{}, err
	}
	if err := checkImageName(newName); err != nil {
		return Image{}, err
	}
	unlock, err := s.locks.lock(ctx, kindImage+"/"+name, kindImage+"/"+newName)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	r, err := load[imageBody](s, kindImage, name)
	if err != nil {
		return Image{}, err
	}
	b := r.body
	img, err := s.putImage(ctx, ImageSpec{Name: newName, ChainID: b.ChainID, Config: b.Config, Digest: b.Digest,
		MediaType: b.MediaType, Platform: b.Platform, Labels: b.Labels}, nil, nil)
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", newName, err)
	}
	return s.describeImage(img)
}

// collect removes a layer that nothing needs any more, then its parent, and so on.
func (s *Store) collect(ctx context.Context, chain string) error {
	for chain != "" {
		parent, err := s.collectOne(ctx, chain)
		if err != nil {
			return err
		}
		chain = parent
	}
	return nil
}

// collectAfter collects a layer that has just lost a user. The operation that took the user away
// is done: what fails here is tried again by the background.
func (s *Store) collectAfter(ctx context.Context, chain string) {
	cctx, cancel := s.short(ctx)
	defer cancel()
	if err := s.collect(cctx, chain); err != nil {
		s.log.Warn("collecting a layer", "chain_id", chain, "err", err)
		s.collectAll()
	}
}

// holdLayer keeps a layer from being collected until release. ErrNotFound if it is gone.
func (s *Store) holdLayer(ctx context.Context, chain string) (l record[layerBody], release func(), err error) {
	s.lease(chain, 1)
	release = func() { s.lease(chain, -1) }
	unlock, err := s.locks.lock(ctx, layerRef(chain)) // a collection under way ends first
	if err == nil {
		unlock()
		l, err = s.layerRecord(chain)
	}
	if err == nil {
		err = s.usable(l.Ref())
	}
	if err != nil {
		release()
		return l, nil, err
	}
	return l, release, nil
}

// collectOne removes one layer if nothing needs it, and returns its parent.
func (s *Store) collectOne(ctx context.Context, chain string) (parent string, err error) {
	unlock, err := s.locks.lock(ctx, layerRef(chain))
	if err != nil {
		return "", err
	}
	defer unlock()
	l, err := s.layerRecord(chain)
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	needed := s.refs[l.Ref()] > 0 || s.leases[chain] > 0 || l.body.Owner != OwnerMica
	s.mu.Unlock()
	if needed {
		return "", nil
	}
	err = s.step(ctx, catalog.Step{Apply: func(tx *catalog.Tx) error {
		if err := tx.Delete(kindLayer, chain); err != nil {
			return err
		}
		return tx.Remove(catalog.Removal{Device: l.Device, Object: l.Ref(), Since: now()})
	}}, nil, []catalog.Record{l.Record})
	if err != nil {
		return "", fmt.Errorf("remove layer %s: %w", chain, err)
	}
	s.hub.emit(EventRemove, l.Ref(), "")
	return l.body.Parent, nil
}

// collectAll removes in the background every layer that nothing needs: what an import that
// failed, or a crash, left behind.
func (s *Store) collectAll() {
	s.task(func(ctx context.Context) {
		var loose []string
		err := list(s, kindLayer, "", "", func(l record[layerBody]) (bool, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.refs[l.Ref()] == 0 && s.leases[l.Key] == 0 && l.body.Owner == OwnerMica {
				loose = append(loose, l.Key)
			}
			return true, nil
		})
		for _, c := range loose {
			if err == nil {
				err = s.collect(ctx, c)
			}
		}
		if err != nil && ctx.Err() == nil && !strings.Contains(err.Error(), "closed") {
			s.log.Warn("collecting layers", "err", err)
		}
	})
}
