package dev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange issues a block device ioctl whose argument is a pair (offset, length) in bytes:
// BLKDISCARD, BLKZEROOUT.
func ioctlRange(fd int, req uint, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&arg))); e != 0 {
		return e
	}
	return nil
}

// ioctlSize64 returns a block device's length in bytes (BLKGETSIZE64).
func ioctlSize64(fd int) (int64, error) {
	var n uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(unix.BLKGETSIZE64), uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, e
	}
	return int64(n), nil
}
