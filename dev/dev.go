// Package dev defines block devices as everything above sees them: byte offsets at the
// interface, a small core, and optional extras found by type assertion.
package dev

import (
	"errors"
	"fmt"
	"io"
)

// Conditions that callers branch on. Implementations wrap them with the operation, the
// device and the numbers.
var (
	// ErrNoSpace: the request needs a block and there is none. Exports answer ENOSPC.
	ErrNoSpace = errors.New("no space left")
	// ErrReadOnly: the device, or the pool under it, does not accept changes. Exports answer EROFS.
	ErrReadOnly = errors.New("read-only")
	// ErrClosed: the device was closed, or is being closed.
	ErrClosed = errors.New("device closed")
	// ErrOutOfRange: the request does not lie inside the device, or is not aligned as required.
	ErrOutOfRange = errors.New("request out of range")
	// ErrWouldBlock: a Try method would have had to allocate, wait or copy; nothing was done.
	ErrWouldBlock = errors.New("request would block")
)

// A Device is a block device. Offsets and lengths are bytes; implementations accept any
// offset and length inside the device (exports enforce their own sector alignment).
//
// ReadAt and WriteAt follow io.ReaderAt and io.WriterAt: n < len(p) means err != nil, a read
// that reaches past the end returns io.EOF, p is not kept after the return. A write that
// reaches past the end fails with ErrOutOfRange and writes nothing.
//
// Safe for concurrent use. Requests that overlap and run at the same time are not ordered.
//
// Durability: when Flush returns nil, every write to this device that was acknowledged before
// Flush began survives power loss, whichever goroutine or connection made it. There is no FUA
// here: an export makes one from WriteAt followed by Flush.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Size is the length in bytes.
	Size() int64
	Flush() error
	// Close waits for requests in flight. It does not flush. Closing twice returns nil.
	Close() error
}

// A Discarder takes hints that a range is no longer needed. What a read of the range returns
// afterwards is undefined (old contents or zeros, never another device's data). Ranges are
// rounded inward to whole blocks.
type Discarder interface {
	Discard(off, n int64) error
}

// A Zeroer makes a range read as zeros; that survives a Flush like any write. With
// keepAllocated the blocks stay allocated (NBD's NO_HOLE), without it they may be freed.
type Zeroer interface {
	WriteZeroes(off, n int64, keepAllocated bool) error
}

// An Extent is a run of bytes of one kind.
type Extent struct {
	Off, Len int64
	Hole     bool // nothing is allocated here; reads return zeros (or the external origin)
	Zero     bool // reads return zeros
}

// An Extenter tells holes from data.
type Extenter interface {
	// Extents describes [off, off+n) in order, without gaps. It may stop early (the last
	// extent then ends before off+n), never before it has described at least one byte.
	Extents(off, n int64) ([]Extent, error)
}

// A BlockSizer names the size in bytes of the allocation unit: the preferred request size and
// the granularity of Discard.
type BlockSizer interface {
	BlockSize() int64
}

// A Trier serves requests that can be done at once with plain reads and writes of mapped
// blocks. Otherwise it returns ErrWouldBlock having done nothing, and the caller hands the
// request to a goroutine that may block in ReadAt or WriteAt.
type Trier interface {
	TryReadAt(p []byte, off int64) error
	TryWriteAt(p []byte, off int64) error
}

// A TryFlusher makes everything acknowledged before the call durable if that takes no more than a
// sync of the medium. Otherwise it returns ErrWouldBlock having done nothing, and the caller hands
// the request to a goroutine that calls Flush.
type TryFlusher interface {
	TryFlush() error
}

// A Placer tells where on a medium a range lies, for callers that read it themselves.
type Placer interface {
	// PlaceRead pins the range for one read. False if the range is not mapped as a whole and in
	// one piece, or if there is something to wait for.
	PlaceRead(off, n int64) (Place, bool)
}

// A Place is where a range lies. It stays the range's until Release, however the device changes.
type Place struct {
	FD     int   // of the medium, for pread and the like; not to be closed
	Off    int64 // bytes
	Pinner Pinner
	Token  uint32 // the Pinner's own
}

// A Pinner keeps a place.
type Pinner interface{ Unpin(token uint32) }

// Release must be called once, when the read is over.
func (p *Place) Release() {
	p.Pinner.Unpin(p.Token)
	p.Pinner = nil
}

// CheckRange returns ErrOutOfRange unless [off, off+n) lies inside a device of size bytes.
// It is safe against overflow.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("bytes [%d, +%d) of a device of %d bytes: %w", off, n, size, ErrOutOfRange)
	}
	return nil
}
