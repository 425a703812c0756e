package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"mica/layer/archive"
)

// Open returns the layer's uncompressed tar. Its Read returns io.EOF only after the whole layer
// was read and its blob digest, its size and its diff id were found right; otherwise a
// *DigestError or another error. What was read before that is not to be trusted.
func (l Layer) Open(ctx context.Context) (io.ReadCloser, error) {
	r, err := l.open(ctx)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (l Layer) open(ctx context.Context) (*layerReader, error) {
	f, size, err := l.a.src.open(l.file)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, ErrInvalid)
		}
		return nil, fmt.Errorf("%s: %w", l.what, err)
	}
	r := &layerReader{ctx: ctx, l: l, file: f, diff: l.DiffID.Algorithm().Digester()}
	r.raw.r, r.raw.left = f, size
	if l.Digest != "" {
		r.raw.hash = l.Digest.Algorithm().Digester()
	}
	plain, kind, err := decompress(&r.raw)
	if err == nil {
		o, stored := r.l.a.opts, r.stored
		if kind == "" {
			stored = nil
		}
		r.plain = struct {
			io.Reader
			io.Closer
		}{archive.Unpacking(plain, stored, archive.Limits{MaxTar: o.MaxLayer, MaxRatio: o.MaxRatio, RatioFree: o.RatioFree}), plain}
		if want, _ := layerKind(l.MediaType); l.MediaType != "" && want != kind {
			err = fmt.Errorf("media type %s, but the content is %s", quote(l.MediaType), orPlain(kind))
		}
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %w", l.what, r.blame(err), ErrInvalid)
		r.Close()
		return nil, err
	}
	return r, nil
}

func orPlain(kind string) string {
	if kind == "" {
		return "not compressed"
	}
	return kind
}

// layerReader is the checking reader of one layer. A store that fails may leave a Read behind
// that has not returned, so everything may be called at any time.
type layerReader struct {
	ctx  context.Context
	l    Layer
	file io.Closer
	raw  rawReader

	mu    sync.Mutex // held over a Read, which waits for nothing but the archive's file
	plain io.ReadCloser
	diff  digest.Digester
	n     int64 // uncompressed bytes so far; guarded by mu
	err   error // final; guarded by mu
}

// rawReader counts and hashes what is stored, and turns an early end into an error.
type rawReader struct {
	r    io.Reader
	hash digest.Digester // nil: no digest to check
	n    atomic.Int64
	left int64
}

func (r *rawReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.hash != nil {
		r.hash.Hash().Write(p[:n])
	}
	r.n.Add(int64(n))
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// stored is how many bytes of the stored layer were read.
func (r *layerReader) stored() int64 { return r.raw.n.Load() }

// result returns how many uncompressed bytes were read, and what ended the reading: nil if it
// has not ended, io.EOF if all of it was right.
func (r *layerReader) result() (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n, r.err
}

func (r *layerReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	if err := r.ctx.Err(); err != nil {
		r.err = err
		return 0, err
	}
	n, err := r.plain.Read(p)
	r.n += int64(n)
	r.diff.Hash().Write(p[:n])
	switch {
	case errors.Is(err, ErrLimit):
		r.err = fmt.Errorf("%s: %w", r.l.what, err)
	case err == io.EOF:
		r.err = r.check()
	case err != nil:
		r.err = fmt.Errorf("%s: after %d bytes: %w: %w", r.l.what, r.n, r.blame(err), ErrInvalid)
	}
	return n, r.err
}

// check compares sizes and digests at the end of the layer; io.EOF means that all is right.
func (r *layerReader) check() error {
	// What follows the compressed stream belongs to the blob.
	if _, err := io.Copy(io.Discard, &r.raw); err != nil {
		return fmt.Errorf("%s: read the rest: %w", r.l.what, err)
	}
	if err := r.blobDigest(); err != nil {
		return err
	}
	if got := r.diff.Digest(); got != r.l.DiffID {
		return &DigestError{What: r.l.what + ", uncompressed", Got: got, Want: r.l.DiffID}
	}
	return io.EOF
}

func (r *layerReader) blobDigest() error {
	if r.raw.hash == nil {
		return nil
	}
	if got := r.raw.hash.Digest(); got != r.l.Digest {
		return &DigestError{What: r.l.what, Got: got, Want: r.l.Digest}
	}
	return nil
}

// blame explains why decompression failed: mostly the blob is not what its digest says.
func (r *layerReader) blame(err error) error {
	if _, cerr := io.Copy(io.Discard, &r.raw); cerr != nil {
		return err
	}
	if derr := r.blobDigest(); derr != nil {
		return fmt.Errorf("%w (%w)", derr, err)
	}
	return err
}

func (r *layerReader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = fs.ErrClosed
	}
	if r.plain != nil {
		r.plain.Close()
	}
	return r.file.Close()
}
