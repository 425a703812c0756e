package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Broken archives: each a clear error that names the thing, at Open or at the latest when its
// layers are read.
func TestBrokenArchives(t *testing.T) {
	good := spec{platform: "linux/amd64", layers: []string{"one", "two"}, kind: "gzip"}
	manifestOf := func(b *builder, change func(m *ocispec.Manifest)) {
		config, tars := good.config(b)
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: b.blob(ocispec.MediaTypeImageConfig, config)}
		m.SchemaVersion = 2
		for _, lt := range tars {
			m.Layers = append(m.Layers, b.blob(ocispec.MediaTypeImageLayerGzip, compressWith(b.t, "gzip", lt)))
		}
		change(&m)
		b.add(b.blob(ocispec.MediaTypeImageManifest, b.json(m)), "x")
	}
	file := func(d ocispec.Descriptor) string { return "blobs/sha256/" + d.Digest.Encoded() }
	for _, c := range []struct {
		name  string
		build func(b *builder)
		kind  error
		want  string // in the message
	}{
		{"nothing", func(b *builder) { b.files = map[string][]byte{"readme": nil} }, ErrInvalid, "neither oci-layout (an OCI image layout) nor manifest.json (a docker save archive) is in it"},
		{"no index", func(b *builder) { b.finish(); delete(b.files, "index.json") }, ErrInvalid, "index.json is missing"},
		{"layout version", func(b *builder) { b.files["oci-layout"] = []byte(`{"imageLayoutVersion":"2.0.0"}`) }, ErrInvalid, `layout version "2.0.0"`},
		{"index is not JSON", func(b *builder) { b.files["index.json"] = []byte("{") }, ErrInvalid, "index.json of 1 bytes"},
		{"index of nothing", func(b *builder) { b.files["index.json"] = []byte(`{"schemaVersion":2,"manifests":[]}`) }, ErrInvalid, "index.json lists no image"},
		{"index that is a manifest", func(b *builder) { b.files["index.json"] = []byte(`{"manifests":[],"layers":[]}`) }, ErrInvalid, "index.json is not an index"},
		{"index too large", func(b *builder) { b.files["index.json"] = bytes.Repeat([]byte(" "), 1<<20+1) }, ErrLimit, `"index.json": 1048577 bytes, at most 1048576`},
		{"manifest missing", func(b *builder) { d := b.manifest(good); delete(b.files, file(d)); b.add(d, "x") }, ErrInvalid, "is missing in the archive"},
		{"manifest size", func(b *builder) { d := b.manifest(good); d.Size++; b.add(d, "x") }, ErrInvalid, "its descriptor says"},
		{"manifest changed", func(b *builder) { d := b.manifest(good); b.files[file(d)][5] ^= 1; b.add(d, "x") }, ErrDigest, "manifest sha256:"},
		{"manifest too large", func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), 1<<20+1)), "x")
		}, ErrLimit, "1048577 bytes, at most 1048576"},
		{"manifest that is also an index", func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"manifests":[],"config":{},"layers":[]}`)), "x")
		}, ErrInvalid, "is not an image manifest"},
		{"manifest of schema 1", func(b *builder) {
			b.add(b.blob(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":1,"fsLayers":[]}`)), "x")
		}, ErrInvalid, "schema version 1"},
		{"manifest of another media type", func(b *builder) { d := b.manifest(good); d.MediaType = "text/plain"; b.add(d, "x") }, ErrInvalid, `media type "text/plain"`},
		{"media types contradict", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { m.MediaType = ocispec.MediaTypeImageIndex })
		}, ErrInvalid, "want a manifest"},
		{"config missing", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { delete(b.files, file(m.Config)) }) }, ErrInvalid, "config sha256:"},
		{"config digest", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { b.files[file(m.Config)][3] ^= 1 }) }, ErrDigest, "config sha256:"},
		{"config of something else", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { m.Config.MediaType = "application/x" }) }, ErrInvalid, "not a container image"},
		{"one diff id too few", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { m.Layers = m.Layers[:1] }) }, ErrInvalid, "2 diff ids for 1 layers"},
		{"layer missing", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { delete(b.files, file(m.Layers[1])) }) }, ErrInvalid, "layer 2 of 2: blob sha256:"},
		{"layer size", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0].Size-- }) }, ErrInvalid, "layer 1 of 2: blob sha256:"},
		{"layer media type", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0].MediaType += "+encrypted" }) }, ErrInvalid, "is not a layer"},
		{"digest with a path", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../etc/passwd" })
		}, ErrInvalid, `digest "sha256:../../etc/passwd"`},
		{"unknown algorithm", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0].Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" })
		}, ErrInvalid, "digest"},
		{"layer not compressed as said", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0].MediaType = ocispec.MediaTypeImageLayerZstd })
		}, ErrInvalid, "but the content is gzip"},
		{"layer changed", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { f := b.files[file(m.Layers[1])]; f[len(f)/2] ^= 0x10 })
		}, ErrDigest, "layer 2 of 2"},
		{"layer changed at its beginning", func(b *builder) { manifestOf(b, func(m *ocispec.Manifest) { b.files[file(m.Layers[1])][0] ^= 1 }) }, ErrDigest, "layer 2 of 2"},
		{"layers swapped", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] })
		}, ErrDigest, "layer 1 of 2, uncompressed: digest sha256:"},
		{"another layer under the digest", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) {
				z := compressWith(b.t, "gzip", layerTar(b.t, "file1", "evil"))
				b.files[file(m.Layers[1])], m.Layers[1].Size = z, int64(len(z))
			})
		}, ErrDigest, "layer 2 of 2: digest sha256:"},
		{"bytes after the compressed stream", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) {
				z := append(b.files[file(m.Layers[1])], "tail"...)
				m.Layers[1] = b.blob(ocispec.MediaTypeImageLayerGzip, z)
			})
		}, ErrInvalid, "layer 2 of 2: after 2048 bytes: "},
		{"bomb", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) {
				m.Layers[1] = b.blob(ocispec.MediaTypeImageLayerGzip, compressWith(b.t, "gzip", make([]byte, 5<<20)))
			})
		}, ErrLimit, "layer 2 of 2: more than 4194304 bytes uncompressed"},
		{"zstd that wants much memory", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) {
				// A frame header with a window of 2 GiB.
				m.Layers[1] = b.blob(ocispec.MediaTypeImageLayerZstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 1, 0, 0})
			})
		}, ErrInvalid, zstd.ErrWindowSizeExceeded.Error()},
		{"xz layer", func(b *builder) {
			manifestOf(b, func(m *ocispec.Manifest) {
				m.Layers[1] = b.blob(ocispec.MediaTypeImageLayer, []byte("\xfd7zXZ\x00 and so on"))
			})
		}, ErrInvalid, "compressed with xz"},
		{"one name for two images", func(b *builder) {
			s := good
			s.layers = []string{"three"}
			b.add(b.manifest(good), "x").add(b.manifest(s), "x")
		}, ErrInvalid, `the name "x" stands for two images`},
		{"nested index missing", func(b *builder) { d := b.nested(b.withPlatform(good)); delete(b.files, file(d)); b.add(d, "x") }, ErrInvalid, "index sha256:"},
		{"nested index changed", func(b *builder) { d := b.nested(b.withPlatform(good)); b.files[file(d)][9] ^= 1; b.add(d, "x") }, ErrDigest, "index sha256:"},
		{"nested too deep", func(b *builder) {
			d := b.withPlatform(good)
			for range 6 {
				d = b.nested(d)
			}
			b.add(d, "x")
		}, ErrLimit, "indexes nested more than 4 deep"},
		{"platform not there", func(b *builder) {
			s, r := good, good
			s.platform, r.platform = "linux/s390x", "linux/riscv64"
			b.add(b.nested(b.withPlatform(s), b.withPlatform(r)), "x")
		}, ErrPlatform, "no image for the platform " + HostPlatform().String() + ": the archive has linux/riscv64, linux/s390x"},
		{"docker: config missing", func(b *builder) {
			*b = *dockerArchive(b.t, good, "x")
			for n := range b.files {
				if strings.HasSuffix(n, ".json") && n != "manifest.json" {
					delete(b.files, n)
				}
			}
		}, ErrInvalid, "is missing in the archive"},
		{"docker: config changed", func(b *builder) {
			*b = *dockerArchive(b.t, good, "x")
			for n := range b.files {
				if strings.HasSuffix(n, ".json") && n != "manifest.json" {
					b.files[n] = append(b.files[n], ' ')
				}
			}
		}, ErrDigest, "config"},
		{"docker: config outside", func(b *builder) {
			b.files = map[string][]byte{"manifest.json": []byte(`[{"Config":"../x.json","Layers":[]}]`)}
		}, ErrInvalid, `".." in the name`},
		{"docker: layer missing", func(b *builder) {
			*b = *dockerArchive(b.t, good, "x")
			delete(b.files, strings.Repeat("02", 32)+"/layer.tar")
		}, ErrInvalid, "layer 2 of 2: file"},
		{"docker: layer changed", func(b *builder) {
			*b = *dockerArchive(b.t, spec{platform: "linux/amd64", layers: []string{"one", "two"}}, "x")
			b.files[strings.Repeat("02", 32)+"/layer.tar"][600] ^= 1
		}, ErrDigest, "layer 2 of 2, uncompressed: digest sha256:"},
		{"docker: not a list", func(b *builder) { b.files = map[string][]byte{"manifest.json": []byte(`{}`)} }, ErrInvalid, "manifest.json of 2 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBuilder(t)
			c.build(b)
			if _, ok := b.files["oci-layout"]; ok && c.name != "no index" {
				b.finish()
			}
			for _, way := range []string{b.dir(), b.file()} {
				err := openAndRead(way, Options{MaxJSON: 1 << 20, MaxLayer: 4 << 20})
				if !errors.Is(err, c.kind) {
					t.Fatalf("%s: error %v, want one that is %q", way, err, c.kind)
				}
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: error %q, want it to say %q", way, err, c.want)
				}
			}
		})
	}
}

func openAndRead(path string, o Options) error {
	a, err := Open(bg, path, o)
	if err != nil {
		return err
	}
	defer a.Close()
	for _, im := range a.Images() {
		if _, err := readLayers(im); err != nil {
			return err
		}
	}
	return nil
}

// Entries of the outer archive that an archive of images does not have.
func TestOuterArchive(t *testing.T) {
	for _, c := range []struct {
		name string
		h    tar.Header
		want string
	}{
		{"absolute", tar.Header{Name: "/etc/passwd", Typeflag: tar.TypeReg}, `archive entry "/etc/passwd": absolute name`},
		{"dot dot", tar.Header{Name: "blobs/../../x", Typeflag: tar.TypeReg}, `archive entry "blobs/../../x": ".." in the name`},
		{"dot dot directory", tar.Header{Name: "../", Typeflag: tar.TypeDir}, `archive entry "../": ".." in the name`},
		{"twice", tar.Header{Name: "./index.json", Typeflag: tar.TypeReg}, `archive entry "./index.json": the name occurs twice`},
		{"link twice", tar.Header{Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "x"}, `the name occurs twice`},
		{"link out", tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../x"}, `link to "../x", outside of the archive`},
		{"absolute link", tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, `link to "/etc/passwd", outside of the archive`},
		{"hard link out", tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../x"}, `link to "../x", outside of the archive`},
		{"device", tar.Header{Name: "d", Typeflag: tar.TypeBlock}, `archive entry "d": tar type '4' in an image archive`},
		{"fifo", tar.Header{Name: "d", Typeflag: tar.TypeFifo}, `archive entry "d": tar type '6' in an image archive`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBuilder(t)
			data := b.add(b.manifest(spec{platform: "linux/amd64", layers: []string{"one"}}), "x").finish().tar()
			var extra bytes.Buffer
			w := tar.NewWriter(&extra)
			c.h.Mode = 0o644
			if err := w.WriteHeader(&c.h); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			data = append(data[:len(data)-1024], extra.Bytes()...)
			_, err := OpenStream(bg, bytes.NewReader(data), Options{SpoolDir: t.TempDir()})
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// A directory may hold links and other things; nothing outside of it is read, and nothing waits.
func TestOuterDirectory(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "oci-layout")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(bg, dir, Options{}); err == nil || !strings.Contains(err.Error(), `open "oci-layout"`) {
		t.Errorf("link out of the directory: error %v", err)
	}
	for _, c := range []struct{ path, want string }{
		{filepath.Join(dir, "nope"), "no such file"},
		{secret, "not a tar"},
		{"/dev/null", "neither"},
	} {
		if _, err := Open(bg, c.path, Options{SpoolDir: dir}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want it to say %q", c.path, err, c.want)
		}
	}
}

// An archive that is cut anywhere before its last content ends is an error, at Open or when
// layers are read, from a file and from a stream, compressed or not.
func TestCutArchives(t *testing.T) {
	b := newBuilder(t)
	s := spec{platform: "linux/amd64", layers: []string{strings.Repeat("one", 30_000), strings.Repeat("two", 50_000)}}
	b.add(b.manifest(s), "x").finish()
	plain := b.tar()
	last := len(bytes.TrimRight(plain, "\x00"))
	for _, kind := range []string{"", "gzip", "zstd"} {
		data := compressWith(t, kind, plain)
		end := len(data)
		if kind == "" {
			end = last
		}
		for i := 0; i < 20; i++ {
			cut := end * i / 20
			p := filepath.Join(t.TempDir(), "cut.tar")
			if err := os.WriteFile(p, data[:cut], 0o644); err != nil {
				t.Fatal(err)
			}
			if err := openAndRead(p, Options{SpoolDir: t.TempDir()}); err == nil {
				t.Errorf("%s archive cut at %d of %d bytes: no error", orPlain(kind), cut, len(data))
			} else if i > 0 && !errors.Is(err, ErrInvalid) {
				t.Errorf("%s archive cut at %d of %d bytes: error %q is not %q", orPlain(kind), cut, len(data), err, ErrInvalid)
			}
		}
	}
}

// Links that lead to each other end.
func TestLinksInARing(t *testing.T) {
	b := dockerArchive(t, spec{platform: "linux/amd64", layers: []string{"one"}}, "x")
	name := strings.Repeat("01", 32) + "/layer.tar"
	delete(b.files, name)
	b.links[name], b.links["l"] = "../l", name
	if _, err := Open(bg, b.file(), Options{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "more than 10 links") {
		t.Errorf("error %v", err)
	}
}

// A docker save archive holds one platform; asking for another is an error.
func TestDockerPlatform(t *testing.T) {
	b := dockerArchive(t, spec{platform: "linux/s390x"}, "x")
	_, err := Open(bg, b.file(), Options{Platform: Platform{OS: "linux", Arch: "amd64"}})
	if !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "linux/amd64: the archive has linux/s390x") {
		t.Errorf("error %v", err)
	}
}

// Any byte that changes in a blob, manifest or config is found.
func TestEveryDigestPosition(t *testing.T) {
	for _, kind := range []string{"", "gzip", "zstd"} {
		b := newBuilder(t)
		b.add(b.nested(b.withPlatform(spec{platform: HostPlatform().String(), layers: []string{"one", "two", "three"}, kind: kind})), "x").finish()
		if err := openAndRead(b.dir(), Options{}); err != nil {
			t.Fatal(err)
		}
		for name, data := range b.files {
			if !strings.HasPrefix(name, "blobs/") {
				continue
			}
			for _, pos := range []int{0, len(data) / 3, len(data) - 1} {
				data[pos] ^= 0x20
				if err := openAndRead(b.dir(), Options{}); !errors.Is(err, ErrDigest) {
					t.Errorf("%s, %s, byte %d of %d: error %v, want %q", orPlain(kind), name, pos, len(data), err, ErrDigest)
				}
				data[pos] ^= 0x20
			}
		}
	}
}

// Whatever the descriptors name, a wrong digest in each place is found.
func TestWrongDigestInEachPlace(t *testing.T) {
	b := newBuilder(t)
	d := b.manifest(spec{platform: "linux/amd64", layers: []string{"one", "two"}, kind: "gzip"})
	blobs := []string{}
	for n := range b.files {
		if strings.HasPrefix(n, "blobs/") {
			blobs = append(blobs, n)
		}
	}
	for _, n := range blobs {
		// The blob moves to the name of another digest, and everything that names it follows.
		old := filepath.Base(n)
		wrong := digest.FromString(old).Encoded()
		c := newBuilder(t)
		for name, data := range b.files {
			c.files[strings.ReplaceAll(name, old, wrong)] = bytes.ReplaceAll(data, []byte(old), []byte(wrong))
		}
		m := d
		m.Digest = digest.Digest(strings.ReplaceAll(string(d.Digest), old, wrong))
		if n != "blobs/sha256/"+d.Digest.Encoded() { // the manifest is another one now
			m.Digest = digest.FromBytes(c.files["blobs/sha256/"+d.Digest.Encoded()])
			c.files["blobs/sha256/"+m.Digest.Encoded()] = c.files["blobs/sha256/"+d.Digest.Encoded()]
		}
		err := openAndRead(c.add(m, "x").finish().dir(), Options{})
		if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), old) {
			t.Errorf("%s: error %v, want %q with both digests", n, err, ErrDigest)
		}
	}
}

// The stream fails while it is spooled.
func TestStreamFails(t *testing.T) {
	broken := errors.New("connection reset")
	b := newBuilder(t).add(newBuilder(t).manifest(spec{platform: "linux/amd64"}), "x").finish()
	data := b.tar()
	_, err := OpenStream(bg, io.MultiReader(bytes.NewReader(data[:len(data)/2]), &failingReader{broken}), Options{SpoolDir: t.TempDir()})
	if !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
	_, err = OpenStream(bg, bytes.NewReader(data), Options{SpoolDir: t.TempDir(), MaxSpool: 1000})
	if !errors.Is(err, ErrLimit) {
		t.Errorf("error %v, want %v", err, ErrLimit)
	}
	if _, err := OpenStream(bg, bytes.NewReader(data), Options{SpoolDir: "/no/such/dir"}); err == nil || !strings.Contains(err.Error(), "/no/such/dir") {
		t.Errorf("error %v, want it to name the directory", err)
	}
}

type failingReader struct{ err error }

func (f *failingReader) Read([]byte) (int, error) { return 0, f.err }

func TestDigestErrorMessage(t *testing.T) {
	e := &DigestError{What: "layer 1 of 2", Got: digest.FromString("a"), Want: digest.FromString("b")}
	want := fmt.Sprintf("layer 1 of 2: digest %s, want %s", digest.FromString("a"), digest.FromString("b"))
	if e.Error() != want || !errors.Is(fmt.Errorf("x: %w", e), ErrDigest) {
		t.Errorf("%v", e)
	}
}
