package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The whole life of layers and containers on a real pool, with the numbers of each step.
func TestLife(t *testing.T) { eachFS(t, testLife) }

func testLife(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s := r.open()
	ctx := tctx(t)
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	img := importImage(t, s, "app:1",
		[]file{{name: "etc/os", data: "mica"}, {name: "big", data: big}, {name: "gone", data: "x"}},
		[]file{{name: "etc/more", data: "2"}, {name: "gone", del: true}})
	empty := r.used()
	t.Logf("base and image: %d blocks", empty)
	if len(img.Layers) != 2 || img.UsedBytes < 1<<20 {
		t.Errorf("image %+v", img)
	}
	want := map[string]string{"etc/os": "mica", "big": big, "etc/more": "2"}

	c := create(t, s, "web", "app:1")
	if c.UsedBytes != 0 || r.used() != empty {
		t.Errorf("a new container uses %d bytes, the pool %d blocks more", c.UsedBytes, r.used()-empty)
	}
	if got := contents(r, "web"); !cmp.Equal(got, want) {
		t.Errorf("contents: %s", cmp.Diff(want, got))
	}
	idle := must[Container](t)(s.Container(ctx, "web")).UsedBytes
	t.Logf("an idle container that was mounted once: %d KiB", idle>>10)
	// A mount of XFS clears 2 MiB of its log ahead.
	if most := map[string]int64{"ext4": 256 << 10, "xfs": 2560 << 10}[fs]; idle > most {
		t.Errorf("idle container uses %d bytes, want %d at most", idle, most)
	}

	r.mounted("web", func(dir string) {
		write(t, dir, "etc/os", "changed")
		write(t, dir, "new/file", "n")
		ok(t, os.Remove(dir+"/big"))
	})
	changed := map[string]string{"etc/os": "changed", "etc/more": "2", "new/file": "n"}
	create(t, s, "other", "app:1")
	if got := contents(r, "other"); !cmp.Equal(got, want) {
		t.Errorf("the other container: %s", cmp.Diff(want, got))
	}

	snap := must[Snapshot](t)(s.Snapshot(ctx, "web", SnapshotOptions{Name: "one", Labels: map[string]string{"k": "v"}}))
	if snap.Level != LevelFileSystem || snap.UsedBytes != 0 {
		t.Errorf("snapshot %+v", snap)
	}
	r.mounted("web", func(dir string) { write(t, dir, "new/file", "after") })

	var tarball bytes.Buffer
	level := must[Level](t)(s.Diff(ctx, "web", &tarball, DiffOptions{}))
	if level != LevelFileSystem {
		t.Errorf("diff is of level %s", level)
	}
	names := tarNames(t, &tarball)
	for _, n := range []string{"etc/os", "new/file", ".wh.big"} {
		if !strings.Contains(names, "\n"+n+"\n") {
			t.Errorf("diff lacks %s:%s", n, names)
		}
	}
	if strings.Contains(names, "etc/more\n") {
		t.Errorf("diff has what did not change:%s", names)
	}
	tarball.Reset()
	must[Level](t)(s.Diff(ctx, "web", &tarball, DiffOptions{Snapshot: "one"}))

	// An image made of it, and a container of that.
	cr := must[CommitResult](t)(s.Commit(ctx, "web", CommitOptions{Image: "app:2", Comment: "more"}))
	if len(cr.Image.Layers) != 3 || !bytes.Contains(cr.Image.Config, []byte(`"x":"kept"`)) || !bytes.Contains(cr.Image.Config, []byte("mica commit")) {
		t.Errorf("committed image %+v", cr.Image)
	}
	create(t, s, "third", "app:2")
	after := map[string]string{"etc/os": "changed", "etc/more": "2", "new/file": "after"}
	if got := contents(r, "third"); !cmp.Equal(got, after) {
		t.Errorf("container of the committed image: %s", cmp.Diff(after, got))
	}

	got := must[Container](t)(s.Rollback(ctx, "web", "one"))
	if got.Device == c.Device || got.ID != c.ID || got.UsedBytes != 0 {
		t.Errorf("rolled back: %+v", got)
	}
	if got := contents(r, "web"); !cmp.Equal(got, changed) {
		t.Errorf("after the rollback: %s", cmp.Diff(changed, got))
	}

	f := must[ForkResult](t)(s.Fork(ctx, "web", ForkOptions{Names: []string{"f1", "f2", "f3"}}))
	if len(f.Containers) != 3 || f.Level != LevelFileSystem {
		t.Errorf("fork %+v", f)
	}
	if got := contents(r, "f3"); !cmp.Equal(got, changed) {
		t.Errorf("fork: %s", cmp.Diff(changed, got))
	}

	df := must[DF](t)(s.DF(ctx))
	if len(df.Entries) != 1+3+6+1 {
		t.Errorf("df has %d entries: %+v", len(df.Entries), df.Entries)
	}
	st := must[Status](t)(s.Status(ctx))
	if st.Containers != 6 || st.Images != 2 || st.Layers != 3 || st.Snapshots != 1 || st.Attached != 0 || len(st.Foreign) != 0 || len(st.Broken) != 0 {
		t.Errorf("status %+v", st)
	}

	// Everything goes, and the usage is where it was.
	wantErr(t, s.Remove(ctx, "web", RemoveOptions{}), ErrInUse, "1 snapshots")
	for _, n := range []string{"other", "third", "f1", "f2", "f3"} {
		ok(t, s.Remove(ctx, n, RemoveOptions{}))
	}
	ok(t, s.Remove(ctx, "web", RemoveOptions{Snapshots: true}))
	ok(t, s.RemoveImage(ctx, "app:2"))
	if n := r.used(); n != empty {
		t.Errorf("pool uses %d blocks, want %d as before", n, empty)
	}
	ok(t, s.RemoveImage(ctx, "app:1"))
	n := r.used()
	base := must[DF](t)(s.DF(ctx))
	if len(base.Entries) != 1 || int64(n)*s.block != base.Entries[0].UsedBytes {
		t.Errorf("pool uses %d blocks, want those of the base alone: %+v", n, base.Entries)
	}
	t.Logf("the base: %d KiB", base.Entries[0].UsedBytes>>10)
	if most := map[string]int64{"ext4": 1 << 20, "xfs": 3 << 20}[fs]; base.Entries[0].UsedBytes > most {
		t.Errorf("the base uses %d bytes, want %d at most: its journal or log is no hole", base.Entries[0].UsedBytes, most)
	}
	s = r.reopen()
	if st := must[Status](t)(s.Status(ctx)); st.Reserved != 0 || len(st.Foreign) != 0 || st.ReadOnly != "" {
		t.Errorf("status after a restart: %+v", st)
	}
}

func tarNames(t testing.TB, r io.Reader) string {
	t.Helper()
	names := "\n"
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return names
		}
		ok(t, err)
		names += h.Name + "\n"
	}
}

// A diff applied on the parent gives the container's tree, and has the digest of the commit.
func TestDiffIsTheCommit(t *testing.T) { eachFS(t, testDiffIsTheCommit) }

func testDiffIsTheCommit(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s := r.open()
	ctx := tctx(t)
	img := importImage(t, s, "a", []file{{name: "x/1", data: "1"}, {name: "x/2", data: "2"}, {name: "y", data: strings.Repeat("y", 200000)}})
	create(t, s, "c", "a")
	r.mounted("c", func(dir string) {
		ok(t, os.RemoveAll(dir+"/x"))
		write(t, dir, "x/3", "3")
		ok(t, os.Link(dir+"/y", dir+"/z"))
		ok(t, os.Symlink("y", dir+"/link"))
	})
	want := contents(r, "c")
	var buf bytes.Buffer
	must[Level](t)(s.Diff(ctx, "c", &buf, DiffOptions{}))
	cr := must[CommitResult](t)(s.Commit(ctx, "c", CommitOptions{Image: "b"}))
	sum := &summing{r: bytes.NewReader(buf.Bytes()), h: sha256.New()}
	io.Copy(io.Discard, sum)
	l := must[Layer](t)(s.Layer(ctx, cr.Image.ChainID))
	if l.DiffID != sum.digest() {
		t.Errorf("layer has diff id %s, the diff %s", l.DiffID, sum.digest())
	}
	// The same again is the same layer.
	again := must[CommitResult](t)(s.Commit(ctx, "c", CommitOptions{Image: "b2"}))
	if again.Image.ChainID != cr.Image.ChainID {
		t.Errorf("a second commit made layer %s, the first %s", again.Image.ChainID, cr.Image.ChainID)
	}
	im := must[Import](t)(s.BeginImport(ctx))
	chain := chainOf(img.ChainID, sum.digest())
	if chain != cr.Image.ChainID {
		t.Errorf("chain id %s, want %s", cr.Image.ChainID, chain)
	}
	ok(t, im.Abort(ctx))
	for _, n := range []string{"b", "b2"} {
		ok(t, s.RemoveImage(ctx, n))
	}
	im = must[Import](t)(s.BeginImport(ctx))
	_, err := im.ApplyLayer(ctx, LayerSpec{ParentChain: img.ChainID, ChainID: chain, DiffID: sum.digest()}, &buf)
	ok(t, err)
	_, err = im.Commit(ctx, ImageSpec{Name: "b", ChainID: chain, Config: []byte("{}")})
	ok(t, err)
	create(t, s, "d", "b")
	if got := contents(r, "d"); !cmp.Equal(got, want) {
		t.Errorf("applied diff: %s", cmp.Diff(want, got))
	}
}

// Nothing of a layer or image that fails is visible, and nothing stays.
func TestImportFailures(t *testing.T) {
	r := newRig(t)
	s := r.open()
	ctx := tctx(t)
	importImage(t, s, "base", []file{{name: "a", data: "a"}})
	before := r.used()
	tarball, diff := layerTar(t, file{name: "b", data: strings.Repeat("b", 100000)})
	wrong := "sha256:" + strings.Repeat("0", 64)
	ours := errors.New("reader failed")
	escape, escapeID := layerTar(t, file{name: "../b", data: "x"})
	for _, tc := range []struct {
		name  string
		spec  LayerSpec
		r     io.Reader
		want  error
		words string
	}{
		{"digest", LayerSpec{ChainID: wrong, DiffID: wrong}, bytes.NewReader(tarball), ErrDigest, diff},
		{"reader", LayerSpec{ChainID: diff, DiffID: diff}, io.MultiReader(bytes.NewReader(tarball[:50000]), errReader{ours}), ours, ""},
		{"late reader", LayerSpec{ChainID: diff, DiffID: diff}, io.MultiReader(bytes.NewReader(tarball), errReader{ours}), ours, ""},
		{"escape", LayerSpec{ChainID: escapeID, DiffID: escapeID}, bytes.NewReader(escape), nil, "../b"},
		{"cut", LayerSpec{ChainID: diff, DiffID: diff}, bytes.NewReader(tarball[:60000]), io.ErrUnexpectedEOF, ""},
		{"parent", LayerSpec{ParentChain: wrong, ChainID: diff, DiffID: diff}, bytes.NewReader(tarball), ErrNotFound, "parent"},
		{"name", LayerSpec{ChainID: "sha256:zz"}, bytes.NewReader(tarball), ErrInvalid, "zz"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			im := must[Import](t)(s.BeginImport(ctx))
			_, err := im.ApplyLayer(ctx, tc.spec, tc.r)
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("error %v, want %v %q", err, tc.want, tc.words)
			}
			ok(t, im.Abort(ctx))
			if l := must[[]Layer](t)(s.Layers(ctx)); len(l) != 1 {
				t.Errorf("%d layers, want 1", len(l))
			}
		})
	}
	t.Run("cancel", func(t *testing.T) {
		im := must[Import](t)(s.BeginImport(ctx))
		cctx, cancel := context.WithCancel(ctx)
		pr, pw := io.Pipe()
		go func() { pw.Write(tarball[:1000]); cancel(); pw.CloseWithError(io.ErrClosedPipe) }()
		if _, err := im.ApplyLayer(cctx, LayerSpec{ChainID: diff, DiffID: diff}, pr); err == nil {
			t.Error("a cancelled layer was made")
		}
		ok(t, im.Abort(ctx))
	})
	if n := r.used(); n != before {
		t.Errorf("pool uses %d blocks, want %d", n, before)
	}
	// An import that is given up, or cut by a crash, leaves nothing; it can be repeated.
	for _, how := range []string{"abort", "restart"} {
		im := must[Import](t)(s.BeginImport(ctx))
		_, err := im.ApplyLayer(ctx, LayerSpec{ChainID: diff, DiffID: diff}, bytes.NewReader(tarball))
		ok(t, err)
		if how == "abort" {
			ok(t, im.Abort(ctx))
		} else {
			s = r.reopen()
		}
		if n := r.used(); n != before {
			t.Errorf("%s: pool uses %d blocks, want %d", how, n, before)
		}
		if l := must[[]Layer](t)(s.Layers(ctx)); len(l) != 1 {
			t.Errorf("%s: %d layers, want 1", how, len(l))
		}
	}
	importImage(t, s, "again", []file{{name: "b", data: strings.Repeat("b", 100000)}})
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// Names, sizes and labels that cannot be are refused before anything is done.
func TestInvalid(t *testing.T) {
	r := newRig(t)
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	for name, err := range map[string]error{
		"empty":  second(s.Create(ctx, CreateOptions{Name: "", Image: "a"})),
		"slash":  second(s.Create(ctx, CreateOptions{Name: "a/b", Image: "a"})),
		"dots":   second(s.Create(ctx, CreateOptions{Name: "..", Image: "a"})),
		"long":   second(s.Create(ctx, CreateOptions{Name: strings.Repeat("x", 129), Image: "a"})),
		"small":  second(s.Create(ctx, CreateOptions{Name: "d", Image: "a", SizeBytes: 1 << 30})),
		"odd":    second(s.Create(ctx, CreateOptions{Name: "d", Image: "a", SizeBytes: 4<<30 + 1})),
		"huge":   second(s.Create(ctx, CreateOptions{Name: "d", Image: "a", SizeBytes: 1 << 60})),
		"ttl":    second(s.Create(ctx, CreateOptions{Name: "d", Image: "a", TTL: -1})),
		"label":  second(s.Create(ctx, CreateOptions{Name: "d", Image: "a", Labels: map[string]string{"a=b": "c"}})),
		"shrink": first(s.Resize(ctx, "c", 1<<30)),
		"as":     first(s.Attach(ctx, "c", AttachOptions{As: "tape"})),
		"nbd":    first(s.Attach(ctx, "c", AttachOptions{As: AsNBD})),
		"fork":   first(s.Fork(ctx, "c", ForkOptions{Names: []string{"x", "x"}})),
		"self":   first(s.Fork(ctx, "c", ForkOptions{Names: []string{"c"}})),
		"image":  first(s.TagImage(ctx, "a", "/etc")),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	for name, err := range map[string]error{
		"image": second(s.Create(ctx, CreateOptions{Name: "d", Image: "none"})), "container": first(s.Container(ctx, "d")),
		"remove": s.Remove(ctx, "d", RemoveOptions{}), "snapshot": s.RemoveSnapshot(ctx, "c", "none"),
		"rollback": first(s.Rollback(ctx, "c", "none")), "tag": first(s.TagImage(ctx, "none", "b")),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
	}
	_, created, err := s.Create(ctx, CreateOptions{Name: "c", Image: "a"})
	if err != nil || created {
		t.Errorf("the same again: created %v, %v", created, err)
	}
	_, _, err = s.Create(ctx, CreateOptions{Name: "c", Image: "a", Labels: map[string]string{"x": "y"}})
	wantErr(t, err, ErrExists, `container "c" already exists, with labels [], not [x=y]`)
	_, _, err = s.Create(ctx, CreateOptions{Name: "c", Image: "b", SizeBytes: 8 << 30, TTL: time.Hour})
	wantErr(t, err, ErrExists, `with image "a", not "b"; made with the size of its image, not 8589934592 bytes; with time to live 0s, not 1h0m0s`)
	if strings.Contains(err.Error(), "labels") {
		t.Errorf("error %q is about labels, which are the same", err)
	}
	if n := len(must[[]Container](t)(s.Containers(ctx, Filter{}))); n != 1 {
		t.Errorf("%d containers, want 1", n)
	}
}

func first[T any](_ T, err error) error        { return err }
func second[T, U any](_ T, _ U, e error) error { return e }

// TestBaseTooSmall: mkfs.xfs makes nothing below 300 MiB, and the store says so at once. One that has a
// base takes no offence.
func TestBaseTooSmall(t *testing.T) {
	r := newRig(t)
	r.o.FSType, r.o.BaseSize = "xfs", 256<<20
	wantErr(t, r.tryOpen(), ErrInvalid, "268435456", "314572800", "xfs")
	r.o.FSType = "ext4"
	s := r.open()
	importImage(t, s, "a", []file{{name: "a", data: "a"}})
	r.o.FSType = "xfs"
	s = r.reopen()
	if c := create(t, s, "c", "a"); c.FSType != "ext4" {
		t.Errorf("a container on %s", c.FSType)
	}
}
