package kernel

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange is BLKDISCARD or BLKZEROOUT, which take a pair of offset and length in bytes.
func ioctlRange(fd int, req uint, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&arg))); e != 0 {
		return e
	}
	return nil
}

// ioctlSize returns a block device's length in bytes.
func ioctlSize(fd int) (int64, error) {
	var n uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, e
	}
	return int64(n), nil
}

// alignedTo reports whether p begins at a multiple of n in memory.
func alignedTo(p []byte, n int64) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(n) == 0
}

// aligned returns n bytes that begin at a multiple of a page.
func aligned(n int) []byte {
	const page = 4096
	b := make([]byte, n+page)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % page)
	return b[skip : skip+n : skip+n]
}
