package dev

import (
	"errors"
	"fmt"
	"io"
)

// ErrLocked: another opener holds the device. Errors that wrap it name who, where that can be
// found out.
var ErrLocked = errors.New("locked by another opener")

// ErrUnsupported: the device, or the file system below it, cannot do this. Nothing was done.
var ErrUnsupported = errors.ErrUnsupported

// A Descriptor is a medium behind a file descriptor, through which it may be read as long as it is
// open.
type Descriptor interface {
	Descriptor() int
}

// A Resizer changes the length of a device in bytes. Bytes that are added read as zeros; those
// cut off are lost. The new length survives a Flush.
type Resizer interface {
	Resize(sizeBytes int64) error
}

// An Allocator makes sure that later writes to a range cannot fail for want of host space.
// Contents do not change.
type Allocator interface {
	Allocate(off, n int64) error
}

// A HostByter counts the bytes that a device really occupies on its host.
type HostByter interface {
	HostBytes() (int64, error)
}

// A DiscardZeroer says whether a range that Discard has taken reads as zeros from then on, which
// the contract of Discarder does not promise. The answer does not change.
type DiscardZeroer interface {
	DiscardZeroes() bool
}

// CheckRead returns how many of n bytes at off a read of a device of size bytes may transfer,
// and io.EOF with a smaller count when it reaches past the end.
func CheckRead(off int64, n int, size int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, ErrOutOfRange)
	}
	if n == 0 {
		return 0, nil
	}
	if off >= size {
		return 0, io.EOF
	}
	if int64(n) > size-off {
		return int(size - off), io.EOF
	}
	return n, nil
}

// zeros is the source of written zeros. It is never written to.
var zeros [1 << 20]byte

// writeZeros writes n zero bytes at off with plain writes.
func writeZeros(w io.WriterAt, off, n int64) error {
	for n > 0 {
		c := min(n, int64(len(zeros)))
		if _, err := w.WriteAt(zeros[:c], off); err != nil {
			return err
		}
		off, n = off+c, n-c
	}
	return nil
}
