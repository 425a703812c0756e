package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func writer(b []byte) func(context.Context, io.Writer) error {
	return func(_ context.Context, w io.Writer) error {
		_, err := w.Write(b)
		return err
	}
}

func TestExportRoundTrip(t *testing.T) {
	for _, kind := range []string{"", "gzip", "zstd", "none"} {
		t.Run(kind, func(t *testing.T) {
			b := newBuilder(t)
			sp := threeLayers("")
			sp.layers = append(sp.layers, sp.layers[0])
			config, tars := sp.config(b)
			tars[3] = tars[0] // a layer that occurs twice
			config = bytes.ReplaceAll(config, []byte(digest.FromBytes(layerTar(t, "file3", sp.layers[3]))), []byte(digest.FromBytes(tars[0])))
			im := ExportImage{Names: []string{"docker.io/library/x:1", "y:2"}, Config: config}
			for _, lt := range tars {
				im.Layers = append(im.Layers, writer(lt))
			}
			var out, again bytes.Buffer
			d, err := Export(bg, &out, im, ExportOptions{Compression: kind, SpoolDir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Export(bg, &again, im, ExportOptions{Compression: kind}); err != nil || !bytes.Equal(out.Bytes(), again.Bytes()) {
				t.Errorf("a second export differs (%v)", err)
			}
			a, err := OpenStream(bg, &out, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			got := a.Images()
			if len(got) != 1 || strings.Join(got[0].Names, " ") != "docker.io/library/x:1 y:2" || got[0].Digest != d || !bytes.Equal(got[0].RawConfig, config) {
				t.Errorf("images %+v", got)
			}
			layers, err := readLayers(got[0])
			if err != nil {
				t.Fatal(err)
			}
			for i := range tars {
				if layers[i] != string(tars[i]) {
					t.Errorf("layer %d differs", i)
				}
			}
		})
	}
}

// Layers that are not byte for byte what the config says give a config with their diff ids;
// what this package does not know stays in it.
func TestExportNewDiffIDs(t *testing.T) {
	config := []byte(`{"os":"linux","architecture":"amd64","x-unknown":{"a":1},"config":{"Cmd":["sh"]},"history":[{"created_by":"x"},{"created_by":"e","empty_layer":true}],"rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]}}`)
	lt := layerTar(t, "a", "b")
	for _, n := range []int{1, 2} {
		im := ExportImage{Config: config}
		for range n {
			im.Layers = append(im.Layers, writer(lt))
		}
		var out bytes.Buffer
		if _, err := Export(bg, &out, im, ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		a, err := OpenStream(bg, &out, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		raw := a.Images()[0].RawConfig
		var c map[string]any
		if err := json.Unmarshal(raw, &c); err != nil {
			t.Fatal(err)
		}
		_, hasHistory := c["history"]
		if c["x-unknown"] == nil || hasHistory != (n == 1) || len(a.Images()[0].Layers) != n {
			t.Errorf("%d layers: config %s", n, raw)
		}
		if _, err := readLayers(a.Images()[0]); err != nil {
			t.Error(err)
		}
	}
}

func TestExportFailures(t *testing.T) {
	full := errors.New("full")
	config := []byte(`{"os":"linux"}`)
	if _, err := Export(bg, io.Discard, ExportImage{Config: config, Layers: []func(context.Context, io.Writer) error{
		func(context.Context, io.Writer) error { return full }}}, ExportOptions{}); !errors.Is(err, full) || !strings.Contains(err.Error(), "layer 1 of 1") {
		t.Errorf("layer fails: %v", err)
	}
	if _, err := Export(bg, failWriter{full}, ExportImage{Config: config}, ExportOptions{}); !errors.Is(err, full) {
		t.Errorf("writer fails: %v", err)
	}
	if _, err := Export(bg, io.Discard, ExportImage{Config: []byte("{")}, ExportOptions{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("bad config: %v", err)
	}
	if _, err := Export(bg, io.Discard, ExportImage{Config: config, Layers: []func(context.Context, io.Writer) error{writer(nil)}}, ExportOptions{Compression: "lzma"}); err == nil {
		t.Error("unknown compression: no error")
	}
}

type failWriter struct{ err error }

func (f failWriter) Write([]byte) (int, error) { return 0, f.err }

// Other programs read what Export writes.
func TestExportForOthers(t *testing.T) {
	needTools(t, "skopeo", "umoci")
	dir := t.TempDir()
	b := newBuilder(t)
	config, tars := threeLayers("").config(b)
	im := ExportImage{Names: []string{"demo:1"}, Config: config}
	for _, lt := range tars {
		im.Layers = append(im.Layers, writer(lt))
	}
	for _, kind := range []string{"gzip", "zstd"} {
		p := filepath.Join(dir, kind+".tar")
		f, err := os.Create(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Export(bg, f, im, ExportOptions{Compression: kind}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		run(t, "skopeo", "--insecure-policy", "copy", "oci-archive:"+p+":1", "oci:"+filepath.Join(dir, kind)+":1")
		run(t, "skopeo", "--insecure-policy", "copy", "docker-archive:"+p+":demo:1", "oci:"+filepath.Join(dir, kind+"-docker")+":1")
	}
	run(t, "umoci", "unpack", "--image", filepath.Join(dir, "gzip")+":1", filepath.Join(dir, "bundle"))
	got, err := os.ReadFile(filepath.Join(dir, "bundle/rootfs/file2"))
	if err != nil || string(got) != "three" {
		t.Errorf("file2: %q, %v", got, err)
	}
}
