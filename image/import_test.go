package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mica/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openBuilt(t testing.TB, b *builder) *Archive {
	t.Helper()
	a, err := Open(bg, b.finish().file(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func threeLayers(kind string) spec {
	return spec{platform: "linux/amd64", layers: []string{strings.Repeat("one", 5000), strings.Repeat("two", 7000), "three"}, kind: kind}
}

func TestImport(t *testing.T) {
	for _, kind := range []string{"", "gzip", "zstd"} {
		t.Run(orPlain(kind), func(t *testing.T) {
			s := newFakeStore()
			sp := threeLayers(kind)
			b := newBuilder(t)
			d := b.manifest(sp)
			a := openBuilt(t, b.add(d, "x:1"))
			got, err := Import(bg, s, a, ImportOptions{})
			if err != nil {
				t.Fatal(err)
			}
			im := s.images["x:1"]
			if len(got) != 1 || got[0].Name != "x:1" || got[0].NewLayers != 3 || got[0].Existed {
				t.Errorf("result %+v", got)
			}
			if im.Digest != string(d.Digest) || im.Platform != "linux/amd64" || !bytes.Equal(im.Config, a.Images()[0].RawConfig) {
				t.Errorf("image %+v", im)
			}
			for i, chain := range im.Layers {
				if want := layerTar(t, fmt.Sprint("file", i), sp.layers[i]); !bytes.Equal(s.layers[chain].tar, want) {
					t.Errorf("layer %d: %d bytes, want %d", i, len(s.layers[chain].tar), len(want))
				}
			}
			if s.left() != "3 layers, 1 images, 0 sessions" {
				t.Errorf("store: %s", s.left())
			}
			// Again: nothing is read.
			got, err = Import(bg, s, a, ImportOptions{})
			if err != nil || got[0].NewLayers != 0 || !got[0].Existed || s.applied != 3 {
				t.Errorf("again: %+v, %v, %d layers applied", got, err, s.applied)
			}
		})
	}
}

func TestImportNames(t *testing.T) {
	one, two := threeLayers(""), spec{platform: "linux/amd64", layers: []string{threeLayers("").layers[0], "other"}}
	build := func(t *testing.T) *Archive {
		b := newBuilder(t)
		d := b.manifest(one)
		return openBuilt(t, b.add(d, "x:1").add(d, "x:latest").add(b.manifest(two), "y:1"))
	}
	for _, c := range []struct {
		name string
		o    ImportOptions
		want string
		err  error
		text string
	}{
		{"all", ImportOptions{}, "x:1 x:latest y:1", nil, ""},
		{"selected", ImportOptions{Select: "x:latest"}, "x:latest", nil, ""},
		{"selected and named", ImportOptions{Select: "y:1", Name: "mine"}, "mine", nil, ""},
		{"one name for two", ImportOptions{Name: "mine"}, "", ErrInvalid, `one name, "mine", for 2 images ("x:1", "x:latest", "y:1")`},
		{"no such", ImportOptions{Select: "z"}, "", layer.ErrNotFound, `no image "z", only "x:1", "x:latest", "y:1"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newFakeStore()
			_, err := Import(bg, s, build(t), c.o)
			if !errors.Is(err, c.err) || (err != nil && !strings.Contains(err.Error(), c.text)) {
				t.Fatalf("error %v, want %v and %q", err, c.err, c.text)
			}
			var names []string
			for n := range s.images {
				names = append(names, n)
			}
			slices.Sort(names)
			if got := strings.Join(names, " "); got != c.want {
				t.Errorf("images %s, want %s", got, c.want)
			}
			if c.name == "all" && (s.applied != 4 || s.left() != "4 layers, 3 images, 0 sessions") {
				t.Errorf("%d layers applied, want 4; %s", s.applied, s.left())
			}
		})
	}
	t.Run("no name at all", func(t *testing.T) {
		b := newBuilder(t)
		a := openBuilt(t, b.add(b.manifest(one), ""))
		if _, err := Import(bg, newFakeStore(), a, ImportOptions{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "has no name in the archive") {
			t.Errorf("error %v", err)
		}
	})
}

func TestImportReplace(t *testing.T) {
	s := newFakeStore()
	b, c := newBuilder(t), newBuilder(t)
	first := openBuilt(t, b.add(b.manifest(threeLayers("")), "x"))
	second := openBuilt(t, c.add(c.manifest(spec{platform: "linux/amd64", layers: []string{"new"}}), "x"))
	if _, err := Import(bg, s, first, ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(bg, s, second, ImportOptions{}); !errors.Is(err, layer.ErrExists) || s.applied != 3 {
		t.Errorf("another image under the name: error %v, %d layers applied", err, s.applied)
	}
	if _, err := Import(bg, s, second, ImportOptions{Replace: true}); err != nil || s.left() != "1 layers, 1 images, 0 sessions" {
		t.Errorf("replace: error %v, %s", err, s.left())
	}
}

// After a failure of any kind nothing is left, and the import can be repeated.
func TestImportFailures(t *testing.T) {
	b := newBuilder(t)
	good := openBuilt(t, b.add(b.manifest(threeLayers("gzip")), "x:1").add(b.manifest(spec{platform: "linux/amd64", layers: []string{"y"}}), "y:1"))
	bad := newBuilder(t)
	m := bad.manifest(threeLayers("gzip"))
	for _, l := range good.Images()[0].Layers[2:] { // the top layer is another one under the same digest
		z := compressWith(t, "gzip", layerTar(t, "file2", "evil!"))
		if int64(len(z)) != l.Size {
			t.Fatalf("%d bytes, want %d: the size would be found first", len(z), l.Size)
		}
		bad.files["blobs/sha256/"+l.Digest.Encoded()] = z
	}
	broken := openBuilt(t, bad.add(m, "x:1"))
	for _, c := range []struct {
		name string
		a    *Archive
		prep func(s *fakeStore, cancel func())
		want error
		text string
	}{
		{"digest of the top layer", broken, func(*fakeStore, func()) {}, ErrDigest, `import "x:1": apply layer: layer 3 of 3: digest sha256:`},
		{"store full", good, func(s *fakeStore, _ func()) { s.failAfter = 18_000 }, nil, `import "x:1": layer 2 of 3: fake store: pool is full`},
		{"store full, and reads on", good, func(s *fakeStore, _ func()) { s.failAfter, s.straggle = 18_000, true }, nil, "fake store: pool is full"},
		{"last commit fails", good, func(s *fakeStore, _ func()) { s.failName = "y:1" }, nil, `import "y:1": fake store: commit fails`},
		{"cancelled in the first layer", good, func(s *fakeStore, cancel func()) {
			s.onRead = func(string, int64) { cancel() }
		}, context.Canceled, ""},
		{"cancelled in the last layer", good, func(s *fakeStore, cancel func()) {
			s.onApply = func(sp layer.LayerSpec) {
				if sp.ChainID == string(good.Images()[1].Layers[0].ChainID) {
					cancel()
				}
			}
		}, context.Canceled, ""},
		{"store that does not read to the end", good, func(s *fakeStore, _ func()) { s.lazy = true }, nil, "without reading it to its end"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(bg)
			defer cancel()
			s := newFakeStore()
			c.prep(s, cancel)
			_, err := Import(ctx, s, c.a, ImportOptions{})
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("error %v, want %v and %q", err, c.want, c.text)
			}
			if got := s.left(); got != "0 layers, 0 images, 0 sessions" {
				t.Errorf("left: %s", got)
			}
			s.failAfter, s.failName, s.onRead, s.onApply, s.lazy = 0, "", nil, nil, false
			if _, err := Import(bg, s, good, ImportOptions{}); err != nil {
				t.Errorf("again: %v", err)
			}
			if got := s.left(); got != "4 layers, 2 images, 0 sessions" {
				t.Errorf("after the second try: %s", got)
			}
		})
	}
}

// Imports of the same and of overlapping images at the same time make every layer once.
func TestImportConcurrently(t *testing.T) {
	s := newFakeStore()
	s.onRead = func(string, int64) { time.Sleep(100 * time.Microsecond) }
	var archives []*Archive
	for i := range 4 {
		b := newBuilder(t)
		sp := threeLayers("gzip")
		sp.layers = append(sp.layers, fmt.Sprint("top", i%2))
		archives = append(archives, openBuilt(t, b.add(b.manifest(sp), fmt.Sprint("x", i%2))))
	}
	var wg sync.WaitGroup
	fresh := make([]int, len(archives))
	for i, a := range archives {
		wg.Go(func() {
			got, err := Import(bg, s, a, ImportOptions{})
			if err != nil {
				t.Errorf("import %d: %v", i, err)
				return
			}
			fresh[i] = got[0].NewLayers
		})
	}
	wg.Wait()
	sum := 0
	for _, n := range fresh {
		sum += n
	}
	if s.applied != 5 || sum != 5 || s.left() != "5 layers, 2 images, 0 sessions" {
		t.Errorf("%d layers applied, %d reported as new, want 5; %s", s.applied, sum, s.left())
	}
}

// One archive may be imported into two stores at once: layers are independent readers.
func TestOneArchiveTwoStores(t *testing.T) {
	b := newBuilder(t)
	a := openBuilt(t, b.add(b.manifest(threeLayers("zstd")), "x"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s := newFakeStore()
			if _, err := Import(bg, s, a, ImportOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestImportProgress(t *testing.T) {
	s := newFakeStore()
	s.onRead = func(string, int64) { time.Sleep(60 * time.Millisecond) }
	b := newBuilder(t)
	a := openBuilt(t, b.add(b.manifest(threeLayers("")), "x"))
	var states []string
	between := 0
	last := Progress{}
	report := func(p Progress) {
		if p.State == StateApplying && p.Stored > 0 {
			between++
			return
		}
		if p.Layers != 3 || p.Image != "x" || p.Stored > p.Size || p.DiffID != string(a.Images()[0].Layers[p.Layer-1].DiffID) {
			t.Errorf("progress %+v", p)
		}
		states = append(states, fmt.Sprint(p.Layer, " ", p.State))
		last = p
	}
	if _, err := Import(bg, s, a, ImportOptions{Progress: report}); err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(states, ", "), "1 applying, 1 done, 2 applying, 2 done, 3 applying, 3 done"; got != want {
		t.Errorf("states %s, want %s", got, want)
	}
	if between == 0 || last.Stored != last.Size {
		t.Errorf("%d reports between, last %+v", between, last)
	}
	states = nil
	if _, err := Import(bg, s, a, ImportOptions{Progress: report}); err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(states, ", "), "1 exists, 2 exists, 3 exists"; got != want {
		t.Errorf("states %s, want %s", got, want)
	}
}

// Nothing remains open of an archive after Close.
func TestNoDescriptorsLeft(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	b := newBuilder(t)
	b.add(b.manifest(threeLayers("zstd")), "x").finish()
	dir, file := b.dir(), b.file()
	before := count()
	for range 5 {
		for _, p := range []string{dir, file} {
			a, err := Open(bg, p, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Import(bg, newFakeStore(), a, ImportOptions{}); err != nil {
				t.Fatal(err)
			}
			s := newFakeStore()
			s.failAfter = 1
			if _, err := Import(bg, s, a, ImportOptions{}); err == nil {
				t.Fatal("no error")
			}
			a.Close()
		}
		if _, err := OpenStream(bg, bytes.NewReader(b.tar()[:5000]), Options{}); err == nil {
			t.Fatal("no error")
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}
