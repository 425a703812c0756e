package snapshotter

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A compression is how a layer's tar is packed.
type compression int

const (
	plainTar compression = iota
	gzipTar
	zstdTar
)

// compressions are the media types of layers. Others (encrypted ones, for instance) are for
// containerd's own differ.
var compressions = map[string]compression{
	ocispec.MediaTypeImageLayer:                         plainTar,
	ocispec.MediaTypeImageLayerGzip:                     gzipTar,
	ocispec.MediaTypeImageLayerZstd:                     zstdTar,
	"application/vnd.docker.image.rootfs.diff.tar":      plainTar,
	"application/vnd.docker.image.rootfs.diff.tar.gzip": gzipTar,
	"application/vnd.docker.image.rootfs.diff.tar.zstd": zstdTar,
}

// maxWindow bounds the memory of a zstd decoder.
const maxWindow = 128 << 20

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// compress packs what is written to it. Its Close does not close w.
func compress(w io.Writer, kind compression) (io.WriteCloser, error) {
	switch kind {
	case gzipTar:
		return gzip.NewWriter(w), nil
	case zstdTar:
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	}
	return nopCloser{w}, nil
}

// decompress unpacks a stream by its first bytes. Its Close does not close r.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 128<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(br)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// A clamp is a writer for a tar that makes no time in it later than a moment.
type clamp struct {
	w    io.Writer
	pipe *io.PipeWriter
	done chan error
}

// newClamp makes one that writes to w. Without a moment it changes nothing.
func newClamp(w io.Writer, latest *time.Time) *clamp {
	if latest == nil {
		return &clamp{w: w}
	}
	r, pipe := io.Pipe()
	c := &clamp{w: pipe, pipe: pipe, done: make(chan error, 1)}
	go func() {
		err := clampTar(w, r, *latest)
		r.CloseWithError(err) // a writer that goes on hears of it
		c.done <- err
	}()
	return c
}

func (c *clamp) Write(p []byte) (int, error) { return c.w.Write(p) }

// Close waits until everything is written.
func (c *clamp) Close() error {
	if c.pipe == nil {
		return nil
	}
	c.pipe.Close()
	return <-c.done
}

func clampTar(w io.Writer, r io.Reader, latest time.Time) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("times of a layer: %w", err)
		}
		for _, t := range []*time.Time{&h.ModTime, &h.AccessTime, &h.ChangeTime} {
			if t.After(latest) {
				*t = latest
			}
		}
		for _, k := range []string{"mtime", "atime", "ctime"} {
			delete(h.PAXRecords, k)
		}
		if err := out.WriteHeader(h); err != nil {
			return fmt.Errorf("times of a layer: %w", err)
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, r)
	return err
}
