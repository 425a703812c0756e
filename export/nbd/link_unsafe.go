package nbd

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// recvfrom receives into p without waiting.
func recvfrom(fd int, p []byte) (int, syscall.Errno) {
	n, _, errno := syscall.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// iovec describes b, which is not empty.
func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// advance drops the first n bytes of iov.
func advance(iov []unix.Iovec, n int) []unix.Iovec {
	for n > 0 {
		v := &iov[0]
		if uint64(n) < v.Len {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return iov
		}
		n -= int(v.Len)
		iov = iov[1:]
	}
	return iov
}

// sendmsg sends from several buffers without waiting and without SIGPIPE. iov is not empty.
func sendmsg(fd int, iov []unix.Iovec) (int, syscall.Errno) {
	var h unix.Msghdr
	h.Iov = &iov[0]
	h.SetIovlen(len(iov))
	n, _, errno := syscall.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return int(n), errno
}

// readable tells whether a receive would not wait: data, the end of the stream, or an error.
func readable(fd int) bool {
	var b byte
	for {
		_, _, errno := syscall.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b)), 1, unix.MSG_DONTWAIT|unix.MSG_PEEK, 0, 0)
		if errno != unix.EINTR {
			return errno != unix.EAGAIN
		}
	}
}
