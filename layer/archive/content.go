package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

const (
	zeroStep = 4096      // zeros are looked for in steps of a page
	minHole  = 16 * 1024 // shorter runs are written: an extent more costs more than it saves
)

var zeroPage [zeroStep]byte

// copyContent writes size bytes of the current entry to a new, empty file, leaving out runs of
// zeros: sparse files stay sparse, in whichever way the tar stored them.
func (a *applier) copyContent(fd int, size int64) error {
	var off int64
	hole := false // the file ends in one
	for off < size {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		p := a.buf
		if left := size - off; left < int64(len(p)) {
			p = p[:left]
		}
		n, err := io.ReadFull(a.tr, p)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("content ends after %d of %d bytes: %w", off+int64(n), size, err)
		}
		if hole, err = writeSparse(fd, p, off); err != nil {
			return fmt.Errorf("write at %d of %d bytes: %w", off, size, err)
		}
		off += int64(n)
	}
	if hole {
		if err := unix.Ftruncate(fd, size); err != nil {
			return fmt.Errorf("set size %d: %w", size, err)
		}
	}
	return nil
}

// writeSparse writes p at off, leaving out runs of zeros. hole says whether the end of p is
// one of them.
func writeSparse(fd int, p []byte, off int64) (hole bool, err error) {
	begin := 0 // of what is to be written next
	for i := 0; i < len(p); {
		run := zeroRun(p[i:])
		if run < minHole && i+run < len(p) { // a run at the end may go on in what follows
			i += max(run, zeroStep)
			continue
		}
		if i > begin {
			if err := pwriteAll(fd, p[begin:i], off+int64(begin)); err != nil {
				return false, err
			}
		}
		i += run
		begin = i
	}
	if begin == len(p) {
		return true, nil
	}
	return false, pwriteAll(fd, p[begin:], off+int64(begin))
}

// zeroRun returns how many bytes of zeros p begins with, in whole steps or to its end.
func zeroRun(p []byte) int {
	n := 0
	for n < len(p) {
		step := min(zeroStep, len(p)-n)
		if !bytes.Equal(p[n:n+step], zeroPage[:step]) {
			break
		}
		n += step
	}
	return n
}
