package image

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"testing"
)

// fuzzSeeds are the manifests and indexes of good archives.
func fuzzSeeds(f *testing.F, want func(b []byte) bool) {
	b := newBuilder(f)
	b.add(b.nested(b.withPlatform(threeLayers("gzip")), b.withPlatform(spec{platform: "linux/arm/v7"})), "x").finish()
	for _, data := range b.files {
		if want(data) {
			f.Add(data)
		}
	}
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:","size":-1,"annotations":{}}]}`))
	f.Add([]byte(`{"schemaVersion":2,"config":{"size":9223372036854775807},"layers":null}`))
}

// FuzzManifest: any bytes as a manifest, a config and a docker manifest are an error or an
// image whose layers can be asked for; never a panic.
func FuzzManifest(f *testing.F) {
	fuzzSeeds(f, func(b []byte) bool {
		return bytes.Contains(b, []byte(`"layers"`)) || bytes.Contains(b, []byte(`"rootfs"`))
	})
	f.Add([]byte(`[{"Config":"x.json","RepoTags":["a",""],"Layers":["../x","/x","a/layer.tar"]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
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
	})
}

// FuzzIndex: any bytes as the top index and as a nested one.
func FuzzIndex(f *testing.F) {
	fuzzSeeds(f, func(b []byte) bool { return bytes.Contains(b, []byte(`"manifests"`)) })
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBuilder(t)
		b.manifest(threeLayers(""))
		b.files["index.json"] = data
		readAny(t, b)
		delete(b.files, "index.json")
		b.add(b.blob("application/vnd.oci.image.index.v1+json", data), "x").finish()
		readAny(t, b)
	})
}

// FuzzArchive: any bytes as the whole archive.
func FuzzArchive(f *testing.F) {
	b := newBuilder(f)
	f.Add(b.add(b.manifest(threeLayers("gzip")), "x").finish().tar())
	f.Add(dockerArchive(f, threeLayers("zstd"), "x").tar())
	f.Add(compressWith(f, "zstd", dockerArchive(f, threeLayers(""), "x").tar()))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := OpenStream(context.Background(), bytes.NewReader(data), Options{SpoolDir: "/dev/shm", MaxSpool: 1 << 22, MaxLayer: 1 << 22})
		if err != nil {
			return
		}
		readArchive(t, a)
	})
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
