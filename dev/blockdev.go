package dev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Block is a kernel block device: pread, pwrite, fdatasync, BLKDISCARD and BLKZEROOUT on one
// descriptor, and a second one for large writes while there are syncs (see direct). Safe for concurrent use.
//
// Requests go through the page cache, but for those, and may have any offset and length; Discard and
// WriteZeroes need multiples of the logical sector size.
type Block struct {
	path       string
	fd         int
	busy       inflight
	size       atomic.Int64
	direct     *direct
	discardMax int64 // bytes of one discard request; 0 = the device does not discard
}

// OpenBlock opens a block device. With o.Lock it is opened with O_EXCL, so that it is refused
// (ErrLocked, naming the holder) while it is mounted, part of another device, or opened the
// same way by somebody else; and nothing can mount it while it is open.
func OpenBlock(path string, o OpenOptions) (*Block, error) {
	flags := 0
	if o.Lock {
		flags |= unix.O_EXCL
	}
	fd, err := openFd(path, o, flags)
	if errors.Is(err, unix.EBUSY) {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			return nil, blockHolder(path, st.Rdev)
		}
	}
	if err != nil {
		return nil, err
	}
	b := &Block{path: path, fd: fd}
	if err := b.init(o); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return b, nil
}

func (b *Block) init(o OpenOptions) error {
	var st unix.Stat_t
	if err := unix.Fstat(b.fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: b.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("open %s: not a block device", b.path)
	}
	if o.Lock {
		if err := lockFd(b.fd, b.path); err != nil {
			return err
		}
	}
	size, err := ioctlSize64(b.fd)
	if err != nil {
		return &os.PathError{Op: "size of", Path: b.path, Err: err}
	}
	b.size.Store(size)
	b.discardMax = discardMax(st.Rdev)
	if !o.ReadOnly {
		b.direct = newDirect(b.fd)
	}
	return nil
}

// discardMax reads the queue limit; a partition has its disk's.
func discardMax(rdev uint64) int64 {
	sys := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
	for _, p := range []string{"queue", "../queue"} {
		v, err := os.ReadFile(filepath.Join(sys, p, "discard_max_bytes"))
		if err != nil {
			continue
		}
		n, _ := strconv.ParseInt(strings.TrimSpace(string(v)), 10, 64)
		return n
	}
	return 0
}

// Path is the path that the device was opened by.
func (b *Block) Path() string { return b.path }

func (b *Block) Descriptor() int { return b.fd }

func (b *Block) Size() int64 { return b.size.Load() }

func (b *Block) ReadAt(p []byte, off int64) (int, error) {
	if !b.busy.enter() {
		return 0, ErrClosed
	}
	defer b.busy.leave()
	n, end := CheckRead(off, len(p), b.size.Load())
	if err := preadFull(b.fd, p[:n], off); err != nil {
		return 0, &os.PathError{Op: "read", Path: b.path, Err: err}
	}
	return n, end
}

func (b *Block) WriteAt(p []byte, off int64) (int, error) {
	if !b.busy.enter() {
		return 0, ErrClosed
	}
	defer b.busy.leave()
	if err := CheckRange(off, int64(len(p)), b.size.Load()); err != nil {
		return 0, fmt.Errorf("write %s: %w", b.path, err)
	}
	n, err := b.direct.pwrite(b.fd, p, off)
	if err != nil {
		return n, &os.PathError{Op: "write", Path: b.path, Err: err}
	}
	return n, nil
}

// Flush is fdatasync: it writes back the page cache of the device and flushes its write cache.
func (b *Block) Flush() error {
	if !b.busy.enter() {
		return ErrClosed
	}
	defer b.busy.leave()
	b.direct.flushed()
	return sysOp("fdatasync", b.path, func() error { return unix.Fdatasync(b.fd) })
}

// Discard tells the device that the range is not needed. What reads return afterwards is
// undefined. ErrUnsupported if the device does not discard.
func (b *Block) Discard(off, n int64) error {
	if !b.busy.enter() {
		return ErrClosed
	}
	defer b.busy.leave()
	if err := CheckRange(off, n, b.size.Load()); err != nil {
		return fmt.Errorf("discard %s: %w", b.path, err)
	}
	if b.discardMax == 0 {
		return fmt.Errorf("discard %s: %w", b.path, ErrUnsupported)
	}
	if n == 0 {
		return nil
	}
	return sysOp("discard", b.path, func() error { return ioctlRange(b.fd, unix.BLKDISCARD, off, n) })
}

// WriteZeroes zeroes whole sectors with BLKZEROOUT, which offloads it where the device can, and
// the rest with plain writes. The kernel decides whether space is freed.
func (b *Block) WriteZeroes(off, n int64, keepAllocated bool) error {
	if !b.busy.enter() {
		return ErrClosed
	}
	defer b.busy.leave()
	if err := CheckRange(off, n, b.size.Load()); err != nil {
		return fmt.Errorf("write zeroes %s: %w", b.path, err)
	}
	const sector = 4096 // multiple of every logical sector size in use
	begin, end := (off+sector-1)/sector*sector, (off+n)/sector*sector
	if begin >= end {
		return writeZeros(b, off, n)
	}
	if err := writeZeros(b, off, begin-off); err != nil {
		return err
	}
	if err := writeZeros(b, end, off+n-end); err != nil {
		return err
	}
	return sysOp("zero", b.path, func() error { return ioctlRange(b.fd, unix.BLKZEROOUT, begin, end-begin) })
}

// Allocate does nothing: a block device has the space that it shows.
func (b *Block) Allocate(off, n int64) error { return nil }

// Resize takes the device's present length, at most sizeBytes: a block device is made longer by
// whoever owns it, not here. It fails if the device is shorter than sizeBytes.
func (b *Block) Resize(sizeBytes int64) error {
	if !b.busy.enter() {
		return ErrClosed
	}
	defer b.busy.leave()
	now, err := ioctlSize64(b.fd)
	if err != nil {
		return &os.PathError{Op: "size of", Path: b.path, Err: err}
	}
	if now < sizeBytes {
		return fmt.Errorf("resize %s to %d bytes: the block device has %d bytes: %w", b.path, sizeBytes, now, ErrOutOfRange)
	}
	b.size.Store(now)
	return nil
}

// Close waits for requests in flight and drops the locks with the descriptor.
func (b *Block) Close() error {
	if !b.busy.close() {
		return nil
	}
	b.direct.close()
	if err := unix.Close(b.fd); err != nil {
		return &os.PathError{Op: "close", Path: b.path, Err: err}
	}
	return nil
}

// Open opens a regular file or a block device, whichever path is.
func Open(path string, o OpenOptions) (Device, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch {
	case st.Mode().IsRegular():
		f, err := OpenFile(path, o)
		if err != nil {
			return nil, err
		}
		return f, nil
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		b, err := OpenBlock(path, o)
		if err != nil {
			return nil, err
		}
		return b, nil
	}
	return nil, fmt.Errorf("open %s: neither a regular file nor a block device", path)
}
