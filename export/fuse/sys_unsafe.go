package fuse

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the hot path, without an allocation. The scheduler is told of them: a call
// that has to wait for memory must not keep a processor from the threads of other devices, whose
// work may be what frees the memory. Not telling it saves nothing that could be measured.

func sysRead(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(n), errno
}

func sysWrite(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(n), errno
}

// epollWait waits for one event without allocating. timeout is in milliseconds, -1 is for ever.
func epollWait(epfd int, ev *unix.EpollEvent, timeout int) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_EPOLL_WAIT, uintptr(epfd), uintptr(unsafe.Pointer(ev)), 1, uintptr(timeout), 0, 0)
	return int(n), errno
}
