package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"

	"mica/layer"
)

// Time limits of the calls that containerd makes under its locks, and of the others.
const (
	DefaultTimeout = 5 * time.Second
	slowTimeout    = 60 * time.Second
	// grace is what a call whose time is over gets to come back with a reason of its own.
	grace = 200 * time.Millisecond
)

// Options of a Snapshotter.
type Options struct {
	Name  string // of the snapshotter; its snapshots belong to "containerd/NAME"
	Store *layer.Store
	// MountOptions are added to those of the store.
	MountOptions []string
	// GuestOwned: containers are run in virtual machines that get their devices raw.
	GuestOwned bool
	// ShareLayers: a layer that is there already is not unpacked again.
	ShareLayers bool
	// Timeout bounds Commit, Remove and Cleanup; DefaultTimeout if 0.
	Timeout time.Duration
	Logger  *slog.Logger // nil: slog.Default()
}

// A Snapshotter offers one snapshotter's part of a store as containerd's interface. Safe for
// concurrent use.
type Snapshotter struct {
	o     Options
	snaps *layer.SnapStore
	log   *slog.Logger
	stuck atomic.Int32 // calls that were given up and have not come back

	mu     sync.Mutex
	closed bool           // guarded by mu
	calls  sync.WaitGroup // goroutines of bounded
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New makes a snapshotter. The store stays the caller's; it must outlive the snapshotter.
func New(o Options) (*Snapshotter, error) {
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	snaps, err := o.Store.Snaps(o.Name, layer.SnapOptions{MountOptions: o.MountOptions, GuestOwned: o.GuestOwned})
	if err != nil {
		return nil, err
	}
	return &Snapshotter{o: o, snaps: snaps, log: o.Logger}, nil
}

// Name is what the snapshotter is called.
func (s *Snapshotter) Name() string { return s.o.Name }

// bounded runs fn and returns its error, classed, or one of class DeadlineExceeded if it takes too
// long: fn then goes on until it notices that its context has ended.
func (s *Snapshotter) bounded(ctx context.Context, limit time.Duration, what string, fn func(context.Context) error) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return as(fmt.Errorf("%s: snapshotter %s is closed", what, s.o.Name), errdefs.ErrUnavailable)
	}
	s.calls.Add(1)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, limit)
	done := make(chan error, 1)
	var over atomic.Bool // fn has come back, or was given up
	go func() {
		defer s.calls.Done()
		defer cancel()
		err := s.safely(what, func() error { return fn(ctx) })
		done <- err
		if !over.CompareAndSwap(false, true) {
			s.stuck.Add(-1)
			s.log.Warn("a call that was given up has come back", "call", what, "err", err)
		}
	}()
	select {
	case err := <-done:
		return class(err)
	case <-ctx.Done():
	}
	if !over.CompareAndSwap(false, true) {
		return class(<-done)
	}
	s.stuck.Add(1)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case err := <-done:
		return class(err)
	case <-t.C:
	}
	return as(fmt.Errorf("%s: not done within %v: %w", what, limit, ctx.Err()), ctx.Err())
}

// safely makes an error of a panic: others' I/O goes through this process.
func (s *Snapshotter) safely(what string, fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			s.log.Error("panic", "call", what, "panic", v, "stack", string(debug.Stack()))
			err = as(fmt.Errorf("%s: internal error: %v", what, v), errdefs.ErrInternal)
		}
	}()
	return fn()
}

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	v, err := s.snaps.Stat(ctx, key)
	return info(v), class(err)
}

// Usage implements snapshots.Snapshotter. It takes no lock and looks at no file system; inodes are
// not counted.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	n, err := s.snaps.Usage(ctx, key)
	return snapshots.Usage{Size: n}, class(err)
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var m layer.SnapMount
	var v layer.Snap
	err := s.bounded(ctx, slowTimeout, fmt.Sprintf("mounts of snapshot %q", key), func(ctx context.Context) (err error) {
		m, v, err = s.snaps.Mount(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	return mounts(m, v.Labels)
}

func mounts(m layer.SnapMount, labels map[string]string) ([]mount.Mount, error) {
	idmap, err := idmapOptions(labels)
	if err != nil {
		return nil, class(err)
	}
	return []mount.Mount{{Type: m.FSType, Source: m.Source, Options: append(m.Options, idmap...)}}, nil
}

// Prepare implements snapshots.Snapshotter.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, "prepare", key, parent, opts, s.prepare)
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, "view", key, parent, opts, s.snaps.View)
}

func (s *Snapshotter) create(ctx context.Context, what, key, parent string, opts []snapshots.Opt,
	do func(context.Context, layer.SnapSpec) (layer.SnapMount, error)) ([]mount.Mount, error) {
	base, err := apply(opts)
	if err != nil {
		return nil, err
	}
	labels := given(base.Labels)
	if _, err := idmapOptions(labels); err != nil {
		return nil, class(fmt.Errorf("%s %q: %w", what, key, err))
	}
	var m layer.SnapMount
	err = s.bounded(ctx, slowTimeout, fmt.Sprintf("%s snapshot %q", what, key), func(ctx context.Context) (err error) {
		m, err = do(ctx, layer.SnapSpec{Name: key, Parent: parent, Labels: labels})
		return err
	})
	if err != nil {
		return nil, err
	}
	return mounts(m, labels)
}

func (s *Snapshotter) prepare(ctx context.Context, o layer.SnapSpec) (layer.SnapMount, error) {
	ref := o.Labels[snapshots.LabelSnapshotRef]
	if ref != "" && s.o.ShareLayers {
		found, err := s.snaps.Shared(ctx, ref, o.Parent, o.Labels)
		if err == nil {
			err = fmt.Errorf("layer %s on %q is there already: snapshot %q", ref, o.Parent, found.Name)
			return layer.SnapMount{}, as(err, errdefs.ErrAlreadyExists)
		}
		if !errors.Is(err, layer.ErrNotFound) {
			return layer.SnapMount{}, err
		}
	}
	size, hint, err := sizeOf(o.Labels)
	if err != nil {
		return layer.SnapMount{}, err
	}
	o.SizeBytes = size
	if hint {
		o.SizeBytes, o.SizeHint = 0, size
	}
	o.Unpack = ref != "" || isUnpack(o.Name)
	return s.snaps.Prepare(ctx, o)
}

// isUnpack tells by its key whether a snapshot is made to unpack a layer: containerd's keys are
// NAMESPACE/NUMBER/KEY.
func isUnpack(name string) bool {
	if i := strings.LastIndex(name, "/"+snapshots.UnpackKeyPrefix+"-"); i >= 0 {
		return true
	}
	return strings.HasPrefix(name, snapshots.UnpackKeyPrefix+"-")
}

func apply(opts []snapshots.Opt) (base snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return base, class(err)
		}
	}
	return base, nil
}

// Commit implements snapshots.Snapshotter. A parent (snapshots.WithParent) must be that of Prepare.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	base, err := apply(opts)
	if err != nil {
		return err
	}
	return s.bounded(ctx, s.o.Timeout, fmt.Sprintf("commit snapshot %q as %q", key, name), func(ctx context.Context) error {
		return s.snaps.Commit(ctx, name, key, base.Parent, given(base.Labels))
	})
}

// Remove implements snapshots.Snapshotter.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	limit := s.o.Timeout
	if s.stuck.Load() > 0 {
		limit = min(limit, grace) // one of those before hangs: the others need not find out again
	}
	err := s.bounded(ctx, limit, fmt.Sprintf("remove snapshot %q", key), func(ctx context.Context) error {
		return s.snaps.Remove(ctx, key)
	})
	if err == nil || errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) || ctx.Err() != nil {
		return err
	}
	return as(err, errdefs.ErrFailedPrecondition)
}

// Cleanup implements snapshots.Cleaner. What is to be cleaned up is in the store's queue, which
// works by itself; it is asked to try again at once.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	s.snaps.Nudge()
	return nil
}

// Update implements snapshots.Snapshotter: labels can be changed.
func (s *Snapshotter) Update(ctx context.Context, in snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	for _, p := range fieldpaths {
		if p != "labels" && !strings.HasPrefix(p, "labels.") {
			err := fmt.Errorf("update snapshot %q: field %q cannot be changed, labels can", in.Name, p)
			return snapshots.Info{}, as(err, errdefs.ErrInvalidArgument)
		}
	}
	var v layer.Snap
	err := s.bounded(ctx, s.o.Timeout, fmt.Sprintf("update snapshot %q", in.Name), func(ctx context.Context) (err error) {
		v, err = s.snaps.Update(ctx, in.Name, func(labels map[string]string) map[string]string {
			return updated(labels, in.Labels, fieldpaths)
		})
		return err
	})
	if err != nil {
		return snapshots.Info{}, err
	}
	return info(v), nil
}

// updated are labels after an update; without field paths all of them are replaced.
func updated(labels, in map[string]string, fieldpaths []string) map[string]string {
	if len(fieldpaths) == 0 {
		return given(in)
	}
	for _, p := range fieldpaths {
		if k, ok := strings.CutPrefix(p, "labels."); ok {
			labels[k] = in[k]
		} else if labels = maps.Clone(in); labels == nil {
			labels = map[string]string{}
		}
	}
	return given(labels)
}

// Walk implements snapshots.Snapshotter. fn may call the snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return as(fmt.Errorf("list snapshots: %w", err), errdefs.ErrInvalidArgument)
	}
	list, err := s.snaps.List(ctx)
	if err != nil {
		return class(err)
	}
	for _, v := range list {
		i := info(v)
		if !filter.Match(adapt(i)) {
			continue
		}
		if err := fn(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func adapt(i snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "kind":
			return strings.ToLower(i.Kind.String()), true
		case "name":
			return i.Name, true
		case "parent":
			return i.Parent, true
		case "labels":
			v, ok := i.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}

// Close implements snapshots.Snapshotter: it waits for calls that are under way; later ones are
// refused. The store stays open.
func (s *Snapshotter) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.calls.Wait()
	return nil
}

var kinds = map[layer.SnapKind]snapshots.Kind{
	layer.SnapActive: snapshots.KindActive, layer.SnapView: snapshots.KindView, layer.SnapCommitted: snapshots.KindCommitted,
}

func info(v layer.Snap) snapshots.Info {
	return snapshots.Info{Kind: kinds[v.Kind], Name: v.Name, Parent: v.Parent, Labels: v.Labels, Created: v.Created, Updated: v.Updated}
}
