package snapshotter

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"mica/layer"
	"mica/layer/archive"
)

// A Differ is containerd's diff service for mounts of this store. For others it says "not
// implemented", on which containerd asks the next differ of its list.
//
// Compare takes a copy of what is mounted, so that it works on a container that runs and writes.
// containerd's own differ mounts the device a second time, read-only, which Linux refuses while it
// is mounted writable.
type Differ struct {
	store   *layer.Store
	content ContentOf
	log     *slog.Logger
}

// A ContentOf gives the content store that a call's blobs are in, and the context to use it with.
// snaps are the snapshots that the call is about. See Contents.Of.
type ContentOf func(ctx context.Context, snaps []string, write bool) (context.Context, content.Store, error)

// NewDiffer makes a differ.
func NewDiffer(store *layer.Store, contents ContentOf, log *slog.Logger) *Differ {
	return &Differ{store: store, content: contents, log: log}
}

var errNotOurs = &classed{errors.New("not mounts of this store"), errdefs.ErrNotImplemented}

// sourceOf returns the source of a mount list that has one mount of this store's: "" for an empty list.
func (d *Differ) sourceOf(m []mount.Mount) (string, error) {
	switch {
	case len(m) == 0:
		return "", nil
	case len(m) > 1 || !d.store.Owns(m[0].Source):
		return "", errNotOurs
	}
	return m[0].Source, nil
}

// Compare implements diff.Comparer.
func (d *Differ) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (ocispec.Descriptor, error) {
	desc, err := d.compare(ctx, lower, upper, opts)
	if err != nil {
		return ocispec.Descriptor{}, class(err)
	}
	return desc, nil
}

func (d *Differ) compare(ctx context.Context, lower, upper []mount.Mount, opts []diff.Opt) (desc ocispec.Descriptor, err error) {
	var c diff.Config
	for _, opt := range opts {
		if err := opt(&c); err != nil {
			return desc, err
		}
	}
	low, err := d.sourceOf(lower)
	if err != nil {
		return desc, err
	}
	up, err := d.sourceOf(upper)
	if err != nil {
		return desc, err
	}
	if up == "" {
		return desc, errNotOurs
	}
	if c.MediaType == "" {
		c.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	kind, known := compressions[c.MediaType]
	if !known || c.Compressor != nil {
		return desc, as(fmt.Errorf("diff of media type %q", c.MediaType), errdefs.ErrNotImplemented)
	}
	ctx, store, err := d.content(ctx, d.store.SnapNames(up), true)
	if err != nil {
		return desc, err
	}
	fresh := c.Reference == ""
	if fresh {
		var b [12]byte
		rand.Read(b[:])
		c.Reference = fmt.Sprintf("mica-diff-%x", b)
	}
	w, err := content.OpenWriter(ctx, store, content.WithRef(c.Reference), content.WithDescriptor(ocispec.Descriptor{MediaType: c.MediaType}))
	if err != nil {
		return desc, fmt.Errorf("content store: %w", err)
	}
	done := false
	defer func() {
		if done {
			return
		}
		w.Close()
		if fresh {
			store.Abort(context.WithoutCancel(ctx), c.Reference)
		}
	}()
	if !fresh {
		if err := w.Truncate(0); err != nil {
			return desc, fmt.Errorf("content store: %w", err)
		}
	}
	plain := sha256.New()
	err = d.write(ctx, w, plain, kind, &c, low, up)
	if errors.Is(err, layer.ErrNotDerived) {
		return desc, as(err, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return desc, err
	}
	if c.Labels == nil {
		c.Labels = map[string]string{}
	}
	c.Labels[labels.LabelUncompressed] = digest.NewDigest(digest.SHA256, plain).String()
	dgst := w.Digest()
	if err := w.Commit(ctx, 0, dgst, content.WithLabels(c.Labels)); err != nil && !errdefs.IsAlreadyExists(err) {
		return desc, fmt.Errorf("content store: commit %s: %w", dgst, err)
	}
	done = true
	w.Close()
	info, err := store.Info(ctx, dgst)
	if err != nil {
		return desc, fmt.Errorf("content store: %s: %w", dgst, err)
	}
	if info.Labels[labels.LabelUncompressed] == "" { // it was there before, without
		info.Labels = map[string]string{labels.LabelUncompressed: c.Labels[labels.LabelUncompressed]}
		if _, err := store.Update(ctx, info, "labels."+labels.LabelUncompressed); err != nil {
			return desc, fmt.Errorf("content store: label %s: %w", dgst, err)
		}
	}
	return ocispec.Descriptor{MediaType: c.MediaType, Size: info.Size, Digest: dgst}, nil
}

// write writes the difference, compressed, to w, and its plain form to plain.
func (d *Differ) write(ctx context.Context, w io.Writer, plain hash.Hash, kind compression, c *diff.Config, low, up string) error {
	z, err := compress(w, kind)
	if err != nil {
		return err
	}
	var out io.Writer = io.MultiWriter(z, plain)
	clamp := newClamp(out, c.SourceDateEpoch)
	level, err := d.store.DiffMounts(ctx, low, up, clamp)
	err = errors.Join(err, clamp.Close())
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if err == nil && level != layer.LevelFileSystem {
		d.log.Warn("difference of a copy that is not of a quiesced file system", "source", up, "level", level)
	}
	return err
}

// Apply implements diff.Applier. The blob comes from containerd's content store; a helper process
// mounts the node privately and unpacks.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	out, err := d.apply(ctx, desc, mounts, opts)
	if err != nil {
		return ocispec.Descriptor{}, class(err)
	}
	return out, nil
}

func (d *Differ) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts []diff.ApplyOpt) (out ocispec.Descriptor, err error) {
	var c diff.ApplyConfig
	for _, opt := range opts {
		if err := opt(ctx, desc, &c); err != nil {
			return out, err
		}
	}
	source, err := d.sourceOf(mounts)
	if err != nil {
		return out, err
	}
	if _, known := compressions[desc.MediaType]; source == "" || !known || len(c.ProcessorPayloads) > 0 {
		return out, as(fmt.Errorf("apply media type %q", desc.MediaType), errdefs.ErrNotImplemented)
	}
	ctx, store, err := d.content(ctx, d.store.SnapNames(source), false)
	if err != nil {
		return out, err
	}
	ra, err := store.ReaderAt(ctx, desc)
	if err != nil {
		return out, fmt.Errorf("content store: %s: %w", desc.Digest, err)
	}
	defer ra.Close()
	stored := &counting{r: content.NewReader(ra)}
	z, err := decompress(stored)
	if err != nil {
		return out, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer z.Close()
	plain := archive.Unpacking(z, func() int64 { return stored.n }, d.store.Limits())
	sum := &counting{r: plain, h: sha256.New()}
	if err := d.store.ApplyMount(ctx, source, sum); err != nil {
		return out, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: sum.n, Digest: digest.NewDigest(digest.SHA256, sum.h)}, nil
}

// counting counts what goes through it, and takes its digest if it has a hash.
type counting struct {
	r io.Reader
	h hash.Hash
	n int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.h != nil {
		c.h.Write(p[:n])
	}
	c.n += int64(n)
	return n, err
}
