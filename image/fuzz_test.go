package image

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"slices"
	"testing"

	"mica/internal/mutate"
)

// jsonSeeds are the manifests and indexes of good archives.
func jsonSeeds(f testing.TB, want func(b []byte) bool) [][]byte {
	b := newBuilder(f)
	b.add(b.nested(b.withPlatform(threeLayers("gzip")), b.withPlatform(spec{platform: "linux/arm/v7"})), "x").finish()
	var out [][]byte
	for _, data := range b.files {
		if want(data) {
			out = append(out, data)
		}
	}
	slices.SortFunc(out, bytes.Compare)
	return append(out,
		[]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:","size":-1,"annotations":{}}]}`),
		[]byte(`{"schemaVersion":2,"config":{"size":9223372036854775807},"layers":null}`))
}

var jsonWords = []string{`"manifests":[`, `"layers":[`, `"config":{`, `"digest":"sha256:`, `"size":`, `"mediaType":`, `"rootfs":{"type":"layers","diff_ids":[`,
	`{},`, `[[[[`, `null`, `application/vnd.oci.image.index.v1+json`, `"platform":{"os":"linux","architecture":"`, `\u0000`, `../../x`}

// jsonBounds: a few hundred bytes for each value, of which there is at most one in two bytes.
func jsonBounds(inputs int) mutate.Options {
	return mutate.Options{Inputs: inputs, Words: jsonWords, AllocBase: 8 << 20, AllocPerByte: 2000}
}

// FuzzManifest: any bytes as a manifest, a config and a docker manifest are an error or an
// image whose layers can be asked for; never a panic.
func FuzzManifest(f *testing.F) { mutate.Fuzz(f, manifestSeeds(f), readManifest) }

// TestManifestMutated is FuzzManifest for a moment.
func TestManifestMutated(t *testing.T) {
	mutate.Test(t, "FuzzManifest", manifestSeeds(t), jsonBounds(1000), readManifest)
}

func manifestSeeds(f testing.TB) [][]byte {
	return append(jsonSeeds(f, func(b []byte) bool {
		return bytes.Contains(b, []byte(`"layers"`)) || bytes.Contains(b, []byte(`"rootfs"`))
	}), []byte(`[{"Config":"x.json","RepoTags":["a",""],"Layers":["../x","/x","a/layer.tar"]}]`))
}

func readManifest(t *testing.T, data []byte) {
	b := newBuilder(t)
	d := b.manifest(spec{platform: "linux/amd64", layers: []string{"one"}})
	b.add(b.blob(d.MediaType, data), "fuzzed").add(d, "good").finish()
	b.files["manifest.json"] = data
	readAny(t, b)
	delete(b.files, "oci-layout")
	readAny(t, b)
	im := Image{RawConfig: data}
	if im.parseConfig(1) == nil && len(im.Layers) != 1 {
		t.Errorf("%d layers, want 1", len(im.Layers))
	}
}

// FuzzIndex: any bytes as the top index and as a nested one.
func FuzzIndex(f *testing.F) { mutate.Fuzz(f, indexSeeds(f), readIndex) }

// TestIndexMutated is FuzzIndex for a moment.
func TestIndexMutated(t *testing.T) {
	mutate.Test(t, "FuzzIndex", indexSeeds(t), jsonBounds(1000), readIndex)
}

func indexSeeds(f testing.TB) [][]byte {
	return jsonSeeds(f, func(b []byte) bool { return bytes.Contains(b, []byte(`"manifests"`)) })
}

func readIndex(t *testing.T, data []byte) {
	b := newBuilder(t)
	b.manifest(threeLayers(""))
	b.files["index.json"] = data
	readAny(t, b)
	delete(b.files, "index.json")
	b.add(b.blob("application/vnd.oci.image.index.v1+json", data), "x").finish()
	readAny(t, b)
}

// FuzzArchive: any bytes as the whole archive.
func FuzzArchive(f *testing.F) { mutate.Fuzz(f, archiveSeeds(f), readStream) }

// TestArchiveMutated is FuzzArchive for a moment.
func TestArchiveMutated(t *testing.T) {
	mutate.Test(t, "FuzzArchive", archiveSeeds(t), mutate.Options{Inputs: 1000, Words: append(jsonWords, "ustar\x0000", "path=", "linkpath=")}, readStream)
}

func archiveSeeds(f testing.TB) [][]byte {
	b := newBuilder(f)
	return [][]byte{
		b.add(b.manifest(threeLayers("gzip")), "x").finish().tar(),
		dockerArchive(f, threeLayers("zstd"), "x").tar(),
		compressWith(f, "zstd", dockerArchive(f, threeLayers(""), "x").tar()),
	}
}

func readStream(t *testing.T, data []byte) {
	a, err := OpenStream(context.Background(), bytes.NewReader(data), Options{SpoolDir: "/dev/shm", MaxSpool: 1 << 22, MaxLayer: 1 << 22})
	if err != nil {
		return
	}
	readArchive(t, a)
}

// FuzzPlatform: what is taken reads back as itself.
func FuzzPlatform(f *testing.F) { mutate.Fuzz(f, platformSeeds, readPlatform) }

// TestPlatformMutated is FuzzPlatform for a moment.
func TestPlatformMutated(t *testing.T) {
	mutate.Test(t, "FuzzPlatform", platformSeeds, mutate.Options{Inputs: 3000, Words: []string{"linux/", "arm64", "/v8", "amd64", "/"}}, readPlatform)
}

var platformSeeds = [][]byte{[]byte("linux/amd64"), []byte("linux/arm/v7"), []byte("arm64"), []byte("linux/arm64/v8"), []byte("///"), nil}

func readPlatform(t *testing.T, b []byte) {
	p, err := ParsePlatform(string(b))
	if err != nil {
		return
	}
	again, err := ParsePlatform(p.String())
	if err != nil || again != p {
		t.Errorf("%q is %+v, which reads back as %+v, %v", b, p, again, err)
	}
}

// mapSource is an archive in memory.
type mapSource map[string][]byte

func (m mapSource) open(name string) (io.ReadCloser, int64, error) {
	b, ok := m[name]
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
}

func (m mapSource) Close() error { return nil }

func readAny(t *testing.T, b *builder) {
	a, err := load(context.Background(), mapSource(b.files), Options{MaxLayer: 1 << 20})
	if err == nil {
		readArchive(t, a)
	}
}

func readArchive(t *testing.T, a *Archive) {
	for _, im := range a.Images() {
		if len(im.Layers) != len(im.Config.RootFS.DiffIDs) {
			t.Errorf("%d layers, %d diff ids", len(im.Layers), len(im.Config.RootFS.DiffIDs))
		}
		for _, l := range im.Layers {
			r, err := l.Open(context.Background())
			if err != nil {
				continue
			}
			h := l.DiffID.Algorithm().Digester()
			if _, err := io.Copy(h.Hash(), r); err == nil && h.Digest() != l.DiffID {
				t.Errorf("a clean end of a layer with digest %s, want %s", h.Digest(), l.DiffID)
			}
			r.Close()
		}
	}
	a.Close()
}
