package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
)

const (
	maxFiles = 200_000  // in an archive
	maxLinks = 10       // links that lead to one file
	maxName  = 4095     // bytes of a name in an archive, or of what a link leads to
	maxNames = 16 << 20 // bytes of all of them
)

// tarSource is an uncompressed tar in a file that can be read at any offset.
type tarSource struct {
	f     *os.File
	files map[string]extent
	links map[string]string // symbolic and hard links: older docker save makes them for equal layers
	names int64             // bytes of names and link targets
}

type extent struct{ off, size int64 }

// newTarSource reads the headers of the archive. It refuses names that are absolute, contain
// "..", or occur twice. f belongs to the source if there is no error.
func newTarSource(ctx context.Context, f *os.File) (*tarSource, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("stat the archive: %w", err)
	}
	size := st.Size()
	sr := io.NewSectionReader(f, 0, size)
	s := &tarSource{f: f, files: map[string]extent{}, links: map[string]string{}}
	tr := tar.NewReader(sr)
	last := ""
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return s, nil
		}
		if err != nil && !(errors.Is(err, tar.ErrInsecurePath) && hdr != nil) {
			if last == "" {
				return nil, fmt.Errorf("archive of %d bytes is not a tar: %w: %w", size, err, ErrInvalid)
			}
			return nil, fmt.Errorf("archive of %d bytes is damaged or cut short after %s: %w: %w", size, quote(last), err, ErrInvalid)
		}
		if n >= maxFiles {
			return nil, fmt.Errorf("archive of more than %d files: %w", maxFiles, ErrLimit)
		}
		off, err := sr.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if err := s.add(hdr, off, size); err != nil {
			return nil, fmt.Errorf("archive entry %s: %w", quote(hdr.Name), err)
		}
		last = hdr.Name
	}
}

func (s *tarSource) add(hdr *tar.Header, off, total int64) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if len(hdr.Linkname) > maxName {
		return fmt.Errorf("link target of %d bytes, at most %d: %w", len(hdr.Linkname), maxName, ErrLimit)
	}
	if s.names += int64(len(hdr.Name) + len(hdr.Linkname)); s.names > maxNames {
		return fmt.Errorf("names of more than %d bytes together: %w", maxNames, ErrLimit)
	}
	if hdr.Typeflag == tar.TypeDir {
		return nil
	}
	_, isFile := s.files[name]
	if _, isLink := s.links[name]; isFile || isLink {
		return fmt.Errorf("the name occurs twice: %w", ErrInvalid)
	}
	switch hdr.Typeflag {
	case tar.TypeReg:
		for k := range hdr.PAXRecords {
			if strings.HasPrefix(k, "GNU.sparse.") {
				return fmt.Errorf("stored as a sparse file: %w", ErrInvalid)
			}
		}
		if hdr.Size < 0 || hdr.Size > total-off {
			return fmt.Errorf("%d bytes, but the archive ends %d bytes after it begins; is it cut short? %w", hdr.Size, total-off, ErrInvalid)
		}
		s.files[name] = extent{off, hdr.Size}
	case tar.TypeSymlink, tar.TypeLink:
		target := hdr.Linkname
		if hdr.Typeflag == tar.TypeSymlink {
			target = path.Join(path.Dir(name), target)
		}
		if strings.HasPrefix(hdr.Linkname, "/") {
			target = hdr.Linkname
		}
		clean, err := cleanName(target)
		if err != nil || (hdr.Typeflag == tar.TypeSymlink && strings.HasPrefix(path.Clean(target), "..")) {
			return fmt.Errorf("link to %s, outside of the archive: %w", quote(hdr.Linkname), ErrInvalid)
		}
		s.links[name] = clean
	default:
		return fmt.Errorf("tar type %q in an image archive: %w", hdr.Typeflag, ErrInvalid)
	}
	return nil
}

func cleanName(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("empty name: %w", ErrInvalid)
	}
	if len(name) > maxName {
		return "", fmt.Errorf("name of %d bytes, at most %d: %w", len(name), maxName, ErrLimit)
	}
	if strings.HasPrefix(name, "/") {
		return "", fmt.Errorf("absolute name: %w", ErrInvalid)
	}
	for c := range strings.SplitSeq(name, "/") {
		if c == ".." {
			return "", fmt.Errorf(`".." in the name: %w`, ErrInvalid)
		}
	}
	return path.Clean(name), nil
}

func (s *tarSource) open(name string) (io.ReadCloser, int64, error) {
	at := path.Clean(name)
	for range maxLinks {
		if e, ok := s.files[at]; ok {
			return io.NopCloser(io.NewSectionReader(s.f, e.off, e.size)), e.size, nil
		}
		target, ok := s.links[at]
		if !ok {
			return nil, 0, fmt.Errorf("%s: %w", quote(name), fs.ErrNotExist)
		}
		at = target
	}
	return nil, 0, fmt.Errorf("%s: more than %d links: %w", quote(name), maxLinks, ErrInvalid)
}

func (s *tarSource) Close() error { return s.f.Close() }
