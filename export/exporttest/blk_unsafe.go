package exporttest

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

func rangeIoctl(f *os.File, req uint, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}

// blkDiscard is BLKDISCARD, blkZeroout is BLKZEROOUT; off and n are bytes.
func blkDiscard(f *os.File, off, n int64) error { return rangeIoctl(f, unix.BLKDISCARD, off, n) }

func blkZeroout(f *os.File, off, n int64) error { return rangeIoctl(f, unix.BLKZEROOUT, off, n) }
