package ublk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The copies between a request and a buffer, without an allocation. They do not wait, but for
// memory.

func sysPread(fd int, p []byte, off int64) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(off), 0, 0)
	return int(n), errno
}

func sysPwrite(fd int, p []byte, off int64) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(off), 0, 0)
	return int(n), errno
}

// rwfNowait: what is not in the page cache is not waited for.
const rwfNowait = 8

func sysPreadNow(fd int, p []byte, off int64) (int, unix.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))}
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, rwfNowait)
	return int(n), errno
}
