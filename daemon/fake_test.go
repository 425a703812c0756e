package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"mica/engine"
	"mica/layer"
	"mica/thin"
)

// fakeStore is a layer.API in memory: it keeps the rules that the API shows and no data.
type fakeStore struct {
	mu         sync.Mutex
	images     map[string]layer.Image
	containers map[string]*layer.Container
	snapshots  map[string][]layer.Snapshot
	seq        int
	busy       map[string][]string // container -> who uses it
	readOnly   error
	// block, if not nil, is waited for by Commit.
	block  chan struct{}
	diff   func(w io.Writer) error
	events chan layer.Event
	closed bool
}

func newFakeStore() *fakeStore {
	s := &fakeStore{images: map[string]layer.Image{}, containers: map[string]*layer.Container{}, snapshots: map[string][]layer.Snapshot{},
		busy: map[string][]string{}, events: make(chan layer.Event, 100)}
	s.images["debian:12"] = fakeImage("debian:12", "sha256:aa")
	s.images["docker.io/library/alpine:3"] = fakeImage("docker.io/library/alpine:3", "sha256:bb")
	return s
}

var fakeTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func fakeImage(name, chain string) layer.Image {
	return layer.Image{Name: name, ChainID: chain, Config: json.RawMessage(`{"os":"linux"}`), Digest: "sha256:d" + chain[7:],
		Owner: layer.OwnerMica, Created: fakeTime, Layers: []string{chain}, UsedBytes: 1 << 20}
}

func notFound(kind, name string) error { return fmt.Errorf("%s %q: %w", kind, name, layer.ErrNotFound) }

func checkName(name string) error {
	if name == "" || strings.ContainsAny(name, "/ ") {
		return fmt.Errorf("name %q: %w", name, layer.ErrInvalid)
	}
	return nil
}

func (s *fakeStore) BeginImport(context.Context) (layer.Import, error) {
	return nil, errors.New("the fake imports nothing")
}

func fakePage[T any](all []T, f layer.Filter, name func(T) string, labels func(T) map[string]string) []T {
	slices.SortFunc(all, func(a, b T) int { return cmp.Compare(name(a), name(b)) })
	out := []T{}
	for _, v := range all {
		ok := strings.HasPrefix(name(v), f.Prefix) && name(v) > f.Cursor
		for k, w := range f.Labels {
			got, has := labels(v)[k]
			ok = ok && has && (w == "" || got == w)
		}
		if ok && (f.Limit == 0 || len(out) < f.Limit) {
			out = append(out, v)
		}
	}
	return out
}

func (s *fakeStore) Images(_ context.Context, f layer.Filter) ([]layer.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fakePage(slices.Collect(maps.Values(s.images)), f, func(i layer.Image) string { return i.Name }, func(i layer.Image) map[string]string { return i.Labels }), nil
}

func (s *fakeStore) Image(_ context.Context, name string) (layer.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.images[name]
	if !ok {
		return i, notFound("image", name)
	}
	return i, nil
}

func (s *fakeStore) RemoveImage(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.images[name]; !ok {
		return notFound("image", name)
	}
	delete(s.images, name)
	return nil
}

func (s *fakeStore) TagImage(ctx context.Context, name, newName string) (layer.Image, error) {
	i, err := s.Image(ctx, name)
	if err != nil {
		return i, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i.Name = newName
	s.images[newName] = i
	return i, nil
}

func (s *fakeStore) Layers(context.Context) ([]layer.Layer, error) {
	return []layer.Layer{{ChainID: "sha256:aa", Device: 65537, SizeBytes: 10 << 30, Owner: layer.OwnerMica, Created: fakeTime}}, nil
}

func (s *fakeStore) Layer(_ context.Context, id string) (layer.Layer, error) {
	return layer.Layer{}, notFound("layer", id)
}

func (s *fakeStore) addLocked(name, image, chain string, size int64) *layer.Container {
	s.seq++
	c := &layer.Container{Name: name, ID: fmt.Sprintf("c%d", s.seq), Image: image, ChainID: chain, Device: thin.DevID(65536 + s.seq),
		SizeBytes: size, FSType: "ext4", Owner: layer.OwnerMica, Created: fakeTime}
	s.containers[name] = c
	return c
}

func (s *fakeStore) Create(_ context.Context, o layer.CreateOptions) (layer.Container, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly != nil {
		return layer.Container{}, false, s.readOnly
	}
	if err := checkName(o.Name); err != nil {
		return layer.Container{}, false, err
	}
	i, ok := s.images[o.Image]
	if !ok {
		return layer.Container{}, false, notFound("image", o.Image)
	}
	size := cmp.Or(o.SizeBytes, int64(layer.DefaultBaseSize))
	if c := s.containers[o.Name]; c != nil {
		if c.Image == o.Image && c.SizeBytes == size && c.TTL == o.TTL && maps.Equal(c.Labels, o.Labels) {
			return *c, false, nil
		}
		return layer.Container{}, false, fmt.Errorf("container %q: %w with image %s and %d bytes", o.Name, layer.ErrExists, c.Image, c.SizeBytes)
	}
	c := s.addLocked(o.Name, o.Image, i.ChainID, size)
	c.Labels, c.TTL = o.Labels, o.TTL
	return *c, true, nil
}

func (s *fakeStore) Containers(_ context.Context, f layer.Filter) ([]layer.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []layer.Container
	for _, c := range s.containers {
		if f.Image == "" || f.Image == c.Image {
			all = append(all, *c)
		}
	}
	return fakePage(all, f, func(c layer.Container) string { return c.Name }, func(c layer.Container) map[string]string { return c.Labels }), nil
}

func (s *fakeStore) with(name string, fn func(*layer.Container) error) (layer.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[name]
	if c == nil {
		return layer.Container{}, notFound("container", name)
	}
	err := fn(c)
	return *c, err
}

func (s *fakeStore) Container(_ context.Context, name string) (layer.Container, error) {
	return s.with(name, func(*layer.Container) error { return nil })
}

func (s *fakeStore) Update(_ context.Context, name string, o layer.UpdateOptions) (layer.Container, error) {
	return s.with(name, func(c *layer.Container) error {
		c.Labels = maps.Clone(c.Labels)
		for k, v := range o.Labels {
			if v == nil {
				delete(c.Labels, k)
				continue
			}
			if c.Labels == nil {
				c.Labels = map[string]string{}
			}
			c.Labels[k] = *v
		}
		if o.TTL != nil {
			c.TTL = *o.TTL
		}
		return nil
	})
}

func (s *fakeStore) busyLocked(name string) error {
	if who := s.busy[name]; len(who) > 0 {
		return fmt.Errorf("container %q: %w: %s", name, layer.ErrBusy, strings.Join(who, "; "))
	}
	return nil
}

func (s *fakeStore) Remove(_ context.Context, name string, o layer.RemoveOptions) error {
	_, err := s.with(name, func(c *layer.Container) error {
		if err := s.busyLocked(name); err != nil && !o.Deferred {
			return err
		}
		if len(s.snapshots[name]) > 0 && !o.Snapshots {
			return fmt.Errorf("container %q has %d snapshots: %w", name, len(s.snapshots[name]), layer.ErrInUse)
		}
		delete(s.containers, name)
		delete(s.snapshots, name)
		return nil
	})
	return err
}

func (s *fakeStore) Attach(_ context.Context, name string, o layer.AttachOptions) (layer.Attachment, error) {
	c, err := s.with(name, func(c *layer.Container) error {
		if a := c.Attachment; a != nil {
			if a.As == o.As && a.ReadOnly == o.ReadOnly {
				return nil
			}
			return fmt.Errorf("container %q is attached as %s: %w", name, a.As, layer.ErrInUse)
		}
		a := &layer.Attachment{As: o.As, ReadOnly: o.ReadOnly, ID: c.ID, FSType: "ext4", MountOptions: []string{"rw"}}
		if o.As == layer.AsNBD {
			a.URI = "nbd+unix:///" + name
		} else {
			a.Node, a.Link = "/dev/loop7", "/dev/mica/"+c.ID
		}
		c.Attachment = a
		return nil
	})
	if err != nil {
		return layer.Attachment{}, err
	}
	return *c.Attachment, nil
}

func (s *fakeStore) Detach(_ context.Context, name string, o layer.DetachOptions) error {
	_, err := s.with(name, func(c *layer.Container) error {
		if err := s.busyLocked(name); err != nil {
			return fmt.Errorf("detach %q: %w", name, err)
		}
		c.Attachment = nil
		return nil
	})
	return err
}

func (s *fakeStore) NoteMount(_ context.Context, name, dir string) error {
	_, err := s.with(name, func(c *layer.Container) error {
		if c.Attachment == nil {
			return fmt.Errorf("container %q is not attached: %w", name, layer.ErrInvalid)
		}
		c.Attachment.Mounts = append(c.Attachment.Mounts, dir)
		return nil
	})
	return err
}

func (s *fakeStore) ForgetMount(_ context.Context, name, dir string) error {
	_, err := s.with(name, func(c *layer.Container) error {
		if c.Attachment != nil {
			c.Attachment.Mounts = slices.DeleteFunc(c.Attachment.Mounts, func(d string) bool { return d == dir })
		}
		return nil
	})
	return err
}

func (s *fakeStore) Snapshot(_ context.Context, name string, o layer.SnapshotOptions) (layer.Snapshot, error) {
	var p layer.Snapshot
	_, err := s.with(name, func(c *layer.Container) error {
		s.seq++
		if o.Name == "" {
			o.Name = fmt.Sprintf("s%d", s.seq)
		}
		for _, old := range s.snapshots[name] {
			if old.Name == o.Name {
				return fmt.Errorf("snapshot %q of container %q: %w", o.Name, name, layer.ErrExists)
			}
		}
		p = layer.Snapshot{Container: name, Name: o.Name, ID: fmt.Sprintf("s%d", s.seq), ChainID: c.ChainID, Device: thin.DevID(65536 + s.seq),
			SizeBytes: c.SizeBytes, Level: layer.LevelFileSystem, Labels: o.Labels, Created: fakeTime}
		s.snapshots[name] = append(s.snapshots[name], p)
		c.Snapshots++
		return nil
	})
	return p, err
}

func (s *fakeStore) Snapshots(_ context.Context, name string) ([]layer.Snapshot, error) {
	var list []layer.Snapshot
	_, err := s.with(name, func(*layer.Container) error { list = slices.Clone(s.snapshots[name]); return nil })
	return list, err
}

func (s *fakeStore) RemoveSnapshot(_ context.Context, name, snap string) error {
	_, err := s.with(name, func(c *layer.Container) error {
		n := len(s.snapshots[name])
		s.snapshots[name] = slices.DeleteFunc(s.snapshots[name], func(p layer.Snapshot) bool { return p.Name == snap })
		if len(s.snapshots[name]) == n {
			return notFound("snapshot", name+"/"+snap)
		}
		c.Snapshots--
		return nil
	})
	return err
}

func (s *fakeStore) Fork(_ context.Context, name string, o layer.ForkOptions) (layer.ForkResult, error) {
	r := layer.ForkResult{Level: layer.LevelFileSystem}
	_, err := s.with(name, func(c *layer.Container) error {
		for _, n := range o.Names {
			if s.containers[n] != nil {
				return fmt.Errorf("container %q: %w", n, layer.ErrExists)
			}
		}
		for _, n := range o.Names {
			r.Containers = append(r.Containers, *s.addLocked(n, c.Image, c.ChainID, c.SizeBytes))
		}
		return nil
	})
	return r, err
}

func (s *fakeStore) Rollback(_ context.Context, name, snap string) (layer.Container, error) {
	return s.with(name, func(c *layer.Container) error {
		if c.Attachment != nil {
			return fmt.Errorf("container %q is attached: %w", name, layer.ErrInUse)
		}
		if !slices.ContainsFunc(s.snapshots[name], func(p layer.Snapshot) bool { return p.Name == snap }) {
			return notFound("snapshot", name+"/"+snap)
		}
		return nil
	})
}

func (s *fakeStore) Commit(ctx context.Context, name string, o layer.CommitOptions) (layer.CommitResult, error) {
	if s.block != nil {
		select {
		case <-s.block:
		case <-ctx.Done():
			return layer.CommitResult{}, ctx.Err()
		}
	}
	c, err := s.Container(ctx, name)
	if err != nil {
		return layer.CommitResult{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.images[o.Image]; ok && !o.Replace {
		return layer.CommitResult{}, fmt.Errorf("image %q: %w", o.Image, layer.ErrExists)
	}
	i := fakeImage(o.Image, "sha256:cc")
	i.Layers = append([]string{c.ChainID}, i.Layers...)
	s.images[o.Image] = i
	return layer.CommitResult{Image: i, Level: layer.LevelFileSystem}, nil
}

func (s *fakeStore) Diff(ctx context.Context, name string, w io.Writer, o layer.DiffOptions) (layer.Level, error) {
	if _, err := s.Container(ctx, name); err != nil {
		return "", err
	}
	s.mu.Lock()
	diff := s.diff
	s.mu.Unlock()
	if diff != nil {
		return layer.LevelCrash, diff(w)
	}
	_, err := io.WriteString(w, "a tar")
	return layer.LevelFileSystem, err
}

func (s *fakeStore) setDiff(f func(io.Writer) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.diff = f
}

func (s *fakeStore) Resize(_ context.Context, name string, n int64) (layer.Container, error) {
	return s.with(name, func(c *layer.Container) error {
		if n < c.SizeBytes {
			return fmt.Errorf("container %q: %d bytes is less than %d: %w", name, n, c.SizeBytes, layer.ErrInvalid)
		}
		c.SizeBytes = n
		return nil
	})
}

func (s *fakeStore) DF(context.Context) (layer.DF, error) {
	return layer.DF{BlockSize: 65536, TotalBytes: 1 << 30, UsedBytes: 1 << 20, FreeBytes: 1<<30 - 1<<20,
		Entries: []layer.DFEntry{{Kind: "base", Name: "base", Device: 65536, MappedBytes: 1 << 20, ExclusiveBytes: 1 << 20}}}, nil
}

func (s *fakeStore) Status(context.Context) (layer.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return layer.Status{StoreID: "0123456789abcdef", Catalog: "/x/catalog.db", FSType: "ext4", BaseSize: layer.DefaultBaseSize, BaseReady: true,
		Images: len(s.images), Containers: len(s.containers), Foreign: []thin.DevID{7}}, nil
}

func (s *fakeStore) Queue() []layer.QueueItem        { return nil }
func (s *fakeStore) WaitQueue(context.Context) error { return nil }
func (s *fakeStore) Events(uint64) (<-chan layer.Event, func()) {
	return s.events, func() {}
}
func (s *fakeStore) Close() error { s.closed = true; return nil }

// fakePool is an engine.Pool of which only the parts are there that the API uses.
type fakePool struct {
	engine.Pool
	mu     sync.Mutex
	blocks uint64
	events chan engine.Event
}

func newFakePool() *fakePool {
	return &fakePool{blocks: 16384, events: make(chan engine.Event, 10)}
}

func (p *fakePool) Status(context.Context) (engine.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return engine.Status{Engine: "user", Mode: "rw", BlockSize: 65536, DataBlocks: p.blocks, DataUsed: 100, MetaBlocks: 1024, MetaUsed: 20, HostBytes: 6553600}, nil
}

func (p *fakePool) GrowData(_ context.Context, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n < int64(p.blocks)*65536 {
		return fmt.Errorf("data: %d bytes is less than %d: %w", n, p.blocks*65536, layer.ErrInvalid)
	}
	p.blocks = uint64(n) / 65536
	return nil
}

func (p *fakePool) GrowMetadata(context.Context, int64) error { return nil }
func (p *fakePool) Trim(context.Context) (int64, error)       { return 12 << 20, nil }
func (p *fakePool) Events() (<-chan engine.Event, func())     { return p.events, func() {} }
