package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// differ is one with a content store in a directory.
func (r *rig) differ() (*Differ, content.Store) {
	r.t.Helper()
	cs, err := local.NewLabeledStore(filepath.Join(r.dir, "content"), &labelStore{m: map[digest.Digest]map[string]string{}})
	ok(r.t, err)
	of := func(ctx context.Context, _ []string, _ bool) (context.Context, content.Store, error) {
		return ctx, cs, nil
	}
	return NewDiffer(r.store, of, r.log), cs
}

// labelStore keeps labels of blobs in memory.
type labelStore struct {
	m map[digest.Digest]map[string]string
}

func (l *labelStore) Get(d digest.Digest) (map[string]string, error) { return l.m[d], nil }
func (l *labelStore) Set(d digest.Digest, m map[string]string) error { l.m[d] = m; return nil }
func (l *labelStore) Update(d digest.Digest, m map[string]string) (map[string]string, error) {
	if l.m[d] == nil {
		l.m[d] = map[string]string{}
	}
	for k, v := range m {
		l.m[d][k] = v
	}
	return l.m[d], nil
}

// entries reads a layer: name to contents, and the latest time in it.
func entries(t testing.TB, cs content.Store, d ocispec.Descriptor) (m map[string]string, latest time.Time, plain string) {
	t.Helper()
	ra, err := cs.ReaderAt(context.Background(), d)
	ok(t, err)
	defer ra.Close()
	z, err := decompress(content.NewReader(ra))
	ok(t, err)
	defer z.Close()
	sum := sha256.New()
	m = map[string]string{}
	for tr := tar.NewReader(io.TeeReader(z, sum)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		ok(t, err)
		b, err := io.ReadAll(tr)
		ok(t, err)
		m[strings.TrimSuffix(h.Name, "/")] = string(b)
		if h.ModTime.After(latest) {
			latest = h.ModTime
		}
	}
	io.Copy(sum, z)
	return m, latest, fmt.Sprintf("sha256:%x", sum.Sum(nil))
}

// TestCompare: the difference of what is mounted and written to is a layer of one moment, in every
// compression, with the labels that containerd expects.
func TestCompare(t *testing.T) { eachFS(t, testCompare) }

func testCompare(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	d, cs := r.differ()
	r.layer(s, "p", "", map[string]string{"kept": "kept", "changed": "old", "gone": "gone"})
	before := r.used()
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	dir, unmount := r.mountOn(m)
	writeFile(t, filepath.Join(dir, "changed"), "new")
	writeFile(t, filepath.Join(dir, "sub/added"), "added")
	ok(t, os.Remove(filepath.Join(dir, "gone")))
	stop := numbers(t, filepath.Join(dir, "n"))
	lower := must[[]mount.Mount](t)(s.View(ctx, "lower", "p"))
	for _, c := range []struct {
		mediaType string
		lower     []mount.Mount
		want      []string
	}{
		{"", lower, []string{".wh.gone", "changed", "n", "sub", "sub/added"}},
		{ocispec.MediaTypeImageLayer, lower, []string{".wh.gone", "changed", "n", "sub", "sub/added"}},
		{ocispec.MediaTypeImageLayerZstd, lower, []string{".wh.gone", "changed", "n", "sub", "sub/added"}},
		{ocispec.MediaTypeImageLayerGzip, nil, []string{"changed", "kept", "n", "sub", "sub/added"}},
	} {
		begin := time.Now()
		desc, err := d.Compare(ctx, c.lower, m, diff.WithMediaType(c.mediaType), diff.WithLabels(map[string]string{"mine": "1"}))
		ok(t, err)
		got, _, plain := entries(t, cs, desc)
		delete(got, ".")
		names := slices.Sorted(func(yield func(string) bool) {
			for n := range got {
				if !yield(n) {
					return
				}
			}
		})
		if !slices.Equal(names, c.want) || got["changed"] != "new" {
			t.Errorf("%s: entries %v, want %v", c.mediaType, names, c.want)
		}
		n := wantPrefix(t, got["n"])
		t.Logf("%s: %d bytes, %d lines, %v", desc.MediaType, desc.Size, n, time.Since(begin).Round(time.Millisecond))
		info, err := cs.Info(ctx, desc.Digest)
		ok(t, err)
		if info.Labels[labels.LabelUncompressed] != plain || info.Labels["mine"] != "1" {
			t.Errorf("labels %v, want the uncompressed digest %s", info.Labels, plain)
		}
	}
	stop()
	unmount()
	epoch := time.Unix(1_500_000_000, 0)
	desc, err := d.Compare(ctx, lower, m, diff.WithSourceDateEpoch(&epoch))
	ok(t, err)
	got, latest, _ := entries(t, cs, desc)
	if latest.After(epoch) || got["sub/added"] != "added" {
		t.Errorf("latest time %v, want at most %v", latest, epoch)
	}
	twice, err := d.Compare(ctx, lower, m, diff.WithSourceDateEpoch(&epoch))
	if err != nil || twice.Digest != desc.Digest {
		t.Errorf("the same difference again: %v, %v, was %v", twice.Digest, err, desc.Digest)
	}
	// A committed one, through a view.
	ok(t, s.Commit(ctx, "c", "k"))
	upper := must[[]mount.Mount](t)(s.View(ctx, "upper", "c"))
	desc, err = d.Compare(ctx, lower, upper)
	ok(t, err)
	if got, _, _ := entries(t, cs, desc); got["changed"] != "new" {
		t.Errorf("the difference of a view: %v", got)
	}
	for _, k := range []string{"upper", "lower", "c"} {
		ok(t, s.Remove(ctx, k))
	}
	if n := r.used(); n != before {
		t.Errorf("pool holds %d blocks, %d before: copies are left", n, before)
	}
}

// TestCompareRefusals: what is not this differ's to do goes to the next one; the rest is refused.
func TestCompareRefusals(t *testing.T) {
	r, s, ctx := openRig(t, "")
	d, cs := r.differ()
	r.layer(s, "p", "", map[string]string{"a": "a"})
	r.layer(s, "q", "", map[string]string{"b": "b"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	other := must[[]mount.Mount](t)(s.View(ctx, "other", "q"))
	low := must[[]mount.Mount](t)(s.View(ctx, "low", "p"))
	foreign := []mount.Mount{{Type: "bind", Source: r.dir, Options: []string{"rbind"}}}
	compare := func(lower, upper []mount.Mount, o ...diff.Opt) func() error {
		return func() error { _, err := d.Compare(ctx, lower, upper, o...); return err }
	}
	for _, c := range []struct {
		name string
		do   func() error
		is   func(error) bool
	}{
		{"upper of another snapshotter", compare(low, foreign), errdefs.IsNotImplemented},
		{"lower of another snapshotter", compare(foreign, m), errdefs.IsNotImplemented},
		{"no upper", compare(low, nil), errdefs.IsNotImplemented},
		{"two mounts", compare(low, append(slices.Clone(m), other...)), errdefs.IsNotImplemented},
		{"unknown media type", compare(low, m, diff.WithMediaType("application/x")), errdefs.IsNotImplemented},
		{"not made from the lower", compare(other, m), errdefs.IsNotImplemented},
		{"lower that can be written", compare(m, m), errdefs.IsNotImplemented},
	} {
		t.Run(c.name, func(t *testing.T) { wantClass(t, c.do(), c.is) })
	}
	st, err := cs.ListStatuses(ctx)
	if err != nil || len(st) != 0 {
		t.Errorf("writers are left: %v, %v", st, err)
	}
}

// blob puts a layer into a content store.
func blob(t testing.TB, cs content.Store, mediaType string, kind compression, plain []byte) ocispec.Descriptor {
	t.Helper()
	var b bytes.Buffer
	z, err := compress(&b, kind)
	ok(t, err)
	_, err = z.Write(plain)
	ok(t, err)
	ok(t, z.Close())
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	ok(t, content.WriteBlob(context.Background(), cs, desc.Digest.String(), &b, desc))
	return desc
}

func tarOf(t testing.TB, name, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	ok(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg}))
	_, err := w.Write([]byte(text))
	ok(t, err)
	ok(t, w.Close())
	return b.Bytes()
}

// TestApplyLayers: blobs in every compression are applied by a helper, which tells the digest of what
// was in them; what is hostile or not a layer is refused.
func TestApplyLayers(t *testing.T) { eachFS(t, testApplyLayers) }

func testApplyLayers(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	d, cs := r.differ()
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", ""))
	for i, kind := range []compression{plainTar, gzipTar, zstdTar} {
		mediaType := []string{ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd}[i]
		plain := tarOf(t, fmt.Sprint("file", i), "text")
		got, err := d.Apply(ctx, blob(t, cs, mediaType, kind, plain), m)
		ok(t, err)
		if got.Digest != digest.FromBytes(plain) || got.Size != int64(len(plain)) || got.MediaType != ocispec.MediaTypeImageLayer {
			t.Errorf("%s: applied %+v", mediaType, got)
		}
		if text := r.read(m, fmt.Sprint("file", i)); text != "text" {
			t.Errorf("%s: file holds %q", mediaType, text)
		}
	}
	_, err := d.Apply(ctx, blob(t, cs, ocispec.MediaTypeImageLayer, plainTar, tarOf(t, "../../escape", "x")), m)
	if err == nil || !strings.Contains(err.Error(), "escape") {
		t.Errorf("a layer that leads out: %v", err)
	}
	_, err = d.Apply(ctx, blob(t, cs, "application/vnd.oci.image.layer.v1.tar+encrypted", plainTar, tarOf(t, "y", "x")), m)
	wantClass(t, err, errdefs.IsNotImplemented)
	v := must[[]mount.Mount](t)(s.View(ctx, "v", ""))
	_, err = d.Apply(ctx, blob(t, cs, ocispec.MediaTypeImageLayer, plainTar, tarOf(t, "z", "x")), v)
	wantClass(t, err, errdefs.IsFailedPrecondition)
	_, err = d.Apply(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("nothing"), Size: 3}, m)
	wantClass(t, err, errdefs.IsNotFound)
	ok(t, s.Commit(ctx, "c", "k"))
	if u := must[snapshots.Usage](t)(s.Usage(ctx, "c")); u.Size == 0 {
		t.Error("no usage")
	}
}

// TestContents: a call without a namespace is refused before anything is dialled.
func TestContents(t *testing.T) {
	c, err := DialContents(filepath.Join(t.TempDir(), "none.sock"))
	ok(t, err)
	defer c.Close()
	_, _, err = c.Of(context.Background(), []string{"key", "a/b", "a/b/c", "/1/c"}, true)
	wantClass(t, err, errdefs.IsInvalidArgument, "namespace")
	ctx, _, err := c.Of(context.Background(), []string{"key", "space/12/some/key"}, false)
	ok(t, err)
	if ns, _ := namespaces.Namespace(ctx); ns != "space" {
		t.Errorf("namespace %q", ns)
	}
}
