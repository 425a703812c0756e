package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layerTar makes a layer tar with one file.
func layerTar(t testing.TB, name, body string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(body)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compressWith(t testing.TB, kind string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	switch kind {
	case "gzip":
		w := gzip.NewWriter(&out)
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	case "zstd":
		w, err := zstd.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	default:
		return b
	}
	return out.Bytes()
}

// A builder makes archives file by file, so that tests can break each of them.
type builder struct {
	t     testing.TB
	files map[string][]byte
	links map[string]string
	index ocispec.Index
}

func newBuilder(t testing.TB) *builder {
	b := &builder{t: t, files: map[string][]byte{}, links: map[string]string{}}
	b.files["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	b.index.SchemaVersion = 2
	return b
}

func (b *builder) json(v any) []byte {
	b.t.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

func (b *builder) blob(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	b.files["blobs/sha256/"+d.Encoded()] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// spec describes an image to build.
type spec struct {
	platform string
	layers   []string // contents of one file each
	kind     string   // compression
}

func (s spec) config(b *builder) ([]byte, [][]byte) {
	p, err := ParsePlatform(s.platform)
	if err != nil {
		b.t.Fatal(err)
	}
	c := ocispec.Image{Platform: ocispec.Platform{OS: p.OS, Architecture: p.Arch, Variant: p.Variant}}
	c.Config.Cmd = []string{"/bin/" + s.platform}
	c.RootFS.Type = "layers"
	var tars [][]byte
	for i, body := range s.layers {
		lt := layerTar(b.t, fmt.Sprint("file", i), body)
		tars = append(tars, lt)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(lt))
	}
	return b.json(c), tars
}

// manifest adds an image's blobs and returns the descriptor of its manifest.
func (b *builder) manifest(s spec) ocispec.Descriptor {
	config, tars := s.config(b)
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config)}
	m.SchemaVersion = 2
	mt := ocispec.MediaTypeImageLayer
	if s.kind != "" {
		mt += "+" + s.kind
	}
	for _, lt := range tars {
		m.Layers = append(m.Layers, b.blob(mt, compressWith(b.t, s.kind, lt)))
	}
	return b.blob(ocispec.MediaTypeImageManifest, b.json(m))
}

func platformPtr(t testing.TB, s string) *ocispec.Platform {
	p, err := ParsePlatform(s)
	if err != nil {
		t.Fatal(err)
	}
	return &ocispec.Platform{OS: p.OS, Architecture: p.Arch, Variant: p.Variant}
}

// nested adds an index of the images, each with its platform.
func (b *builder) nested(descs ...ocispec.Descriptor) ocispec.Descriptor {
	ix := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: descs}
	ix.SchemaVersion = 2
	return b.blob(ocispec.MediaTypeImageIndex, b.json(ix))
}

func (b *builder) withPlatform(s spec) ocispec.Descriptor {
	d := b.manifest(s)
	d.Platform = platformPtr(b.t, s.platform)
	return d
}

// add puts a descriptor into the top index.
func (b *builder) add(d ocispec.Descriptor, name string) *builder {
	if name != "" {
		d.Annotations = map[string]string{annotationName: name}
	}
	b.index.Manifests = append(b.index.Manifests, d)
	return b
}

// finish writes the index, unless a test wrote one.
func (b *builder) finish() *builder {
	if _, ok := b.files["index.json"]; !ok {
		b.files["index.json"] = b.json(b.index)
	}
	return b
}

func (b *builder) names() []string {
	var names []string
	for n := range b.files {
		names = append(names, n)
	}
	for n := range b.links {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// tar makes the archive as a tar.
func (b *builder) tar() []byte {
	b.t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, n := range b.names() {
		h := &tar.Header{Name: n, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(b.files[n]))}
		if l, ok := b.links[n]; ok {
			h.Typeflag, h.Linkname = tar.TypeSymlink, l
		}
		if err := w.WriteHeader(h); err != nil {
			b.t.Fatal(err)
		}
		if _, err := w.Write(b.files[n]); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}

// dir makes the archive as a directory.
func (b *builder) dir() string {
	b.t.Helper()
	dir := b.t.TempDir()
	for _, n := range b.names() {
		p := filepath.Join(dir, n)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			b.t.Fatal(err)
		}
		if l, ok := b.links[n]; ok {
			if err := os.Symlink(l, p); err != nil {
				b.t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(p, b.files[n], 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	return dir
}

// file makes the archive as a tar file.
func (b *builder) file() string {
	b.t.Helper()
	p := filepath.Join(b.t.TempDir(), "image.tar")
	if err := os.WriteFile(p, b.tar(), 0o644); err != nil {
		b.t.Fatal(err)
	}
	return p
}

// docker makes a docker save archive of the old form.
func dockerArchive(t testing.TB, s spec, names ...string) *builder {
	b := &builder{t: t, files: map[string][]byte{}, links: map[string]string{}}
	config, tars := s.config(b)
	im := dockerImage{Config: digest.FromBytes(config).Encoded() + ".json", RepoTags: names}
	b.files[im.Config] = config
	seen := map[string]string{}
	for i, lt := range tars {
		id := strings.Repeat(fmt.Sprintf("%02x", i+1), 32)
		name := id + "/layer.tar"
		d := digest.FromBytes(lt).Encoded()
		if first, ok := seen[d]; ok {
			b.links[name] = "../" + first
		} else {
			b.files[name] = compressWith(t, s.kind, lt)
			seen[d] = name
		}
		im.Layers = append(im.Layers, name)
	}
	b.files["manifest.json"] = b.json([]dockerImage{im})
	return b
}
