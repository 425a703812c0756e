package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rangeIoctl is BLKDISCARD or BLKZEROOUT, which take a pair of offset and length in bytes.
func rangeIoctl(f *os.File, code uintptr, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), code, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return fmt.Errorf("range [%d, +%d): %w", off, n, errno)
	}
	return nil
}
