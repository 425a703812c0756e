package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"mica/layer"
)

func withLabels(kv ...string) snapshots.Opt {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return snapshots.WithLabels(m)
}

// TestRefusals: bad input gets the class that containerd acts on, and a message that names the key
// and the numbers. Through the library and through the socket.
func TestRefusals(t *testing.T) {
	r := newRig(t, 1<<30).open()
	lib := r.snapshotter("mica")
	client, stop := serveOn(t, lib, filepath.Join(r.dir, "sn.sock"))
	defer stop()
	ctx := tctx(t)
	r.layer(lib, "p", "", map[string]string{"a": "a"})
	r.layer(lib, "child", "p", nil)
	must[[]mount.Mount](t)(lib.Prepare(ctx, "active", "p"))
	must[[]mount.Mount](t)(lib.View(ctx, "view", "p"))
	prepare := func(s snapshots.Snapshotter, key, parent string, o ...snapshots.Opt) error {
		_, err := s.Prepare(ctx, key, parent, o...)
		return err
	}
	long := strings.Repeat("x", 5000)
	for _, c := range []struct {
		name  string
		do    func(s snapshots.Snapshotter) error
		is    func(error) bool
		words []string
	}{
		{"unknown parent", func(s snapshots.Snapshotter) error { return prepare(s, "k", "nobody") }, errdefs.IsNotFound, []string{`"k"`, `"nobody"`}},
		{"unknown parent of a view", func(s snapshots.Snapshotter) error { _, err := s.View(ctx, "k", "nobody"); return err }, errdefs.IsNotFound, []string{`"nobody"`}},
		{"parent that is active", func(s snapshots.Snapshotter) error { return prepare(s, "k", "active") }, errdefs.IsInvalidArgument, []string{`"active"`, "committed"}},
		{"existing key", func(s snapshots.Snapshotter) error { return prepare(s, "active", "p") }, errdefs.IsAlreadyExists, []string{`"active"`}},
		{"existing key of a view", func(s snapshots.Snapshotter) error { _, err := s.View(ctx, "active", "p"); return err }, errdefs.IsAlreadyExists, []string{`"active"`}},
		{"commit to an existing name", func(s snapshots.Snapshotter) error { return s.Commit(ctx, "p", "active") }, errdefs.IsAlreadyExists, []string{`"p"`}},
		{"commit of a view", func(s snapshots.Snapshotter) error { return s.Commit(ctx, "n", "view") }, errdefs.IsFailedPrecondition, []string{`"view"`, "not active"}},
		{"commit of a committed one", func(s snapshots.Snapshotter) error { return s.Commit(ctx, "n", "p") }, errdefs.IsFailedPrecondition, []string{`"p"`}},
		{"commit of nothing", func(s snapshots.Snapshotter) error { return s.Commit(ctx, "n", "nobody") }, errdefs.IsNotFound, []string{`"nobody"`}},
		{"commit onto another parent", func(s snapshots.Snapshotter) error {
			return s.Commit(ctx, "n", "active", snapshots.WithParent("child"))
		},
			errdefs.IsInvalidArgument, []string{`"child"`, `"p"`}},
		{"remove of a parent", func(s snapshots.Snapshotter) error { return s.Remove(ctx, "p") }, errdefs.IsFailedPrecondition, []string{`"p"`, "3 snapshots"}},
		{"remove of nothing", func(s snapshots.Snapshotter) error { return s.Remove(ctx, "nobody") }, errdefs.IsNotFound, []string{`"nobody"`}},
		{"mounts of a committed one", func(s snapshots.Snapshotter) error { _, err := s.Mounts(ctx, "p"); return err }, errdefs.IsFailedPrecondition, []string{`"p"`}},
		{"mounts of nothing", func(s snapshots.Snapshotter) error { _, err := s.Mounts(ctx, "nobody"); return err }, errdefs.IsNotFound, []string{`"nobody"`}},
		{"usage of nothing", func(s snapshots.Snapshotter) error { _, err := s.Usage(ctx, "nobody"); return err }, errdefs.IsNotFound, []string{`"nobody"`}},
		{"update of nothing", func(s snapshots.Snapshotter) error {
			_, err := s.Update(ctx, snapshots.Info{Name: "nobody"}, "labels")
			return err
		}, errdefs.IsNotFound, []string{`"nobody"`}},
		{"update of the kind", func(s snapshots.Snapshotter) error {
			_, err := s.Update(ctx, snapshots.Info{Name: "p"}, "kind")
			return err
		}, errdefs.IsInvalidArgument, []string{`"p"`, `"kind"`}},
		{"no key", func(s snapshots.Snapshotter) error { return prepare(s, "", "p") }, errdefs.IsInvalidArgument, nil},
		{"key that is too long", func(s snapshots.Snapshotter) error { return prepare(s, long, "p") }, errdefs.IsInvalidArgument, []string{"4096"}},
		{"label that is too long", func(s snapshots.Snapshotter) error { return prepare(s, "k", "p", withLabels("x", long)) }, errdefs.IsInvalidArgument, []string{"5001", "4096"}},
		{"label of an update that is too long", func(s snapshots.Snapshotter) error {
			_, err := s.Update(ctx, snapshots.Info{Name: "p", Labels: map[string]string{"x": long}}, "labels.x")
			return err
		}, errdefs.IsInvalidArgument, []string{"4096"}},
		{"filter that does not parse", func(s snapshots.Snapshotter) error { return s.Walk(ctx, nil, "labels.!!") }, errdefs.IsInvalidArgument, nil},
		{"size below the parent's", func(s snapshots.Snapshotter) error { return prepare(s, "k", "p", withLabels(LabelSize, "512M")) },
			errdefs.IsInvalidArgument, []string{`"k"`, "536870912", "1073741824"}},
		{"quota below the parent's", func(s snapshots.Snapshotter) error {
			return prepare(s, "k", "p", withLabels(LabelDiskQuota, "1g"), withLabels(LabelDiskQuota, "10m"))
		},
			errdefs.IsInvalidArgument, []string{"10485760", "1073741824"}},
		{"size that is none", func(s snapshots.Snapshotter) error { return prepare(s, "k", "p", withLabels(LabelSize, "big")) }, errdefs.IsInvalidArgument, []string{`"big"`, LabelSize}},
		{"half an id mapping", func(s snapshots.Snapshotter) error {
			return prepare(s, "k", "p", withLabels(snapshots.LabelSnapshotUIDMapping, "0:1000:65536"))
		},
			errdefs.IsInvalidArgument, []string{snapshots.LabelSnapshotGIDMapping}},
		{"id mapping that is none", func(s snapshots.Snapshotter) error {
			return prepare(s, "k", "p", withLabels(snapshots.LabelSnapshotUIDMapping, "0:1000", snapshots.LabelSnapshotGIDMapping, "0:1000:65536"))
		}, errdefs.IsInvalidArgument, []string{`"0:1000"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := must[layer.Status](t)(r.store.Status(ctx)).TransactionID
			wantClass(t, c.do(lib), c.is, c.words...)
			wantClass(t, c.do(client), c.is, c.words...)
			if after := must[layer.Status](t)(r.store.Status(ctx)).TransactionID; after != before {
				t.Errorf("a refusal changed the catalog: transaction %d, was %d", after, before)
			}
		})
	}
	// A parent that is the right one is no rebase.
	ok(t, client.Commit(ctx, "n", "active", snapshots.WithParent("p")))
}

// TestLabels: labels are kept, changed field by field, and those of containerd.io/snapshot/ go on to
// the committed snapshot; the reference to a layer does if the snapshot is that layer.
func TestLabels(t *testing.T) {
	_, s, ctx := openRig(t, "")
	must[[]mount.Mount](t)(s.Prepare(ctx, "k", "", withLabels("containerd.io/snapshot/x", "1", "containerd.io/snapshot/y", "1",
		"other", "1", "empty", "", layer.LabelSnapRef, "sha256:abc")))
	i := must[snapshots.Info](t)(s.Stat(ctx, "k"))
	if len(i.Labels) != 4 || i.Labels["other"] != "1" {
		t.Errorf("labels %v", i.Labels)
	}
	ok(t, s.Commit(ctx, "ns/3/sha256:abc", "k", withLabels("containerd.io/snapshot/y", "2")))
	i = must[snapshots.Info](t)(s.Stat(ctx, "ns/3/sha256:abc"))
	want := map[string]string{"containerd.io/snapshot/x": "1", "containerd.io/snapshot/y": "2", layer.LabelSnapRef: "sha256:abc"}
	if fmt.Sprint(i.Labels) != fmt.Sprint(want) {
		t.Errorf("labels %v, want %v", i.Labels, want)
	}
	must[[]mount.Mount](t)(s.Prepare(ctx, "k", "", withLabels(layer.LabelSnapRef, "sha256:def")))
	ok(t, s.Commit(ctx, "something else", "k"))
	if i = must[snapshots.Info](t)(s.Stat(ctx, "something else")); len(i.Labels) != 0 {
		t.Errorf("labels %v, want none", i.Labels)
	}
}

// TestSize: the labels of size enlarge the file system of a new snapshot, and of what is made from
// it; a hint that is too small is nothing.
func TestSize(t *testing.T) { eachFS(t, testSize) }

func testSize(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "p", "", map[string]string{"a": "a"})
	size := func(m []mount.Mount) (n int64) {
		dir, unmount := r.mountOn(m)
		defer unmount()
		var st unix.Statfs_t
		ok(t, unix.Statfs(dir, &st))
		return int64(st.Blocks) * st.Bsize
	}
	for i, c := range []struct {
		label, value string
		min, max     int64
	}{
		{"none", "", 900 << 20, 1 << 30},
		{LabelSize, "3G", 2900 << 20, 3 << 30},
		{LabelDiskQuota, "2147483648", 1900 << 20, 2 << 30},
		{snapshots.LabelSnapshotMaxSize, "2147483648", 1900 << 20, 2 << 30},
		{snapshots.LabelSnapshotMaxSize, "1000", 900 << 20, 1 << 30},
	} {
		key := fmt.Sprint("k", i)
		m := must[[]mount.Mount](t)(s.Prepare(ctx, key, "p", withLabels(c.label, c.value)))
		if n := size(m); n < c.min || n > c.max {
			t.Errorf("%s=%s: file system of %d bytes, want %d to %d", c.label, c.value, n, c.min, c.max)
		}
	}
	ok(t, s.Commit(ctx, "large", "k1"))
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "child", "large"))
	if n := size(m); n < 2900<<20 {
		t.Errorf("a child of 3 GiB has %d bytes", n)
	}
	_, err := s.Prepare(ctx, "less", "large", withLabels(LabelSize, "2G"))
	wantClass(t, err, errdefs.IsInvalidArgument, "2147483648", "3221225472")
}

// TestMounts: one device however often its mounts are asked for, one for all views of a parent, which
// cost the pool no commit; mount lists that are kept too long lead nowhere.
func TestMounts(t *testing.T) { eachFS(t, testMounts) }

func testMounts(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "p", "", map[string]string{"a": "text"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "active", "p"))
	if len(m) != 1 || m[0].Type != fs || filepath.Dir(m[0].Source) != r.host.Links() {
		t.Fatalf("mounts %+v", m)
	}
	attached := must[layer.Status](t)(r.store.Status(ctx)).Attached
	for range 1000 {
		again := must[[]mount.Mount](t)(s.Mounts(ctx, "active"))
		if again[0].Source != m[0].Source {
			t.Fatalf("source %s, before %s", again[0].Source, m[0].Source)
		}
	}
	if n := must[layer.Status](t)(r.store.Status(ctx)).Attached; n != attached {
		t.Errorf("%d devices after 1000 calls, %d before", n, attached)
	}

	ok(t, r.pool.Commit(ctx))
	before, err := r.pool.Status(ctx)
	ok(t, err)
	sources := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			v, err := s.View(ctx, fmt.Sprint("view", i), "p")
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			sources[v[0].Source] = true
		})
	}
	wg.Wait()
	after, err := r.pool.Status(ctx)
	ok(t, err)
	if len(sources) != 1 || after.Commits != before.Commits {
		t.Errorf("100 views: %d sources, %d pool commits; want 1, 0", len(sources), after.Commits-before.Commits)
	}
	if n := must[layer.Status](t)(r.store.Status(ctx)).Attached; n != attached+1 {
		t.Errorf("%d devices with 100 views, want %d", n, attached+1)
	}
	v := must[[]mount.Mount](t)(s.Mounts(ctx, "view7"))
	if got := r.read(v, "a"); got != "text" {
		t.Errorf("a view shows %q", got)
	}

	for i := range 100 {
		ok(t, s.Remove(ctx, fmt.Sprint("view", i)))
	}
	ok(t, s.Remove(ctx, "active"))
	for _, old := range [][]mount.Mount{m, v} {
		if _, err := os.Stat(old[0].Source); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", old[0].Source, err)
		}
	}
	// Others come, and get the same minors, but never the same links.
	for i := range 4 {
		n := must[[]mount.Mount](t)(s.Prepare(ctx, fmt.Sprint("new", i), "p"))
		w := must[[]mount.Mount](t)(s.View(ctx, fmt.Sprint("newview", i), "p"))
		if n[0].Source == m[0].Source || w[0].Source == v[0].Source {
			t.Fatalf("links were used again: %s, %s", n[0].Source, w[0].Source)
		}
	}
	old := [][]mount.Mount{m, v, must[[]mount.Mount](t)(s.Mounts(ctx, "new0")), must[[]mount.Mount](t)(s.Mounts(ctx, "newview0"))}
	stale := func(when string, list [][]mount.Mount) {
		t.Helper()
		for _, o := range list {
			if err := mount.All(o, r.dir); !errors.Is(err, unix.ENOENT) {
				t.Errorf("%s, mount of an old list: %v, want ENOENT", when, err)
			}
		}
	}
	stale("with others in their place", old[:2])
	// Nor after a restart, and of none that goes after it.
	r.close()
	r.open()
	s = r.snapshotter("mica")
	stale("after a restart", old[:2])
	ok(t, s.Remove(ctx, "new0"))
	for i := range 4 {
		ok(t, s.Remove(ctx, fmt.Sprint("newview", i)))
	}
	for i := range 4 {
		must[[]mount.Mount](t)(s.Prepare(ctx, fmt.Sprint("newer", i), "p"))
		must[[]mount.Mount](t)(s.View(ctx, fmt.Sprint("newerview", i), "p"))
	}
	stale("with others in their place after a restart", old)
}

// TestUnpackCosts: unpacking a layer costs mica no mount and at most two pool commits.
func TestUnpackCosts(t *testing.T) { eachFS(t, testUnpackCosts) }

func testUnpackCosts(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "warm up", "", map[string]string{"x": "x"}) // reserves ids
	parent := ""
	for i := range 5 {
		helpers := countHelpers(t)
		key, name := fmt.Sprintf("extract-%d", i), fmt.Sprintf("layer%d", i)
		commits := func(fn func()) uint64 {
			a, err := r.pool.Status(ctx)
			ok(t, err)
			fn()
			b, err := r.pool.Status(ctx)
			ok(t, err)
			return b.Commits - a.Commits
		}
		var m []mount.Mount
		n := commits(func() { m = must[[]mount.Mount](t)(s.Prepare(ctx, key, parent)) })
		dir, unmount := r.mountOn(m)
		writeFile(t, filepath.Join(dir, name), strings.Repeat(name, 10000))
		unmount()
		n += commits(func() { ok(t, s.Commit(ctx, name, key)) })
		if n > 2 {
			t.Errorf("layer %d: %d pool commits by prepare and commit, at most 2 are wanted", i, n)
		}
		if h := countHelpers(t) - helpers; h != 0 {
			t.Errorf("layer %d: %d helpers were started, which mount", i, h)
		}
		parent = name
		t.Logf("layer %d: %d pool commits", i, n)
	}
}
