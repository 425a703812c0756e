package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"mica/layer"
)

// metaDB is containerd's own metadata, with its locks, its names and its garbage collector, over the
// snapshotter's socket.
func (r *rig) metaDB(list ...*Snapshotter) *metadata.DB {
	r.t.Helper()
	db, err := bbolt.Open(filepath.Join(r.dir, "meta.db"), 0o600, nil)
	ok(r.t, err)
	clients := map[string]snapshots.Snapshotter{}
	for _, sn := range list {
		client, stop := serveOn(r.t, sn, filepath.Join(r.dir, "meta-"+sn.Name()+".sock"))
		r.t.Cleanup(stop)
		clients[sn.Name()] = client
	}
	r.t.Cleanup(func() { db.Close() })
	m := metadata.NewDB(db, nil, clients)
	ok(r.t, m.Init(context.Background()))
	return m
}

// unpack does what containerd does for each layer of an image: ask for it, and unpack it if it is not
// there. It returns how many were unpacked.
func (r *rig) unpack(sn snapshots.Snapshotter, ctx context.Context, chains ...string) (unpacked int) {
	r.t.Helper()
	parent := ""
	for i, chain := range chains {
		key := fmt.Sprintf(snapshots.UnpackKeyFormat, fmt.Sprint(time.Now().UnixNano()), chain)
		opts := []snapshots.Opt{withLabels(layer.LabelSnapRef, chain, snapshots.LabelSnapshotDiffID, "sha256:x", "containerd.io/gc.root", "now")}
		m, err := sn.Prepare(ctx, key, parent, opts...)
		switch {
		case errdefs.IsAlreadyExists(err):
			if _, err := sn.Stat(ctx, chain); err != nil {
				r.t.Fatalf("layer %d exists, they say, but: %v", i, err)
			}
		case err != nil:
			r.t.Fatal(err)
		default:
			unpacked++
			dir, unmount := r.mountOn(m)
			writeFile(r.t, filepath.Join(dir, fmt.Sprint("layer", i)), chain)
			unmount()
			ok(r.t, sn.Commit(ctx, chain, key, opts...))
		}
		parent = chain
	}
	return unpacked
}

func chain(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// TestSharing: layers that were unpacked in one namespace are there for another, layers of imported
// images for all; each is removed when nobody needs it any more.
func TestSharing(t *testing.T) { eachFS(t, testSharing) }

func testSharing(t *testing.T, fs string) {
	r, s, _ := openRig(t, fs)
	db := r.metaDB(s)
	sn := db.Snapshotter("mica")
	one, two := namespaces.WithNamespace(tctx(t), "one"), namespaces.WithNamespace(tctx(t), "two")
	empty := r.used()
	if n := r.unpack(sn, one, chain(1), chain(2), chain(3)); n != 3 {
		t.Fatalf("%d layers were unpacked, want 3", n)
	}
	held := r.used()
	if n := r.unpack(sn, two, chain(1), chain(2), chain(3)); n != 0 {
		t.Errorf("%d layers were unpacked again", n)
	}
	if n := r.used(); n != held {
		t.Errorf("the second namespace costs %d blocks", n-held)
	}
	// On another parent it is not the same layer.
	three := namespaces.WithNamespace(tctx(t), "three")
	if n := r.unpack(sn, three, chain(2)); n != 1 {
		t.Errorf("%d layers were unpacked, want 1: its parent differs", n)
	}
	root := withLabels("containerd.io/gc.root", "now")
	must[[]mount.Mount](t)(sn.Prepare(two, "c", chain(3), root))
	// The first namespace goes; the second one's stay.
	for _, c := range []string{chain(3), chain(2), chain(1)} {
		ok(t, sn.Remove(one, c))
	}
	collect(t, db)
	v := must[[]mount.Mount](t)(sn.View(two, "v", chain(3), root))
	for i := range 3 {
		if got := r.read(v, fmt.Sprint("layer", i)); got != chain(i+1) {
			t.Errorf("after the first namespace went, a view shows %q", got)
		}
	}
	for _, c := range []string{"v", "c", chain(3), chain(2), chain(1)} {
		ok(t, sn.Remove(two, c))
	}
	ok(t, sn.Remove(three, chain(2)))
	collect(t, db)
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning", n, empty)
	}
}

func collect(t testing.TB, db *metadata.DB) {
	t.Helper()
	_, err := db.GarbageCollect(context.Background())
	ok(t, err)
}

// TestGarbage: containerd's collector removes what nobody refers to, also what is mounted, and one
// that cannot be removed does not stop it.
func TestGarbage(t *testing.T) {
	r := newRig(t, 1<<30).open()
	s := r.snapshotter("mica")
	db := r.metaDB(s)
	sn := db.Snapshotter("mica")
	ctx := namespaces.WithNamespace(tctx(t), "ns")
	empty := r.used()
	r.unpack(sn, ctx, chain(1), chain(2))
	root := withLabels("containerd.io/gc.root", "now")
	var mounted []func()
	for i := range 6 {
		m := must[[]mount.Mount](t)(sn.Prepare(ctx, fmt.Sprint("c", i), chain(2), root))
		if i%2 == 0 {
			_, unmount := r.mountOn(m)
			mounted = append(mounted, unmount)
		}
	}
	// Behind containerd's back something was made from the layer: it cannot be removed.
	var backend string
	ok(t, s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Labels[layer.LabelSnapRef] == chain(2) {
			backend = i.Name
		}
		return nil
	}, "kind==committed"))
	must[snapshots.Info](t)(s.Stat(ctx, backend))
	release := r.hold(s, backend)
	for i := range 6 {
		ok(t, sn.Remove(ctx, fmt.Sprint("c", i)))
	}
	ok(t, sn.Remove(ctx, chain(2)))
	ok(t, sn.Remove(ctx, chain(1)))
	begin := time.Now()
	collect(t, db)
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("the collection took %v", d)
	}
	left := map[string]bool{}
	ok(t, s.Walk(ctx, func(_ context.Context, i snapshots.Info) error { left[i.Name] = true; return nil }))
	if len(left) != 2 || !left[backend] {
		t.Errorf("left are %v, want the held layer and its parent", left)
	}
	release()
	for _, unmount := range mounted {
		unmount()
	}
	collectAgain(t, db, sn, ctx)
	waitFor(t, "an empty queue", func() bool { return len(r.store.Queue()) == 0 })
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning", n, empty)
	}
}

// hold keeps a snapshot from being removed, as a Prepare under way does, until release.
func (r *rig) hold(s *Snapshotter, name string) (release func()) {
	r.t.Helper()
	done, err := s.snaps.Hold(tctx(r.t), name)
	ok(r.t, err)
	return done
}

// collectAgain makes something that is garbage at once, so that the collector looks at all again.
func collectAgain(t testing.TB, db *metadata.DB, sn snapshots.Snapshotter, ctx context.Context) {
	t.Helper()
	must[[]mount.Mount](t)(sn.Prepare(ctx, "garbage", "", withLabels("containerd.io/gc.root", "now")))
	ok(t, sn.Remove(ctx, "garbage"))
	collect(t, db)
}

// TestImported: layers of an image that was imported into the store are there for containerd, at no
// cost, and stay as long as either needs them.
func TestImported(t *testing.T) { eachFS(t, testImported) }

func testImported(t *testing.T, fs string) {
	r, s, _ := openRig(t, fs)
	db := r.metaDB(s)
	sn := db.Snapshotter("mica")
	ctx := namespaces.WithNamespace(tctx(t), "ns")
	empty := r.used()
	chains := r.importImage("image", "low", "high")
	held := r.used()
	if n := r.unpack(sn, ctx, chains...); n != 0 {
		t.Errorf("%d layers were unpacked again", n)
	}
	if n := r.used(); n != held {
		t.Errorf("containerd's names of imported layers cost %d blocks", n-held)
	}
	if u := must[snapshots.Usage](t)(sn.Usage(ctx, chains[1])); u.Size < 64<<10 {
		t.Errorf("usage %+v", u)
	}
	root := withLabels("containerd.io/gc.root", "now")
	must[[]mount.Mount](t)(sn.Prepare(ctx, "c", chains[1], root))
	// A layer of containerd's own on top of an imported one.
	if n := r.unpack(sn, ctx, chains[0], chains[1], chain(9)); n != 1 {
		t.Errorf("%d layers were unpacked, want 1", n)
	}
	ok(t, r.store.RemoveImage(ctx, "image"))
	m := must[[]mount.Mount](t)(sn.Mounts(ctx, "c"))
	if got := r.read(m, "high"); got != "high" {
		t.Errorf("after the image was removed, a container shows %q", got)
	}
	r.close()
	r.open()
	if n := len(must[[]layer.Layer](t)(r.store.Layers(ctx))); n != 2 {
		t.Errorf("%d layers after a restart, want 2", n)
	}
	// The rest through the library: containerd's client was closed with the store.
	if err := removeAll(r, "mica"); err != nil {
		t.Fatal(err)
	}
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning", n, empty)
	}
}

// importImage imports an image into the store; each layer is a file of its name.
func (r *rig) importImage(name string, layers ...string) (chains []string) {
	r.t.Helper()
	ctx := tctx(r.t)
	im, err := r.store.BeginImport(ctx)
	ok(r.t, err)
	parent := ""
	for _, l := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		ok(r.t, w.WriteHeader(&tar.Header{Name: l, Mode: 0o644, Size: int64(len(l)), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(l))
		ok(r.t, err)
		ok(r.t, w.Close())
		diff := fmt.Sprintf("sha256:%x", sha256.Sum256(b.Bytes()))
		id := diff
		if parent != "" {
			id = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(parent+" "+diff)))
		}
		_, err = im.ApplyLayer(ctx, layer.LayerSpec{ParentChain: parent, ChainID: id, DiffID: diff}, &b)
		ok(r.t, err)
		parent = id
		chains = append(chains, id)
	}
	_, err = im.Commit(ctx, layer.ImageSpec{Name: name, ChainID: parent, Config: []byte("{}"), Digest: chain(77)})
	ok(r.t, err)
	return chains
}

// TestSharedElsewhere: what one snapshotter has unpacked is there for the others of the store, such as
// that of a runtime with virtual machines, at no cost. Either may go first. What snapshotters share is
// no layer of an image: an import reads, and verifies, what is in its archive.
func TestSharedElsewhere(t *testing.T) {
	r := newRig(t, 1<<30).open()
	runc := r.snapshotter("mica")
	kata := r.snapshotter("mica-kata", func(o *Options) { o.GuestOwned = true })
	closed := r.snapshotter("mica-closed", func(o *Options) { o.ShareLayers = false })
	db := r.metaDB(runc, kata, closed)
	ctx := namespaces.WithNamespace(tctx(t), "ns")
	empty := r.used()
	chains := []string{chain(1), chain(2), chain(3)}
	if n := r.unpack(db.Snapshotter("mica"), ctx, chains...); n != 3 {
		t.Fatalf("%d layers were unpacked, want 3", n)
	}
	root := withLabels("containerd.io/gc.root", "now")
	must[[]mount.Mount](t)(db.Snapshotter("mica").Prepare(ctx, "before", chain(3), root))
	held := r.used()
	usage := must[snapshots.Usage](t)(db.Snapshotter("mica").Usage(ctx, chain(2)))
	if n := r.unpack(db.Snapshotter("mica-kata"), ctx, chains...); n != 0 {
		t.Errorf("%d layers were unpacked again by the other snapshotter", n)
	}
	if n := r.used(); n != held {
		t.Errorf("the other snapshotter costs %d blocks", n-held)
	}
	if n := r.unpack(db.Snapshotter("mica-closed"), ctx, chains[:2]...); n != 2 {
		t.Errorf("%d layers were unpacked where nothing is shared, want 2", n)
	}
	for _, name := range []string{"mica", "mica-kata"} {
		if got := must[snapshots.Usage](t)(db.Snapshotter(name).Usage(ctx, chain(2))); got != usage {
			t.Errorf("%s: usage %+v of a shared layer, before %+v", name, got, usage)
		}
	}
	// A container of each, and a layer on top of a shared one.
	vm := must[[]mount.Mount](t)(db.Snapshotter("mica-kata").Prepare(ctx, "vm", chain(3), root))
	for i := range 3 {
		if got := r.read(vm, fmt.Sprint("layer", i)); got != chain(i+1) {
			t.Errorf("a container of the other snapshotter shows %q", got)
		}
	}
	if n := r.unpack(db.Snapshotter("mica"), ctx, append(chains, chain(4))...); n != 1 {
		t.Errorf("%d layers were unpacked, want 1", n)
	}
	if n := r.unpack(db.Snapshotter("mica-kata"), ctx, append(chains, chain(4))...); n != 0 {
		t.Errorf("%d layers were unpacked on shared ones that the other has, want none", n)
	}
	im := must[layer.Import](t)(r.store.BeginImport(ctx))
	if l, err := im.Layer(ctx, chain(1)); !errors.Is(err, layer.ErrNotFound) {
		t.Errorf("an import finds %+v, %v: nobody verified it", l, err)
	}
	ok(t, im.Abort(ctx))
	// The first one goes, with its containers; then the store is closed and opened.
	for _, c := range []string{"before", chain(4), chain(3), chain(2), chain(1)} {
		ok(t, db.Snapshotter("mica").Remove(ctx, c))
	}
	collect(t, db)
	v := must[[]mount.Mount](t)(db.Snapshotter("mica-kata").View(ctx, "v", chain(4), root))
	if got := r.read(v, "layer3"); got != chain(4) {
		t.Errorf("after the first snapshotter's went, a view shows %q", got)
	}
	r.close()
	r.open()
	kata = r.snapshotter("mica-kata", func(o *Options) { o.GuestOwned = true })
	if n := len(must[[]layer.Layer](t)(r.store.Layers(ctx))); n != 4 {
		t.Errorf("%d layers after a restart, want 4", n)
	}
	var vmKey string
	ok(t, kata.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.HasSuffix(i.Name, "/vm") {
			vmKey = i.Name
		}
		return nil
	}))
	if got := r.read(must[[]mount.Mount](t)(kata.Mounts(ctx, vmKey)), "layer2"); got != chain(3) {
		t.Errorf("after a restart, a container shows %q", got)
	}
	for _, name := range []string{"mica-kata", "mica-closed"} {
		ok(t, removeAll(r, name))
	}
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning", n, empty)
	}
}
