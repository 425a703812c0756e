package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"

	"mica/layer"
)

// fakeStore keeps layer tars in memory and behaves as the contract of layer.Import says.
type fakeStore struct {
	mu       sync.Mutex
	layers   map[string]*fakeLayer
	images   map[string]layer.Image
	busy     map[string]chan struct{}
	applied  int // layers whose stream was read
	sessions int // open

	failAfter int64                           // ApplyLayer fails after so many bytes, if above zero
	failName  string                          // Commit of this name fails
	onApply   func(s layer.LayerSpec)         // called when ApplyLayer begins
	straggle  bool                            // after failAfter somebody goes on reading for a while
	lazy      bool                            // breaks the contract: does not read to the end
	onRead    func(chain string, bytes int64) // called after every read
}

type fakeLayer struct {
	layer.Layer
	tar  []byte
	held int
	used int // images
}

func newFakeStore() *fakeStore {
	return &fakeStore{layers: map[string]*fakeLayer{}, images: map[string]layer.Image{}, busy: map[string]chan struct{}{}}
}

func (s *fakeStore) BeginImport(context.Context) (layer.Import, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions++
	return &fakeImport{s: s}, nil
}

func (s *fakeStore) Image(_ context.Context, name string) (layer.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	im, ok := s.images[name]
	if !ok {
		return im, fmt.Errorf("image %q: %w", name, layer.ErrNotFound)
	}
	return im, nil
}

func (s *fakeStore) RemoveImage(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	im, ok := s.images[name]
	if !ok {
		return layer.ErrNotFound
	}
	delete(s.images, name)
	for _, c := range im.Layers {
		s.layers[c].used--
	}
	s.sweepLocked()
	return nil
}

func (s *fakeStore) sweepLocked() {
	for c, l := range s.layers {
		if l.held == 0 && l.used == 0 {
			delete(s.layers, c)
		}
	}
}

// left describes what is in the store and should not be after a failure.
func (s *fakeStore) left() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("%d layers, %d images, %d sessions", len(s.layers), len(s.images), s.sessions)
}

type fakeImport struct {
	s     *fakeStore
	holds []*fakeLayer
	ended bool
}

func (f *fakeImport) Layer(_ context.Context, chain string) (layer.Layer, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	l, ok := f.s.layers[chain]
	if !ok {
		return layer.Layer{}, fmt.Errorf("layer %s: %w", chain, layer.ErrNotFound)
	}
	l.held++
	f.holds = append(f.holds, l)
	return l.Layer, nil
}

func (f *fakeImport) ApplyLayer(ctx context.Context, spec layer.LayerSpec, r io.Reader) (layer.Layer, error) {
	s := f.s
	for {
		if l, err := f.Layer(ctx, spec.ChainID); err == nil {
			return l, nil
		}
		s.mu.Lock()
		wait, ok := s.busy[spec.ChainID]
		if !ok {
			s.busy[spec.ChainID] = make(chan struct{})
			s.mu.Unlock()
			break
		}
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return layer.Layer{}, ctx.Err()
		}
	}
	defer func() {
		s.mu.Lock()
		close(s.busy[spec.ChainID])
		delete(s.busy, spec.ChainID)
		s.mu.Unlock()
	}()
	if s.onApply != nil {
		s.onApply(spec)
	}
	s.mu.Lock()
	s.applied++
	_, haveParent := s.layers[spec.ParentChain]
	s.mu.Unlock()
	if spec.ParentChain != "" && !haveParent {
		return layer.Layer{}, fmt.Errorf("parent %s: %w", spec.ParentChain, layer.ErrNotFound)
	}
	var b bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		b.Write(buf[:n])
		if s.onRead != nil {
			s.onRead(spec.ChainID, int64(b.Len()))
		}
		if s.failAfter > 0 && int64(b.Len()) >= s.failAfter {
			if s.straggle {
				go io.Copy(io.Discard, r)
			}
			return layer.Layer{}, errors.New("fake store: pool is full")
		}
		if err == io.EOF || s.lazy {
			break
		}
		if err != nil {
			return layer.Layer{}, fmt.Errorf("apply layer: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return layer.Layer{}, err
		}
	}
	if got := digest.FromBytes(b.Bytes()).String(); got != spec.DiffID && !s.lazy {
		return layer.Layer{}, fmt.Errorf("fake store: %s, want %s: %w", got, spec.DiffID, layer.ErrDigest)
	}
	l := &fakeLayer{Layer: layer.Layer{ChainID: spec.ChainID, Parent: spec.ParentChain, DiffID: spec.DiffID}, tar: b.Bytes(), held: 1}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.layers[spec.ChainID] = l
	f.holds = append(f.holds, l)
	return l.Layer, nil
}

func (f *fakeImport) Commit(_ context.Context, spec layer.ImageSpec) (layer.Image, error) {
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if spec.Name == s.failName {
		return layer.Image{}, errors.New("fake store: commit fails")
	}
	if old, ok := s.images[spec.Name]; ok {
		if old.Digest != spec.Digest && !spec.Replace {
			return layer.Image{}, layer.ErrExists
		}
		for _, c := range old.Layers {
			s.layers[c].used--
		}
	}
	im := layer.Image{Name: spec.Name, ChainID: spec.ChainID, Config: spec.Config, Digest: spec.Digest, MediaType: spec.MediaType, Platform: spec.Platform}
	for c := spec.ChainID; c != ""; c = s.layers[c].Parent {
		im.Layers = append([]string{c}, im.Layers...)
		s.layers[c].used++
	}
	s.images[spec.Name] = im
	f.endLocked()
	return im, nil
}

func (f *fakeImport) Abort(context.Context) error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	f.endLocked()
	return nil
}

func (f *fakeImport) endLocked() {
	if f.ended {
		return
	}
	f.ended = true
	f.s.sessions--
	for _, l := range f.holds {
		l.held--
	}
	f.s.sweepLocked()
}
