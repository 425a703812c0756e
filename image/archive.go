package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"mica/layer/archive"
)

// Options say how an archive is read. Zero values mean the defaults named.
type Options struct {
	// Platform selects from images for several platforms. The zero value means the host's, and
	// then an image that is there for one platform only is taken whatever it is for.
	Platform Platform
	// SpoolDir is where a stream, or an archive that is compressed as a whole, is kept while it
	// is read, in a file without a name. os.TempDir().
	SpoolDir string
	// MaxJSON is the largest index, manifest or config in bytes. 8 MiB. All of them together may
	// have 8 times as many.
	MaxJSON int64
	// MaxLayer is the largest uncompressed layer tar in bytes. 1 TiB.
	MaxLayer int64
	// MaxSpool is the largest uncompressed archive that is spooled, in bytes. 1 TiB.
	MaxSpool int64
	// MaxRatio is how many times its size a layer, or an archive that is compressed as a whole,
	// may unpack to once that is more than RatioFree bytes. 10,000 and 1 GiB.
	MaxRatio, RatioFree int64
}

func (o Options) withDefaults() Options {
	if o.MaxJSON <= 0 {
		o.MaxJSON = 8 << 20
	}
	if o.MaxLayer <= 0 {
		o.MaxLayer = 1 << 40
	}
	if o.MaxSpool <= 0 {
		o.MaxSpool = 1 << 40
	}
	if o.MaxRatio <= 0 {
		o.MaxRatio = archive.Limits{}.WithDefaults().MaxRatio
	}
	return o
}

// An Archive is one or more images in a file or a directory. Indexes, manifests and configs
// were checked when it was opened; layers are checked while they are read. Safe for concurrent
// use.
type Archive struct {
	src    source
	opts   Options
	images []Image
	json   int64 // bytes of indexes, manifests and configs read so far
}

// An Image is one image of an archive, for one platform.
type Image struct {
	// Names under which the archive has it; none if it does not say.
	Names    []string
	Platform Platform
	// Digest and MediaType are those of the manifest. Old docker save archives have none; there
	// they are the config's.
	Digest    digest.Digest
	MediaType string
	// RawConfig is the config as it is in the archive; Config is it decoded.
	RawConfig []byte
	Config    ocispec.Image
	Layers    []Layer // lowest first
}

// A Layer is one layer of an image in an archive.
type Layer struct {
	DiffID  digest.Digest // of the uncompressed tar
	ChainID digest.Digest // of this and all below
	// Digest and MediaType are those of the layer as it is stored; "" in old docker save
	// archives, which do not name them.
	Digest    digest.Digest
	MediaType string
	Size      int64 // bytes as stored

	a    *Archive
	file string
	what string // "layer 2 of 3 of image x", for errors
}

// Open opens the archive at path: a directory with an OCI image layout (or what a docker save
// archive unpacks to), or a file with an OCI archive or a docker save archive, which may be
// compressed with gzip or zstd. A path that is not a directory or a regular file, such as a
// pipe, is read like a stream.
//
// Every index, manifest and config is checked against the digest that names it, and the files
// of all layers must be there with the sizes that the manifest says.
func Open(ctx context.Context, path string, o Options) (*Archive, error) {
	a, err := open(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("image archive %s: %w", path, err)
	}
	return a, nil
}

func open(ctx context.Context, path string, o Options) (*Archive, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	switch {
	case st.IsDir():
		f.Close()
		root, err := os.OpenRoot(path)
		if err != nil {
			return nil, err
		}
		return load(ctx, &dirSource{root}, o)
	case !st.Mode().IsRegular():
		defer f.Close()
		return openStream(ctx, f, o)
	}
	head := make([]byte, 6)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		f.Close()
		return nil, err
	}
	if kind, err := compression(head[:n]); err != nil || kind != "" {
		defer f.Close()
		if err != nil {
			return nil, err
		}
		return openStream(ctx, f, o)
	}
	return openTar(ctx, f, o)
}

// OpenStream reads an archive from a stream to its end, as Open does from a file. Afterwards r
// is not needed any more.
func OpenStream(ctx context.Context, r io.Reader, o Options) (*Archive, error) {
	a, err := openStream(ctx, r, o)
	if err != nil {
		return nil, fmt.Errorf("image archive from a stream: %w", err)
	}
	return a, nil
}

func openStream(ctx context.Context, r io.Reader, o Options) (*Archive, error) {
	f, err := spool(ctx, r, o.withDefaults())
	if err != nil {
		return nil, err
	}
	return openTar(ctx, f, o)
}

// openTar takes f over.
func openTar(ctx context.Context, f *os.File, o Options) (*Archive, error) {
	src, err := newTarSource(ctx, f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return load(ctx, src, o)
}

// load takes src over.
func load(ctx context.Context, src source, o Options) (*Archive, error) {
	a := &Archive{src: src, opts: o.withDefaults()}
	if err := a.load(ctx); err != nil {
		src.Close()
		return nil, err
	}
	return a, nil
}

func (a *Archive) load(ctx context.Context) error {
	layout, err := a.readAll(ocispec.ImageLayoutFile)
	if err == nil {
		return a.loadLayout(ctx, layout)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	manifest, err := a.readAll(dockerManifestFile)
	if err == nil {
		return a.loadDocker(ctx, manifest)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("neither %s (an OCI image layout) nor %s (a docker save archive) is in it: %w",
		ocispec.ImageLayoutFile, dockerManifestFile, ErrInvalid)
}

// Images returns the images of the archive, each for the platform that Options chose.
func (a *Archive) Images() []Image { return a.images }

// Close lets go of the archive. Layers that are open may fail afterwards.
func (a *Archive) Close() error { return a.src.Close() }

// readAll reads a whole small file, within the bounds of one and of all.
func (a *Archive) readAll(name string) ([]byte, error) {
	b, err := readAll(a.src, name, a.opts.MaxJSON)
	if err != nil {
		return nil, err
	}
	// A file of a few bytes that is named again and again costs time all the same.
	a.json += max(int64(len(b)), 1<<10)
	if most := 8 * a.opts.MaxJSON; a.json > most {
		return nil, fmt.Errorf("%s: indexes, manifests and configs of more than %d bytes together: %w", quote(name), most, ErrLimit)
	}
	return b, nil
}

// maxValues bounds the values in one JSON file: as Go values, lists of next to nothing take a
// hundred times as much memory as in the file.
const maxValues = 200_000

// decodeJSON decodes b, which must be one JSON value.
func decodeJSON(what string, b []byte, v any) error {
	if n := bytes.Count(b, []byte(",")) + bytes.Count(b, []byte("{")) + bytes.Count(b, []byte("[")); n > maxValues {
		return fmt.Errorf("%s of %d bytes: some %d values, at most %d: %w", what, len(b), n, maxValues, ErrLimit)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s of %d bytes: %w: %w", what, len(b), err, ErrInvalid)
	}
	return nil
}
