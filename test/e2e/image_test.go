package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A file is one entry of a tar: a regular file unless the type says another, a directory if the
// name ends in /.
type file struct {
	name string
	body []byte
	typ  byte
	link string
}

func tarOf(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body)), Typeflag: f.typ, Linkname: f.link,
			ModTime: time.Unix(1_700_000_000, 0)}
		switch {
		case f.typ != 0:
		case strings.HasSuffix(f.name, "/"):
			h.Mode, h.Typeflag = 0o755, tar.TypeDir
		default:
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func digestOf(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// An ociImage is a name for a number of layers, lowest first.
type ociImage struct {
	name   string
	layers [][]byte // tars
	lie    string   // if not empty: the diff id that the configuration gives for the last layer
}

// ociFiles are the files of an OCI layout with these images.
func ociFiles(t *testing.T, images ...ociImage) []file {
	t.Helper()
	files := []file{{name: "oci-layout", body: []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	there := map[string]bool{}
	toJSON := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	blob := func(media string, b []byte) map[string]any {
		d := digestOf(b)
		if !there[d] {
			there[d] = true
			files = append(files, file{name: "blobs/sha256/" + d[7:], body: b})
		}
		return map[string]any{"mediaType": media, "digest": d, "size": len(b)}
	}
	var manifests []any
	for _, im := range images {
		var descriptors []any
		var diffIDs []string
		for i, l := range im.layers {
			descriptors = append(descriptors, blob("application/vnd.oci.image.layer.v1.tar", l))
			id := digestOf(l)
			if i == len(im.layers)-1 && im.lie != "" {
				id = im.lie
			}
			diffIDs = append(diffIDs, id)
		}
		config := blob("application/vnd.oci.image.config.v1+json", toJSON(map[string]any{
			"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}}))
		m := blob("application/vnd.oci.image.manifest.v1+json", toJSON(map[string]any{"schemaVersion": 2,
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descriptors}))
		m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": im.name}
		manifests = append(manifests, m)
	}
	return append(files, file{name: "index.json", body: toJSON(map[string]any{"schemaVersion": 2, "manifests": manifests})})
}

// archive writes an OCI archive into the box and returns its path.
func (b *box) archive(name string, images ...ociImage) string {
	b.Helper()
	return b.writeFile(name, tarOf(b.T, ociFiles(b.T, images...)...))
}

// pattern is n bytes that depend on the seed and do not repeat.
func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x >> 32)
	}
	return b
}

// smallImage imports an image "small" of two layers: a file big of 8 MiB, and one more.
func (b *box) smallImage() {
	b.Helper()
	b.mica("image", "import", b.archive("small.tar", ociImage{name: "small", layers: [][]byte{
		tarOf(b.T, file{name: "etc/"}, file{name: "etc/motd", body: []byte("low\n")}, file{name: "big", body: pattern(1, 8<<20)}),
		tarOf(b.T, file{name: "etc/"}, file{name: "etc/motd", body: []byte("high\n")}),
	}}))
}

// goImage reads what `image import --json` says.
type imported struct {
	Images []struct {
		Name      string   `json:"name"`
		Layers    []string `json:"layers"`
		NewLayers int      `json:"new_layers"`
	} `json:"images"`
}

// rootOf is where umoci unpacks an image.
func rootOf(bundle string) string { return filepath.Join(bundle, "rootfs") }
