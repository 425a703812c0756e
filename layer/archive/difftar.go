package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// write writes the planned items.
func (d *differ) write(w io.Writer) (Stats, error) {
	tw := tar.NewWriter(w)
	s := &tarSink{d: d, tw: tw, first: map[uint64]string{}, buf: make([]byte, 256<<10)}
	for i := range d.items {
		it := &d.items[i]
		if !it.emit {
			continue
		}
		if err := d.ctx.Err(); err != nil {
			return s.stats, err
		}
		if err := s.item(it); err != nil {
			return s.stats, d.entryErr(it.path, err)
		}
	}
	if err := tw.Close(); err != nil {
		return s.stats, fmt.Errorf("write the end of the archive: %w", err)
	}
	return s.stats, nil
}

type tarSink struct {
	d     *differ
	tw    *tar.Writer
	first map[uint64]string // inode with several names: the one that carries the content
	buf   []byte
	stats Stats
}

func (s *tarSink) header(h *tar.Header) error {
	h.Format = tar.FormatPAX
	if err := s.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	s.stats.Entries++
	s.stats.Bytes += h.Size
	return nil
}

func (s *tarSink) item(it *item) error {
	if it.kind == itemWhiteout {
		dir, base := split(it.path)
		return s.header(&tar.Header{Typeflag: tar.TypeReg, Name: join(dir, whPrefix+base), ModTime: time.Unix(0, 0)})
	}
	if it.kind == itemDir {
		d, err := s.d.up.get(it.path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstat(d.fd, &st); err != nil {
			return err
		}
		h, err := headerOf(&st, xattrHandle{fd: d.fd})
		if err != nil {
			return err
		}
		h.Name = it.path + "/"
		if it.path == "" {
			h.Name = "./"
		}
		return s.header(h)
	}
	dir, base := split(it.path)
	d, err := s.d.up.get(dir)
	if err != nil {
		return err
	}
	st, err := fstatat(d.fd, base)
	if err != nil {
		return err
	}
	if it.links {
		if st.Ino != it.ino {
			return errors.New("changed while the tree was read")
		}
		if target, ok := s.first[it.ino]; ok {
			h, err := headerOf(&st, xattrHandle{fd: -2})
			if err != nil {
				return err
			}
			h.Typeflag, h.Name, h.Linkname, h.Size, h.Devmajor, h.Devminor = tar.TypeLink, it.path, target, 0, 0, 0
			return s.header(h)
		}
		s.first[it.ino] = it.path
	}
	h, err := headerOf(&st, xattrHandle{fd: -1, path: procPath(d.fd, base)})
	if err != nil {
		return err
	}
	h.Name = it.path
	if h.Typeflag == tar.TypeSymlink {
		if h.Linkname, err = readlinkat(d.fd, base); err != nil {
			return err
		}
	}
	if h.Typeflag != tar.TypeReg || h.Size == 0 {
		return s.header(h)
	}
	fd, err := openFile(d, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := s.header(h); err != nil {
		return err
	}
	return s.content(fd, h.Size)
}

// headerOf makes the header of an inode, all but its names. No attributes are read through a
// handle whose fd is -2.
func headerOf(st *unix.Stat_t, h xattrHandle) (*tar.Header, error) {
	hdr := &tar.Header{
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
	case unix.S_IFREG:
		hdr.Typeflag, hdr.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		hdr.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		hdr.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		hdr.Typeflag = tar.TypeBlock
	default:
		return nil, fmt.Errorf("file type %#o cannot be in a tar: %w", st.Mode&unix.S_IFMT, ErrInvalid)
	}
	if hdr.Typeflag == tar.TypeChar || hdr.Typeflag == tar.TypeBlock {
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if h.fd == -2 {
		return hdr, nil
	}
	attrs, err := layerXattrs(h)
	if err != nil {
		return nil, err
	}
	for name, v := range attrs {
		if strings.ContainsRune(name, '=') {
			return nil, fmt.Errorf("extended attribute %q cannot be in a tar: %w", name, ErrInvalid)
		}
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = map[string]string{}
		}
		hdr.PAXRecords[paxXattr+name] = string(v)
	}
	return hdr, nil
}

// content copies size bytes of fd; holes are not read.
func (s *tarSink) content(fd int, size int64) error {
	for off := int64(0); off < size; {
		if err := s.d.ctx.Err(); err != nil {
			return err
		}
		data, end := nextData(fd, off, size)
		for off < data {
			n := min(data-off, int64(len(zeros)))
			if err := s.write(zeros[:n]); err != nil {
				return err
			}
			off += n
		}
		for off < end {
			if err := s.d.ctx.Err(); err != nil {
				return err
			}
			n := min(end-off, int64(len(s.buf)))
			if err := preadFull(fd, s.buf[:n], off); err != nil {
				return err
			}
			if err := s.write(s.buf[:n]); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

func (s *tarSink) write(p []byte) error {
	if _, err := s.tw.Write(p); err != nil {
		return fmt.Errorf("write content: %w", err)
	}
	return nil
}

var zeros [64 << 10]byte

// nextData finds the next run of data at or after off: [data, end), both at most size. Where
// the file system does not tell, all is data.
func nextData(fd int, off, size int64) (data, end int64) {
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size
	}
	if err != nil || data > size {
		return off, size
	}
	end, err = unix.Seek(fd, data, unix.SEEK_HOLE)
	if err != nil || end > size || end <= data {
		return data, size
	}
	return data, end
}
