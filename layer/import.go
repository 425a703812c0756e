package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"

	"mica/layer/catalog"
	"mica/thin"
)

// importSession implements Import.
type importSession struct {
	s     *Store
	mu    sync.Mutex
	held  map[string]struct{} // chain ids leased; guarded by mu
	ended bool                // guarded by mu
}

// BeginImport is described at API.
func (s *Store) BeginImport(ctx context.Context) (Import, error) {
	if err := s.writable(); err != nil {
		return nil, err
	}
	return &importSession{s: s, held: map[string]struct{}{}}, nil
}

// hold keeps a layer from being collected until the import ends.
func (im *importSession) hold(chain string) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.ended {
		return fmt.Errorf("import: %w: it has ended", ErrInvalid)
	}
	if _, ok := im.held[chain]; !ok {
		im.held[chain] = struct{}{}
		im.s.lease(chain, 1)
	}
	return nil
}

func (s *Store) lease(chain string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leases[chain] += n; s.leases[chain] <= 0 {
		delete(s.leases, chain)
	}
}

func (im *importSession) Layer(ctx context.Context, chainID string) (Layer, error) {
	if err := im.hold(chainID); err != nil {
		return Layer{}, err
	}
	// Under the lock, so that it is not collected between the look and the lease.
	unlock, err := im.s.locks.lock(ctx, layerRef(chainID))
	if err != nil {
		return Layer{}, err
	}
	defer unlock()
	l, err := im.s.layerRecord(chainID)
	if err == nil {
		err = im.s.usable(l.Ref())
	}
	if err != nil {
		return Layer{}, err
	}
	return im.s.describeLayer(l), nil
}

func (im *importSession) ApplyLayer(ctx context.Context, spec LayerSpec, r io.Reader) (Layer, error) {
	s := im.s
	if err := s.writable(); err != nil {
		return Layer{}, err
	}
	if err := errors.Join(checkDigest("chain id", spec.ChainID), checkLabels(spec.Labels)); err != nil {
		return Layer{}, err
	}
	if spec.DiffID != "" {
		if err := checkDigest("diff id", spec.DiffID); err != nil {
			return Layer{}, err
		}
	}
	if err := im.hold(spec.ChainID); err != nil {
		return Layer{}, err
	}
	unlock, err := s.locks.lock(ctx, layerRef(spec.ChainID))
	if err != nil {
		return Layer{}, err
	}
	defer unlock()
	l, err := s.layerRecord(spec.ChainID)
	if err == nil {
		if err := s.usable(l.Ref()); err != nil {
			return Layer{}, err
		}
		return s.describeLayer(l), nil
	}
	if !errors.Is(err, ErrNotFound) {
		return Layer{}, err
	}
	l, err = s.applyLayer(ctx, spec, r)
	if err != nil {
		return Layer{}, fmt.Errorf("layer %s: %w", spec.ChainID, err)
	}
	s.hub.emit(EventCreate, l.Ref(), "")
	return s.describeLayer(l), nil
}

// applyLayer makes a layer. The caller holds its lock.
func (s *Store) applyLayer(ctx context.Context, spec LayerSpec, r io.Reader) (rec record[layerBody], err error) {
	parent, origin, body, err := s.parentOf(ctx, spec.ParentChain)
	if err != nil {
		return rec, err
	}
	if err := s.admitWork(ctx); err != nil {
		return rec, err
	}
	ids, err := s.cat.Alloc(ctx, 1)
	if err != nil {
		return rec, s.wrap(err)
	}
	id := ids[0]
	if err := s.cat.CreateHeld(ctx, []catalog.Create{{ID: id, Origin: origin}}); err != nil {
		return rec, err
	}
	sum := &summing{r: r, h: sha256.New()}
	own := int64(0)
	err = s.work(ctx, id, body.SizeBytes, false, func(w *work) error {
		st, err := s.files.Apply(ctx, w.node(), body.FSType, !s.o.NoTrim, sum)
		for _, m := range st.Warnings {
			s.log.Warn("layer", "chain_id", spec.ChainID, "entry", m)
		}
		return err
	}, &own)
	if err == nil && spec.DiffID != "" {
		if got := sum.digest(); got != spec.DiffID {
			err = fmt.Errorf("%w: %d bytes of tar are %s, want %s", ErrDigest, sum.n, got, spec.DiffID)
		}
	}
	if err != nil {
		s.cat.Abandon(id)
		return rec, err
	}
	rec = record[layerBody]{Record: catalog.Record{Kind: kindLayer, Key: spec.ChainID, Device: id, Parent: parent}}
	rec.body = layerBody{Parent: spec.ParentChain, DiffID: spec.DiffID, deviceBody: deviceBody{
		SizeBytes: body.SizeBytes, FSType: body.FSType, Owner: OwnerMica, Labels: spec.Labels, Created: now()}}
	rec.body.setOwn(own)
	return rec, s.step(ctx, catalog.Step{
		Consume: ids, Apply: func(tx *catalog.Tx) error { return put(tx, rec) },
	}, []catalog.Record{rec.Record}, nil)
}

// admitWork refuses what would only fill a full pool: at once, unless something is being deleted.
func (s *Store) admitWork(ctx context.Context) error {
	err := s.admit(ctx)
	if err == nil || len(s.Queue()) == 0 {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, workSpaceWait)
	defer cancel()
	if werr := s.WaitQueue(wctx); werr != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return s.admit(ctx)
}

func (b *deviceBody) setOwn(n int64) {
	b.OwnBlocks, b.OwnStale = max(n, 0), n < 0
}

// parentOf finds what a layer is made from: the layer chain, or the base.
func (s *Store) parentOf(ctx context.Context, chain string) (ref string, dev thin.DevID, body deviceBody, err error) {
	if chain == "" {
		b, err := s.baseRecord(ctx)
		return b.Ref(), b.Device, b.body.deviceBody, err
	}
	l, err := s.layerRecord(chain)
	if err == nil {
		err = s.usable(l.Ref())
	}
	if err != nil {
		return "", 0, body, fmt.Errorf("parent: %w", err)
	}
	return l.Ref(), l.Device, l.body.deviceBody, nil
}

// summing is a reader that takes the digest of what it read.
type summing struct {
	r io.Reader
	h hash.Hash
	n int64
}

func (s *summing) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.h.Write(p[:n])
	s.n += int64(n)
	return n, err
}

func (s *summing) digest() string { return "sha256:" + hex.EncodeToString(s.h.Sum(nil)) }

func (im *importSession) Commit(ctx context.Context, spec ImageSpec) (Image, error) {
	s := im.s
	if err := s.writable(); err != nil {
		return Image{}, err
	}
	if err := errors.Join(checkImageName(spec.Name), checkDigest("chain id", spec.ChainID), checkLabels(spec.Labels)); err != nil {
		return Image{}, err
	}
	if !json.Valid(spec.Config) {
		return Image{}, fmt.Errorf("image %q: %w configuration: not JSON", spec.Name, ErrInvalid)
	}
	if err := im.hold(spec.ChainID); err != nil {
		return Image{}, err
	}
	unlock, err := s.locks.lock(ctx, kindImage+"/"+spec.Name, layerRef(spec.ChainID))
	if err != nil {
		return Image{}, err
	}
	img, err := s.putImage(ctx, spec, nil, nil)
	unlock()
	if err != nil {
		return Image{}, fmt.Errorf("image %q: %w", spec.Name, err)
	}
	im.end()
	s.collectAll()
	return s.describeImage(img)
}

// putImage registers an image, together with a layer if one is given (which consumes its device).
// The caller holds the locks of the name and the layer.
func (s *Store) putImage(ctx context.Context, spec ImageSpec, l *record[layerBody], consume []thin.DevID) (record[imageBody], error) {
	rec := record[imageBody]{Record: catalog.Record{Kind: kindImage, Key: spec.Name, Parent: layerRef(spec.ChainID)}}
	rec.body = imageBody{ChainID: spec.ChainID, Config: spec.Config, Digest: spec.Digest, MediaType: spec.MediaType,
		Platform: spec.Platform, Labels: spec.Labels, Owner: OwnerMica, Created: now()}
	old, err := load[imageBody](s, kindImage, spec.Name)
	var created, dropped []catalog.Record
	switch {
	case errors.Is(err, ErrNotFound):
	case err != nil:
		return rec, err
	case l == nil && old.body.Digest == spec.Digest && old.body.ChainID == spec.ChainID && bytes.Equal(old.body.Config, spec.Config):
		return old, nil
	case !spec.Replace:
		return rec, fmt.Errorf("%w with digest %s, layer %s", ErrExists, old.body.Digest, old.body.ChainID)
	default:
		dropped = append(dropped, old.Record)
	}
	created = append(created, rec.Record)
	if l != nil {
		created = append(created, l.Record)
	} else if err := s.usable(layerRef(spec.ChainID)); err != nil {
		return rec, err
	}
	err = s.step(ctx, catalog.Step{Consume: consume, FileOnly: l == nil, Apply: func(tx *catalog.Tx) error {
		if l != nil {
			if err := put(tx, *l); err != nil {
				return err
			}
		} else if _, err := get[layerBody](tx, kindLayer, spec.ChainID); err != nil {
			return err
		}
		return put(tx, rec)
	}}, created, dropped)
	if err == nil {
		s.hub.emit(EventImport, rec.Ref(), spec.Digest)
	}
	return rec, err
}

func (im *importSession) Abort(ctx context.Context) error {
	if im.end() {
		im.s.collectAll()
	}
	return nil
}

// end gives the leases back; false if that was done before.
func (im *importSession) end() bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.ended {
		return false
	}
	im.ended = true
	for chain := range im.held {
		im.s.lease(chain, -1)
	}
	return true
}

func now() time.Time { return time.Now().UTC() }
