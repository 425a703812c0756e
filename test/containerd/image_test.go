package containerd

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const imageName = "docker.io/library/test:latest"

// An entry is a file of a layer; a name that ends in "/" is a directory.
type entry struct {
	name, data, link string
	mode             int64
}

// layerOf makes a layer's tar.
func layerOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Typeflag: tar.TypeReg}
		switch {
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case e.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, e.link, 0o777
		}
		if e.mode != 0 {
			h.Mode = e.mode
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// shell is a layer with a static busybox under the names that the tests use.
func shell(t testing.TB) []byte {
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	entries := []entry{{name: "bin/"}, {name: "bin/busybox", data: string(bin), mode: 0o755}}
	for _, n := range strings.Fields("sh cat echo ls sleep dd true head wc sha256sum mkdir rm cp mv ln stat test seq tail df") {
		entries = append(entries, entry{name: "bin/" + n, link: "busybox"})
	}
	for _, d := range strings.Fields("etc proc sys dev tmp run root") {
		entries = append(entries, entry{name: d + "/"})
	}
	return layerOf(t, append(entries, entry{name: "etc/passwd", data: "root:x:0:0:root:/root:/bin/sh\n"},
		entry{name: "etc/group", data: "root:x:0:\n"})...)
}

// archive writes an image archive in Docker's format, which every containerd reads.
func (b *box) archive(name string, layers ...[]byte) string {
	b.Helper()
	var ids []string
	for _, l := range layers {
		ids = append(ids, fmt.Sprintf("sha256:%x", sha256.Sum256(l)))
	}
	config, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Cmd": []string{"/bin/sh"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
	if err != nil {
		b.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, data []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			b.Fatal(err)
		}
	}
	var files []string
	for i, l := range layers {
		files = append(files, fmt.Sprintf("layer%d.tar", i))
		add(files[i], l)
	}
	configName := fmt.Sprintf("%x.json", sha256.Sum256(config))
	add(configName, config)
	manifest, err := json.Marshal([]any{map[string]any{"Config": configName, "RepoTags": []string{name}, "Layers": files}})
	if err != nil {
		b.Fatal(err)
	}
	add("manifest.json", manifest)
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return b.write("image.tar", out.String())
}

// testImage is an image of three layers: a shell, some files, and one that changes and deletes.
func (b *box) testImage() string {
	b.Helper()
	return b.archive(imageName, shell(b),
		layerOf(b, entry{name: "etc/"}, entry{name: "etc/greeting", data: "hello\n"}, entry{name: "big", data: strings.Repeat("0123456789abcdef", 1<<16)}),
		layerOf(b, entry{name: "etc/"}, entry{name: "etc/greeting", data: "hello again\n"}, entry{name: ".wh.big"}))
}

// load imports an archive and unpacks it onto mica.
func (b *box) load(archive string) {
	b.Helper()
	b.ctr("images", "import", "--snapshotter", "mica", archive)
}

// layerName is the digest of an uncompressed layer.
func layerName(t testing.TB, layer []byte) string {
	t.Helper()
	return fmt.Sprintf("sha256:%x", sha256.Sum256(layer))
}

// layerDescriptor describes an uncompressed layer in the content store.
func (b *box) layerDescriptor(dgst string) ocispec.Descriptor {
	b.Helper()
	for line := range strings.Lines(b.ctr("content", "ls")) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == dgst {
			return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.Digest(dgst), Size: int64(len(b.ctr("content", "get", dgst)))}
		}
	}
	b.Fatalf("layer %s is not in the content store", dgst)
	return ocispec.Descriptor{}
}
