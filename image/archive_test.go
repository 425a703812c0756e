package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var bg = context.Background()

// readLayers reads all layers of an image and returns their contents one after the other.
func readLayers(im Image) ([]string, error) {
	var out []string
	for _, l := range im.Layers {
		r, err := l.Open(bg)
		if err != nil {
			return out, err
		}
		b, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			return out, err
		}
		out = append(out, string(b))
	}
	return out, nil
}

// check opens an archive in every way and compares what is in it.
func (b *builder) check(want string, o Options) {
	b.t.Helper()
	b.finish()
	ways := map[string]func() (*Archive, error){
		"directory":  func() (*Archive, error) { return Open(bg, b.dir(), o) },
		"tar file":   func() (*Archive, error) { return Open(bg, b.file(), o) },
		"tar stream": func() (*Archive, error) { return OpenStream(bg, bytes.NewReader(b.tar()), o) },
		"gzip stream": func() (*Archive, error) {
			return OpenStream(bg, bytes.NewReader(compressWith(b.t, "gzip", b.tar())), o)
		},
		"zstd file": func() (*Archive, error) {
			p := filepath.Join(b.t.TempDir(), "a.tar.zst")
			if err := os.WriteFile(p, compressWith(b.t, "zstd", b.tar()), 0o644); err != nil {
				return nil, err
			}
			return Open(bg, p, o)
		},
	}
	for way, open := range ways {
		if o.SpoolDir == "" {
			o.SpoolDir = b.t.TempDir()
		}
		a, err := open()
		if err != nil {
			b.t.Errorf("%s: %v", way, err)
			continue
		}
		if got := describe(b.t, a); got != want {
			b.t.Errorf("%s: images\n%s\nwant\n%s", way, got, want)
		}
		if err := a.Close(); err != nil {
			b.t.Errorf("%s: close: %v", way, err)
		}
		if left, err := os.ReadDir(o.SpoolDir); err != nil || len(left) != 0 {
			b.t.Errorf("%s: left in the spool directory: %v, %v", way, left, err)
		}
	}
}

// describe prints the images of an archive: names platform command [file contents].
func describe(t testing.TB, a *Archive) string {
	t.Helper()
	var out []string
	for _, im := range a.Images() {
		layers, err := readLayers(im)
		if err != nil {
			t.Errorf("read layers: %v", err)
		}
		var bodies []string
		for _, l := range layers {
			bodies = append(bodies, strings.TrimRight(l[512:1024], "\x00"))
		}
		out = append(out, fmt.Sprint(im.Names, " ", im.Platform, " ", im.Config.Config.Cmd, " ", bodies))
	}
	return strings.Join(out, "\n")
}

func TestArchives(t *testing.T) {
	host := HostPlatform().String()
	two := spec{platform: "linux/amd64", layers: []string{"one", "two"}}
	arm := spec{platform: "linux/arm/v7", layers: []string{"one", "arm"}}
	arm6 := spec{platform: "linux/arm/v6", layers: []string{"arm6"}}
	for _, c := range []struct {
		name  string
		build func(b *builder)
		opts  Options
		want  string
	}{
		{"plain layers", func(b *builder) { b.add(b.manifest(two), "x:1") }, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"gzip layers", func(b *builder) { s := two; s.kind = "gzip"; b.add(b.manifest(s), "x:1") }, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"zstd layers", func(b *builder) { s := two; s.kind = "zstd"; b.add(b.manifest(s), "x:1") }, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"no name", func(b *builder) { b.add(b.manifest(two), "") }, Options{}, "[] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"no layers", func(b *builder) { b.add(b.manifest(spec{platform: "linux/amd64"}), "x") }, Options{}, "[x] linux/amd64 [/bin/linux/amd64] []"},
		{"two names", func(b *builder) { d := b.manifest(two); b.add(d, "x:1").add(d, "y:2") }, Options{}, "[x:1 y:2] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"two images", func(b *builder) { b.add(b.manifest(two), "x:1").add(b.manifest(arm), "y:2") }, Options{},
			"[x:1] linux/amd64 [/bin/linux/amd64] [one two]\n[y:2] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
		{"reference only", func(b *builder) {
			d := b.manifest(two)
			d.Annotations = map[string]string{annotationRef: "latest"}
			b.add(d, "")
		}, Options{}, "[latest] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"nested, host", func(b *builder) {
			s := two
			s.platform = host
			b.add(b.nested(b.withPlatform(arm6), b.withPlatform(s)), "x:1")
		}, Options{}, fmt.Sprintf("[x:1] %s [/bin/%s] [one two]", host, host)},
		{"nested, arm v7 asked", func(b *builder) {
			b.add(b.nested(b.withPlatform(two), b.withPlatform(arm6), b.withPlatform(arm)), "x:1")
		},
			Options{Platform: Platform{OS: "linux", Arch: "arm", Variant: "v7"}}, "[x:1] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
		{"nested, older arm will do", func(b *builder) { b.add(b.nested(b.withPlatform(two), b.withPlatform(arm6)), "x:1") },
			Options{Platform: Platform{OS: "linux", Arch: "arm", Variant: "v7"}}, "[x:1] linux/arm/v6 [/bin/linux/arm/v6] [arm6]"},
		{"nested twice", func(b *builder) { b.add(b.nested(b.nested(b.withPlatform(two)), b.withPlatform(arm)), "x:1") },
			Options{Platform: Platform{OS: "linux", Arch: "amd64"}}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"platform only in configs", func(b *builder) { b.add(b.nested(b.manifest(two), b.manifest(arm)), "x:1") },
			Options{Platform: Platform{OS: "linux", Arch: "arm"}}, "[x:1] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
		{"platforms in the top index", func(b *builder) { b.add(b.withPlatform(two), "x:1").add(b.withPlatform(arm), "x:1") },
			Options{Platform: Platform{OS: "linux", Arch: "arm"}}, "[x:1] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
		{"blobs of other platforms are not there", func(b *builder) {
			d := b.withPlatform(arm)
			delete(b.files, "blobs/sha256/"+d.Digest.Encoded())
			b.add(b.nested(b.withPlatform(two), d), "x:1")
		}, Options{Platform: Platform{OS: "linux", Arch: "amd64"}}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"attestations beside", func(b *builder) {
			d := b.blob(ocispec.MediaTypeImageManifest, []byte("{}"))
			d.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
			d.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
			b.add(b.nested(b.withPlatform(two), d), "x:1")
		}, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"something else beside", func(b *builder) {
			m := ocispec.Manifest{Config: b.blob("application/vnd.example.signature+json", []byte("{}")), Layers: []ocispec.Descriptor{}}
			m.SchemaVersion = 2
			b.add(b.manifest(two), "x:1").add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "sig")
		}, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"single foreign image without asking", func(b *builder) { b.add(b.manifest(arm), "x:1") }, Options{}, "[x:1] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
		{"docker media types", func(b *builder) {
			config, tars := two.config(b)
			m := ocispec.Manifest{MediaType: dockerManifest, Config: b.blob(dockerConfig, config)}
			m.SchemaVersion = 2
			m.Layers = []ocispec.Descriptor{b.blob(dockerLayer+"diff.tar.gzip", compressWith(b.t, "gzip", tars[0])), b.blob(dockerLayer+"diff.tar", tars[1])}
			b.add(b.blob(dockerManifest, b.json(m)), "x:1")
		}, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"docker save, new form", func(b *builder) {
			d := b.manifest(two)
			b.add(d, "")
			config, _ := two.config(b)
			b.files["manifest.json"] = b.json([]dockerImage{{Config: "blobs/sha256/" + digest.FromBytes(config).Encoded(), RepoTags: []string{"x:1", "x:2"}}})
		}, Options{}, "[x:1 x:2] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"docker save, old form", func(b *builder) { *b = *dockerArchive(b.t, two, "x:1", "y:1") }, Options{}, "[x:1 y:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"docker save, gzip layers", func(b *builder) { s := two; s.kind = "gzip"; *b = *dockerArchive(b.t, s, "x:1") }, Options{}, "[x:1] linux/amd64 [/bin/linux/amd64] [one two]"},
		{"docker save, platform asked", func(b *builder) { *b = *dockerArchive(b.t, arm, "x:1") },
			Options{Platform: Platform{OS: "linux", Arch: "arm"}}, "[x:1] linux/arm/v7 [/bin/linux/arm/v7] [one arm]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBuilder(t)
			c.build(b)
			if _, ok := b.files["oci-layout"]; !ok {
				b.files["index.json"] = nil // of no meaning without oci-layout
			}
			b.check(c.want, c.opts)
		})
	}
}

// In old docker save archives a layer that occurs twice is a link to the first.
func TestDockerLinkedLayers(t *testing.T) {
	b := newBuilder(t)
	lt := layerTar(t, "f", "same")
	config := b.json(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(lt), digest.FromBytes(lt)}}})
	name := digest.FromBytes(config).Encoded() + ".json"
	b.files = map[string][]byte{name: config, "a/layer.tar": lt,
		"manifest.json": b.json([]dockerImage{{Config: name, RepoTags: []string{"x"}, Layers: []string{"a/layer.tar", "b/layer.tar"}}}), "index.json": nil}
	b.links["b/layer.tar"] = "../a/layer.tar"
	b.check("[x] linux/amd64 [] [same same]", Options{})
}

func TestChainIDs(t *testing.T) {
	b := newBuilder(t)
	b.add(b.manifest(spec{platform: "linux/amd64", layers: []string{"one", "two"}}), "x").finish()
	a, err := Open(bg, b.file(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	l := a.Images()[0].Layers
	if l[0].ChainID != l[0].DiffID {
		t.Errorf("lowest chain id %s, want its diff id %s", l[0].ChainID, l[0].DiffID)
	}
	if want := digest.FromString(string(l[0].DiffID) + " " + string(l[1].DiffID)); l[1].ChainID != want {
		t.Errorf("chain id %s, want %s", l[1].ChainID, want)
	}
}

func TestPlatforms(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"linux/amd64", "linux/amd64"}, {"Linux/x86_64", "linux/amd64"}, {"linux/aarch64", "linux/arm64"}, {"linux/arm64/v8", "linux/arm64"},
		{"linux/arm", "linux/arm/v7"}, {"linux/armhf", "linux/arm/v7"}, {"linux/armel", "linux/arm/v6"}, {"linux/arm/6", "linux/arm/v6"},
		{"linux/amd64/v3", "linux/amd64/v3"}, {"linux/i686", "linux/386"}, {"linux/riscv64", "linux/riscv64"},
	} {
		p, err := ParsePlatform(c.in)
		if err != nil || p.String() != c.want {
			t.Errorf("%s: %v, %v, want %s", c.in, p, err, c.want)
		}
	}
	for _, in := range []string{"", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64", "linux/arm/v7/"} {
		if p, err := ParsePlatform(in); err == nil {
			t.Errorf("%q: %v, want an error", in, p)
		}
	}
}

func TestOpenSpoolsPipes(t *testing.T) {
	b := newBuilder(t)
	b.add(b.manifest(spec{platform: "linux/amd64", layers: []string{"one"}}), "x").finish()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		w.Write(b.tar())
		w.Close()
	}()
	a, err := Open(bg, fmt.Sprintf("/dev/fd/%d", r.Fd()), Options{SpoolDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if got, want := describe(t, a), "[x] linux/amd64 [/bin/linux/amd64] [one]"; got != want {
		t.Errorf("images %s, want %s", got, want)
	}
}

func TestOpenCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err := OpenStream(ctx, bytes.NewReader(make([]byte, 1<<20)), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}
