package fuse

import (
	"errors"
	"fmt"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// Modes of fallocate that the kernel passes on.
const (
	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10
)

// zeroPiece is how much is written at once where a device cannot zero a range itself.
const zeroPiece = 1 << 20

// fallocate makes a range read as zeros, whatever the mode: the loop driver sends both discards
// and zero-outs as holes to punch (0x03), and zero-outs that shall keep their blocks as ranges to
// zero (0x11).
func (s *server) fallocate(r *request) error {
	if s.readOnly {
		return dev.ErrReadOnly
	}
	keep := false
	switch r.flags {
	case fallocPunchHole | fallocKeepSize:
	case fallocZeroRange | fallocKeepSize, fallocZeroRange:
		keep = true
	default:
		// Allocating ahead of writes (0x00, 0x01) is not something a device can do.
		return fmt.Errorf("fallocate mode %#x: %w", r.flags, dev.ErrUnsupported)
	}
	size := uint64(s.size.Load())
	if r.off >= size {
		if keep && r.flags&fallocKeepSize == 0 && r.n > 0 {
			return unix.EFBIG // the file does not grow
		}
		return nil
	}
	n := r.n
	if n > size-r.off {
		if r.flags&fallocKeepSize == 0 {
			return unix.EFBIG
		}
		n = size - r.off
	}
	err := fmt.Errorf("punch hole: %w", dev.ErrUnsupported)
	if s.zero != nil {
		err = s.zero.WriteZeroes(int64(r.off), int64(n), keep)
	}
	if !keep || !errors.Is(err, dev.ErrUnsupported) {
		return err
	}
	// An unsupported zero-out is an I/O error in the kernel's log: write zeros instead.
	zeros := make([]byte, min(n, zeroPiece))
	for off, end := r.off, r.off+n; off < end; off += uint64(len(zeros)) {
		p := zeros[:min(uint64(len(zeros)), end-off)]
		if _, err := s.d.WriteAt(p, int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// seek finds the first data (SEEK_DATA) or hole (SEEK_HOLE) at or after off. The end of the file
// counts as a hole.
func (s *server) seek(off int64, whence uint32) (int64, error) {
	size := s.size.Load()
	if whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return 0, unix.EINVAL
	}
	if off < 0 || off >= size {
		return 0, unix.ENXIO
	}
	if s.ext == nil {
		if whence == unix.SEEK_HOLE {
			return size, nil
		}
		return off, nil
	}
	for at := off; at < size; {
		list, err := s.ext.Extents(at, size-at)
		if errors.Is(err, dev.ErrUnsupported) {
			list, err = []dev.Extent{{Off: at, Len: size - at}}, nil
		}
		if err != nil {
			return 0, err
		}
		if len(list) == 0 {
			return 0, fmt.Errorf("extents at %d: none", at)
		}
		for _, e := range list {
			if e.Len <= 0 || e.Off > at {
				return 0, fmt.Errorf("extents at %d: [%d, +%d)", at, e.Off, e.Len)
			}
			hole := e.Hole && e.Zero
			if e.Off+e.Len > at {
				if hole == (whence == unix.SEEK_HOLE) {
					return at, nil
				}
				at = e.Off + e.Len
			}
		}
	}
	if whence == unix.SEEK_HOLE {
		return size, nil
	}
	return 0, unix.ENXIO
}
