package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// A source is the set of files that an archive or a directory holds. Safe for concurrent use.
type source interface {
	// open opens a regular file by its slash-separated name and tells its size in bytes. The
	// error is fs.ErrNotExist if there is none.
	open(name string) (io.ReadCloser, int64, error)
	Close() error
}

// dirSource is a directory. Links that lead out of it are not followed.
type dirSource struct{ root *os.Root }

func (d *dirSource) open(name string) (io.ReadCloser, int64, error) {
	// Without O_NONBLOCK a fifo would wait for a writer.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, 0, fmt.Errorf("%s: %w", quote(name), fs.ErrNotExist)
		}
		return nil, 0, fmt.Errorf("open %s: %w", quote(name), err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", quote(name), ErrInvalid)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

func (d *dirSource) Close() error { return d.root.Close() }

// readAll reads a whole file of at most limit bytes.
func readAll(s source, name string, limit int64) ([]byte, error) {
	r, size, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > limit {
		return nil, fmt.Errorf("%s: %d bytes, at most %d: %w", quote(name), size, limit, ErrLimit)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read %s: %w", quote(name), err)
	}
	return b, nil
}
