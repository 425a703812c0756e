package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"mica/layer/archive"
)

// spool copies a stream to a file without a name in dir, so that nothing remains of it whatever
// happens. Of a compressed stream the file gets the plain contents.
func spool(ctx context.Context, r io.Reader, o Options) (*os.File, error) {
	dir := o.SpoolDir
	raw := &ctxReader{ctx: ctx, r: r}
	plain, kind, err := decompress(raw)
	if err != nil {
		return nil, fmt.Errorf("read the archive: %w", err)
	}
	defer plain.Close()
	if dir == "" {
		dir = os.TempDir()
	}
	f, err := unnamedFile(dir)
	if err != nil {
		return nil, fmt.Errorf("make a temporary file in %s: %w", dir, err)
	}
	stored := func() int64 { return raw.n }
	if kind == "" {
		stored = nil
	}
	n, err := io.Copy(f, archive.Unpacking(plain, stored, archive.Limits{MaxTar: o.MaxSpool, MaxRatio: o.MaxRatio, RatioFree: o.RatioFree}))
	if err != nil {
		f.Close()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("cut short: %w: %w", err, ErrInvalid)
		}
		return nil, fmt.Errorf("read the archive (%d bytes so far) into %s: %w", n, dir, err)
	}
	return f, nil
}

func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(unnamed)"), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	f, err := os.CreateTemp(dir, ".mica-spool-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ctxReader ends a copy between two reads when ctx is done.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
	n   int64 // bytes read
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
