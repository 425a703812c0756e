package archive

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/layer/archive/treecmp"
	"mica/layer/internal/randtree"
)

// Real multi-layer images, made by umoci from trees with devices, attributes, hard links and
// setuid files that change at random, with whiteouts and opaque directories: the layers applied
// one after the other give the same tree as umoci unpack.
func TestSameTreeAsUmoci(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("umoci"); err != nil {
		t.Skip("SKIPPED: umoci is not installed")
	}
	seed := time.Now().UnixNano()
	if s := os.Getenv("MICA_SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	compared := 0
	for i := int64(0); compared < 4; i++ {
		if i == 40 {
			t.Fatalf("umoci can unpack its own layers of %d seeds of %d only", compared, i)
		}
		t.Run(fmt.Sprintf("seed=%d", seed+i), func(t *testing.T) {
			if compareWithUmoci(t, seed+i) {
				compared++
			}
		})
		if t.Failed() {
			return
		}
	}
}

// compareWithUmoci reports whether there was something to compare: where a directory has become a
// link in a ring, umoci lists what was in it as hidden, and cannot unpack that.
func compareWithUmoci(t *testing.T, seed int64) (compared bool) {
	dir := t.TempDir()
	image := filepath.Join(dir, "oci")
	ring := errors.New("a ring of links")
	defer func() {
		if v := recover(); v != nil && v != ring {
			panic(v)
		}
	}()
	umoci := func(args ...string) {
		t.Helper()
		out, err := exec.Command("umoci", args...).CombinedOutput()
		if err != nil && strings.Contains(string(out), "too many levels of symbolic links") {
			panic(ring)
		}
		if err != nil {
			t.Fatalf("umoci %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	umoci("init", "--layout", image)
	umoci("new", "--image", image+":t")
	rng := rand.New(rand.NewSource(seed))
	// Ordinary names: umoci's own manifest format does not round-trip all others.
	names := []string{"a", "b", "c", "d.x", "usr", "lib64", "with space", strings.Repeat("long", 20)}
	const rounds = 5
	for i := range rounds {
		bundle := filepath.Join(dir, fmt.Sprint("bundle", i))
		umoci("unpack", "--image", image+":t", bundle)
		root := filepath.Join(bundle, "rootfs")
		randtree.ChangeNamed(t, rng, root, 40, names)
		umoci("repack", "--image", image+":t", bundle)
	}
	// A directory that hides what was there, and one that is removed.
	extra := filepath.Join(dir, "extra")
	if err := os.MkdirAll(filepath.Join(extra, "sub"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(extra, "sub", "f"), []byte("opaque"), 0o4711); err != nil {
		t.Fatal(err)
	}
	umoci("insert", "--image", image+":t", extra, "/plain")
	umoci("insert", "--image", image+":t", "--opaque", filepath.Join(extra, "sub"), "/plain")
	umoci("insert", "--image", image+":t", extra, "/removed")
	umoci("insert", "--image", image+":t", "--whiteout", "/removed/sub/f")

	ref := filepath.Join(dir, "ref")
	umoci("unpack", "--image", image+":t", ref)
	got := filepath.Join(dir, "got")
	if err := os.Mkdir(got, 0o755); err != nil {
		t.Fatal(err)
	}
	layers := layoutLayers(t, image)
	if want := rounds + 4; len(layers) != want {
		t.Fatalf("%d layers, want %d", len(layers), want)
	}
	whiteouts := 0
	for _, path := range layers {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		var plain bytes.Buffer
		if _, err := plain.ReadFrom(z); err != nil {
			t.Fatal(err)
		}
		for _, name := range tarNames(t, plain.Bytes()) {
			if strings.Contains(name, whPrefix) {
				whiteouts++
			}
		}
		if _, err := Apply(context.Background(), got, &plain, ApplyOptions{}); err != nil {
			t.Fatalf("apply %s: %v", path, err)
		}
	}
	if whiteouts < 2 {
		t.Errorf("%d whiteouts in the layers, want some", whiteouts)
	}
	sameTrees(t, got, filepath.Join(ref, "rootfs"), treecmp.Options{})
	return true
}

// layoutLayers returns the files of the layers of an OCI layout with one image, lowest first.
func layoutLayers(t *testing.T, layout string) []string {
	t.Helper()
	type desc struct{ Digest string }
	var index struct{ Manifests []desc }
	var manifest struct{ Layers []desc }
	blob := func(d desc) string { return filepath.Join(layout, "blobs", strings.ReplaceAll(d.Digest, ":", "/")) }
	read := func(path string, v any) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	read(filepath.Join(layout, "index.json"), &index)
	read(blob(index.Manifests[0]), &manifest)
	var out []string
	for _, l := range manifest.Layers {
		out = append(out, blob(l))
	}
	return out
}
