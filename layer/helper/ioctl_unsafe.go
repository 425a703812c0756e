package helper

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of linux/fs.h and the ext4 documentation.
const (
	ioctlFreeze     = 0xc0045877 // FIFREEZE
	ioctlThaw       = 0xc0045878 // FITHAW
	ioctlTrim       = 0xc0185879 // FITRIM
	ioctlExt4Resize = 0x40086610 // EXT4_IOC_RESIZE_FS
)

func freezeFD(fd int) error { return unix.IoctlSetInt(fd, ioctlFreeze, 0) }

func thawFD(fd int) error { return unix.IoctlSetInt(fd, ioctlThaw, 0) }

// trimFD discards all free space of a file system and returns how many bytes that was.
func trimFD(fd int) (int64, error) {
	r := struct{ start, len, minLen uint64 }{len: ^uint64(0)}
	err := ioctlPtr(fd, ioctlTrim, unsafe.Pointer(&r))
	return int64(r.len), err
}

// resizeExt4FD grows a mounted ext4 to blocks of its block size.
func resizeExt4FD(fd int, blocks uint64) error {
	return ioctlPtr(fd, ioctlExt4Resize, unsafe.Pointer(&blocks))
}

func ioctlPtr(fd int, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
	runtime.KeepAlive(arg)
	if errno != 0 {
		return errno
	}
	return nil
}
