package image

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportImage is one image to write as an archive.
type ExportImage struct {
	Names []string
	// Config is the OCI config, JSON. Its list of diff ids is replaced if the layers turn out to
	// have others.
	Config []byte
	// Layers write the uncompressed layer tars, lowest first.
	Layers []func(ctx context.Context, w io.Writer) error
}

// ExportOptions say how an archive is written.
type ExportOptions struct {
	// Compression of layers: "zstd", "gzip" or "none". Empty: "gzip", which everything reads.
	Compression string
	// SpoolDir is where compressed layers are kept until their sizes are known, in files without
	// names. os.TempDir().
	SpoolDir string
}

// Export writes an OCI archive, with the manifest.json that docker load of any age reads beside
// the OCI index. The same image gives the same bytes. It returns the manifest's digest.
func Export(ctx context.Context, w io.Writer, im ExportImage, o ExportOptions) (digest.Digest, error) {
	e := &exporter{o: o, blobs: map[digest.Digest]bool{}}
	defer e.close()
	manifest, err := e.prepare(ctx, im)
	if err != nil {
		return "", fmt.Errorf("export image: %w", err)
	}
	if err := e.write(ctx, w, im, manifest); err != nil {
		return "", fmt.Errorf("export image: write the archive: %w", err)
	}
	return manifest.Digest, nil
}

// exporter collects blobs: layers in files, the rest in memory.
type exporter struct {
	o      ExportOptions
	layers []exportLayer
	small  [][]byte // config and manifest
	config ocispec.Descriptor
	blobs  map[digest.Digest]bool // written
}

type exportLayer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	f      *os.File
}

func (e *exporter) close() {
	for _, l := range e.layers {
		l.f.Close()
	}
}

// prepare makes all blobs and returns the descriptor of the manifest.
func (e *exporter) prepare(ctx context.Context, im ExportImage) (ocispec.Descriptor, error) {
	var ids []digest.Digest
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	for i, write := range im.Layers {
		l, err := e.spoolLayer(ctx, write)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %d of %d: %w", i+1, len(im.Layers), err)
		}
		ids = append(ids, l.diffID)
		m.Layers = append(m.Layers, l.desc)
	}
	config, err := withDiffIDs(im.Config, ids)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m.Config = e.addSmall(ocispec.MediaTypeImageConfig, config)
	e.config = m.Config
	b, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return e.addSmall(ocispec.MediaTypeImageManifest, b), nil
}

func (e *exporter) addSmall(mediaType string, b []byte) ocispec.Descriptor {
	e.small = append(e.small, b)
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// withDiffIDs returns the config with the diff ids given, byte for byte the old one if it has
// them already.
func withDiffIDs(config []byte, ids []digest.Digest) ([]byte, error) {
	var c ocispec.Image
	if err := decodeJSON("config", config, &c); err != nil {
		return nil, err
	}
	if slices.Equal(c.RootFS.DiffIDs, ids) && c.RootFS.Type == "layers" {
		return config, nil
	}
	var fields map[string]json.RawMessage // what this package does not know stays
	if err := decodeJSON("config", config, &fields); err != nil {
		return nil, err
	}
	if ids == nil {
		ids = []digest.Digest{}
	}
	rootfs, err := json.Marshal(ocispec.RootFS{Type: "layers", DiffIDs: ids})
	if err != nil {
		return nil, err
	}
	fields["rootfs"] = rootfs
	real := 0
	for _, h := range c.History {
		if !h.EmptyLayer {
			real++
		}
	}
	if real != len(ids) {
		delete(fields, "history") // it would speak of other layers
	}
	return json.Marshal(fields)
}

// spoolLayer compresses one layer into a file and hashes both sides.
func (e *exporter) spoolLayer(ctx context.Context, write func(context.Context, io.Writer) error) (exportLayer, error) {
	dir := e.o.SpoolDir
	if dir == "" {
		dir = os.TempDir()
	}
	f, err := unnamedFile(dir)
	if err != nil {
		return exportLayer{}, fmt.Errorf("make a temporary file in %s: %w", dir, err)
	}
	l := exportLayer{f: f}
	e.layers = append(e.layers, l)
	stored, plain := digest.SHA256.Digester(), digest.SHA256.Digester()
	bw := bufio.NewWriterSize(io.MultiWriter(f, stored.Hash()), 256<<10)
	z, mediaType, err := compressor(bw, e.o.Compression)
	if err != nil {
		return l, err
	}
	err = write(ctx, io.MultiWriter(z, plain.Hash()))
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if ferr := bw.Flush(); err == nil {
		err = ferr
	}
	if err != nil {
		return l, err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return l, err
	}
	l.diffID = plain.Digest()
	l.desc = ocispec.Descriptor{MediaType: mediaType, Digest: stored.Digest(), Size: size}
	e.layers[len(e.layers)-1] = l
	return l, nil
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

func compressor(w io.Writer, kind string) (io.WriteCloser, string, error) {
	switch kind {
	case "", "gzip":
		return gzip.NewWriter(w), ocispec.MediaTypeImageLayerGzip, nil
	case "zstd":
		z, err := zstd.NewWriter(w)
		return z, ocispec.MediaTypeImageLayerZstd, err
	case "none":
		return nopWriteCloser{w}, ocispec.MediaTypeImageLayer, nil
	}
	return nil, "", fmt.Errorf("compression %s is not zstd, gzip or none", quote(kind))
}

// write writes the archive from what prepare made.
func (e *exporter) write(ctx context.Context, w io.Writer, im ExportImage, manifest ocispec.Descriptor) error {
	var c ocispec.Image
	if err := decodeJSON("config", e.small[0], &c); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	old := dockerImage{Config: mustBlobName(e.config.Digest), RepoTags: []string{}, Layers: []string{}}
	for _, l := range e.layers {
		old.Layers = append(old.Layers, mustBlobName(l.desc.Digest))
	}
	d := manifest
	if c.OS != "" && c.Architecture != "" {
		d.Platform = &ocispec.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	}
	for _, name := range im.Names {
		named := d
		named.Annotations = map[string]string{annotationName: name, annotationRef: tagOf(name)}
		index.Manifests = append(index.Manifests, named)
		if dockerName.MatchString(name) {
			old.RepoTags = append(old.RepoTags, name)
		}
	}
	if len(im.Names) == 0 {
		index.Manifests = append(index.Manifests, d)
	}
	bw := bufio.NewWriterSize(w, 1<<20)
	tw := tar.NewWriter(bw)
	file := func(name string, b []byte) error {
		return writeFile(tw, name, int64(len(b)), strings.NewReader(string(b)))
	}
	if err := file(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
		return err
	}
	for _, b := range e.small {
		if err := file(mustBlobName(digest.FromBytes(b)), b); err != nil {
			return err
		}
	}
	for _, l := range e.layers {
		if e.blobs[l.desc.Digest] {
			continue
		}
		e.blobs[l.desc.Digest] = true
		r := &ctxReader{ctx: ctx, r: io.NewSectionReader(l.f, 0, l.desc.Size)}
		if err := writeFile(tw, mustBlobName(l.desc.Digest), l.desc.Size, r); err != nil {
			return err
		}
	}
	for _, last := range []struct {
		name string
		v    any
	}{{ocispec.ImageIndexFile, index}, {dockerManifestFile, []dockerImage{old}}} {
		b, err := json.Marshal(last.v)
		if err != nil {
			return err
		}
		if err := file(last.name, b); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return bw.Flush()
}

func writeFile(tw *tar.Writer, name string, size int64, r io.Reader) error {
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
		return err
	}
	_, err := io.Copy(tw, r)
	return err
}

// mustBlobName is blobName for digests that were made here.
func mustBlobName(d digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// dockerName is a name with a tag as docker load takes it.
var dockerName = regexp.MustCompile(`^[a-z0-9]+([._/:-][a-z0-9]+)*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// tagOf returns the tag of a name, or all of it.
func tagOf(name string) string {
	if i := strings.LastIndexByte(name, ':'); i >= 0 && !strings.Contains(name[i:], "/") {
		return name[i+1:]
	}
	return name
}
