package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discard is the BLKDISCARD ioctl: a pair of offset and length in bytes.
func discard(f *os.File, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return fmt.Errorf("discard [%d, +%d): %w", off, n, errno)
	}
	return nil
}
