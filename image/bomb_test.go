package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// costOf runs fn and returns what it allocated, in bytes, and how long it took.
func costOf(fn func()) (int64, time.Duration) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin := time.Now()
	fn()
	took := time.Since(begin)
	runtime.ReadMemStats(&after)
	return int64(after.TotalAlloc - before.TotalAlloc), took
}

// TestListsOfNothing: a file of 8 MiB that is a list of next to nothing would be gigabytes of Go
// values. It is refused at a few times its size.
func TestListsOfNothing(t *testing.T) {
	fill := func(unit string) string { return strings.Repeat(unit+",", (8<<20-2000)/(len(unit)+1)) + unit }
	good := newBuilder(t)
	config, _ := spec{platform: "linux/amd64", layers: []string{"one"}}.config(good)
	for name, c := range map[string]func(b *builder){
		"index":            func(b *builder) { b.files["index.json"] = []byte(`{"manifests":[` + fill("{}") + `]}`) },
		"index of numbers": func(b *builder) { b.files["index.json"] = []byte(`{"manifests":[` + fill("0") + `]}`) },
		"nested index": func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageIndex, []byte(`{"manifests":[`+fill("{}")+`]}`)), "x").finish()
		},
		"manifest": func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{},"layers":[`+fill("{}")+`]}`)), "x").finish()
		},
		"config": func(b *builder) {
			m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
				Config: b.blob(ocispec.MediaTypeImageConfig, []byte(`{"history":[`+fill("{}")+`],`+string(config[1:])))}
			m.SchemaVersion = 2
			b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x").finish()
		},
		"docker manifest": func(b *builder) {
			delete(b.files, "oci-layout")
			b.files["manifest.json"] = []byte(`[` + fill("{}") + `]`)
		},
		"open brackets": func(b *builder) { b.files["index.json"] = bytes.Repeat([]byte("["), 8<<20-1) },
		"open braces":   func(b *builder) { b.files["index.json"] = bytes.Repeat([]byte(`{"a":`), (8<<20-1)/5) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(t)
			c(b)
			src := mapSource(b.files)
			var err error
			bytes, took := costOf(func() {
				var a *Archive
				if a, err = load(context.Background(), src, Options{}); err == nil {
					a.Close()
				}
			})
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "values, at most 200000") {
				t.Errorf("error %v, want %v", err, ErrLimit)
			}
			if bytes > 64<<20 {
				t.Errorf("%d bytes allocated, in %v", bytes, took)
			}
		})
	}
}

// TestIndexesThatMeetAgain: indexes that name the next one a thousand times are few bytes and would
// be read a thousand times a thousand times. The files read count each time.
func TestIndexesThatMeetAgain(t *testing.T) {
	b := newBuilder(t)
	// The lowest has nothing in it that counts as a manifest.
	d := b.blob(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[]}`))
	for range 3 {
		var index ocispec.Index
		index.SchemaVersion = 2
		for range 1000 {
			index.Manifests = append(index.Manifests, d)
		}
		d = b.blob(ocispec.MediaTypeImageIndex, b.json(index))
	}
	b.add(d, "x").finish()
	reads := &countingSource{source: mapSource(b.files)}
	a, err := load(context.Background(), reads, Options{})
	if err == nil {
		a.Close()
	}
	if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "indexes, manifests and configs of more than") {
		t.Errorf("error %v, want %v", err, ErrLimit)
	}
	if reads.n > 200_000 {
		t.Errorf("%d reads", reads.n)
	}
	// And it can be stopped.
	ctx, cancel := context.WithCancel(context.Background())
	stop := &countingSource{source: mapSource(b.files), at: 50, then: cancel}
	if _, err := load(ctx, stop, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if stop.n > 60 {
		t.Errorf("%d reads after a cancel at 50", stop.n)
	}
}

type countingSource struct {
	source
	n, at int
	then  func()
}

func (c *countingSource) open(name string) (r io.ReadCloser, size int64, err error) {
	if c.n++; c.n == c.at {
		c.then()
	}
	return c.source.open(name)
}

// TestManyLargeConfigs: thousands of images with a config of MiBs each do not stay in memory.
func TestManyLargeConfigs(t *testing.T) {
	b := newBuilder(t)
	big := strings.Repeat(" ", 1<<20)
	for i := range 100 {
		config := []byte(fmt.Sprintf(`{"os":"linux","architecture":"amd64","author":"%d","rootfs":{"type":"layers","diff_ids":[]}%s}`, i, big))
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config)}
		m.SchemaVersion = 2
		b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), fmt.Sprint("x", i))
	}
	b.finish()
	src := mapSource(b.files)
	var err error
	bytes, _ := costOf(func() { _, err = load(context.Background(), src, Options{}) })
	if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "more than 67108864 bytes together") {
		t.Errorf("error %v, want %v", err, ErrLimit)
	}
	if bytes > 200<<20 {
		t.Errorf("%d bytes allocated", bytes)
	}
}

// TestFilesThatAreSomethingElse: an image whose parts are each other.
func TestFilesThatAreSomethingElse(t *testing.T) {
	s := spec{platform: "linux/amd64", layers: []string{"one"}}
	for name, build := range map[string]func(b *builder){
		"a layer that is the config": func(b *builder) {
			config, _ := s.config(b)
			m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config)}
			m.SchemaVersion = 2
			m.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: m.Config.Digest, Size: m.Config.Size}}
			b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x").finish()
		},
		"a config that is an index": func(b *builder) {
			index := b.json(ocispec.Index{Manifests: []ocispec.Descriptor{b.manifest(s)}})
			m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, index), Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer}}}
			m.SchemaVersion = 2
			b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x").finish()
		},
		"a manifest that is a layer": func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageManifest, layerTar(b.t, "f", "x")), "x").finish()
		},
		"a manifest called an index": func(b *builder) {
			d := b.manifest(s)
			d.MediaType = ocispec.MediaTypeImageIndex
			b.add(d, "x").finish()
		},
		"an index called a manifest": func(b *builder) {
			d := b.nested(b.withPlatform(s))
			d.MediaType = ocispec.MediaTypeImageManifest
			b.add(d, "x").finish()
		},
		"the index in itself, by a lie about its digest": func(b *builder) {
			b.finish()
			b.files["index.json"] = b.json(ocispec.Index{Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(b.files["index.json"]), Size: int64(len(b.files["index.json"]))}}})
			b.files["blobs/sha256/"+digest.FromBytes(b.files["index.json"]).Encoded()] = b.files["index.json"]
		},
		"docker: the list as config": func(b *builder) {
			b.files = map[string][]byte{"manifest.json": []byte(`[{"Config":"manifest.json","Layers":[]}]`)}
		},
		"docker: the list as a layer": func(b *builder) {
			*b = *dockerArchive(b.t, s, "x")
			list := b.files["manifest.json"]
			b.files["manifest.json"] = bytes.Replace(list, []byte(strings.Repeat("01", 32)+"/layer.tar"), []byte("manifest.json"), 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(t)
			build(b)
			for _, way := range []string{b.dir(), b.file()} {
				if err := openAndRead(way, Options{}); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrDigest) {
					t.Errorf("%s: error %v", way, err)
				}
			}
		})
	}
}

// TestOuterNames: names in the outer archive are bounded, each and together.
func TestOuterNames(t *testing.T) {
	write := func(fn func(w *tar.Writer)) io.Reader {
		r, pipe := io.Pipe()
		go func() {
			w := tar.NewWriter(pipe)
			fn(w)
			pipe.CloseWithError(w.Close())
		}()
		t.Cleanup(func() { r.Close() })
		return r
	}
	for name, c := range map[string]struct {
		r    io.Reader
		want string
	}{
		"one of 600 KB": {write(func(w *tar.Writer) {
			w.WriteHeader(&tar.Header{Name: strings.Repeat("n/", 299_999) + "nn", Typeflag: tar.TypeReg})
		}), "name of 600000 bytes, at most 4095"},
		"a link to 600 KB": {write(func(w *tar.Writer) {
			w.WriteHeader(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("n/", 300_000)})
		}), "link target of 600000 bytes, at most 4095"},
		"many of 4 KB": {write(func(w *tar.Writer) {
			for i := range 10_000 {
				if w.WriteHeader(&tar.Header{Name: strings.Repeat("n/", 2000) + fmt.Sprint(i), Typeflag: tar.TypeReg}) != nil {
					return
				}
			}
		}), "names of more than 16777216 bytes together"},
		"many": {write(func(w *tar.Writer) {
			for i := range 200_001 {
				if w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Typeflag: tar.TypeReg}) != nil {
					return
				}
			}
		}), "archive of more than 200000 files"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := OpenStream(context.Background(), c.r, Options{SpoolDir: "/dev/shm"})
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestRatio: a stream that unpacks to a thousand times its size is ended there, whole archive or
// layer; so is one packed twice, which is no tar.
func TestRatio(t *testing.T) {
	o := Options{MaxRatio: 1000, RatioFree: 1 << 20, SpoolDir: "/dev/shm"}
	zeros := make([]byte, 64<<20)
	t.Run("archive", func(t *testing.T) {
		for _, kind := range []string{"gzip", "zstd"} {
			bomb := compressWith(t, kind, zeros)
			_, err := OpenStream(context.Background(), bytes.NewReader(bomb), o)
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "at most 1000 times as many") {
				t.Errorf("%s of %d bytes: error %v", kind, len(bomb), err)
			}
		}
	})
	layer := func(mediaType string, blob []byte) *builder {
		b := newBuilder(t)
		config, _ := spec{platform: "linux/amd64", layers: []string{"one"}}.config(b)
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{b.blob(mediaType, blob)}}
		m.SchemaVersion = 2
		return b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x").finish()
	}
	t.Run("layer", func(t *testing.T) {
		for kind, mediaType := range map[string]string{"gzip": ocispec.MediaTypeImageLayerGzip, "zstd": ocispec.MediaTypeImageLayerZstd} {
			err := openAndRead(layer(mediaType, compressWith(t, kind, zeros)).file(), o)
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "layer 1 of 1: ") || !strings.Contains(err.Error(), "at most 1000 times as many") {
				t.Errorf("%s: error %v", kind, err)
			}
		}
	})
	t.Run("packed twice", func(t *testing.T) {
		twice := compressWith(t, "gzip", compressWith(t, "gzip", zeros))
		if err := openAndRead(layer(ocispec.MediaTypeImageLayerGzip, twice).file(), o); !errors.Is(err, ErrDigest) {
			t.Errorf("a layer: error %v", err)
		}
		if _, err := OpenStream(context.Background(), bytes.NewReader(twice), o); !errors.Is(err, ErrInvalid) {
			t.Errorf("an archive: error %v", err)
		}
	})
	t.Run("many members", func(t *testing.T) { // gzip and zstd streams may follow each other
		var z bytes.Buffer
		for range 3000 {
			w := gzip.NewWriter(&z)
			w.Close()
		}
		if err := openAndRead(layer(ocispec.MediaTypeImageLayerGzip, z.Bytes()).file(), o); !errors.Is(err, ErrDigest) {
			t.Errorf("gzip: error %v", err)
		}
	})
	t.Run("memory for a window", func(t *testing.T) {
		var z bytes.Buffer
		w, err := zstd.NewWriter(&z, zstd.WithWindowSize(256<<20))
		if err != nil {
			t.Fatal(err)
		}
		w.Write(make([]byte, 1<<20))
		w.Flush() // so that the size is not known, and the window counts
		w.Close()
		n, _ := costOf(func() { err = openAndRead(layer(ocispec.MediaTypeImageLayerZstd, z.Bytes()).file(), o) })
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), zstd.ErrWindowSizeExceeded.Error()) {
			t.Errorf("error %v after %d bytes", err, n)
		}
	})
}

// TestLongConfig is kept as it is, up to its limit.
func TestLongConfig(t *testing.T) {
	for size, want := range map[int]error{8<<20 - 1: nil, 8<<20 + 1: ErrLimit} {
		b := newBuilder(t)
		config := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]},"author":"`)
		config = append(append(config, bytes.Repeat([]byte("x"), size-len(config)-2)...), `"}`...)
		if !json.Valid(config) || len(config) != size {
			t.Fatal("the test's config is broken")
		}
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config)}
		m.SchemaVersion = 2
		b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x").finish()
		a, err := load(context.Background(), mapSource(b.files), Options{})
		if !errors.Is(err, want) {
			t.Errorf("config of %d bytes: %v, want %v", size, err, want)
		}
		if err == nil && !bytes.Equal(a.Images()[0].RawConfig, config) {
			t.Errorf("config of %d bytes: not the one in the archive", size)
		}
	}
}
