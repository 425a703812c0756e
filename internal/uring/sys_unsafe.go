package uring

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

var ne = binary.NativeEndian

// cqeSize is the length of a completion entry in bytes.
const cqeSize = 16

// params is struct io_uring_params: what io_uring_setup is asked for, and answers.
type params struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFD uint32
	_                                                                  [3]uint32
	sqOff                                                              struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		_                                                           uint64
	}
	cqOff struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		_                                                           uint64
	}
}

func setup(p *params) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(p.sqEntries), uintptr(unsafe.Pointer(p)), 0)
	return int(fd), errno
}

// enter is io_uring_enter. The scheduler is told only of calls that wait.
func enter(fd int, submit, wait, flags uint32, blocks bool) (uint32, unix.Errno) {
	call := unix.RawSyscall6
	if blocks {
		call = unix.Syscall6
	}
	n, _, errno := call(unix.SYS_IO_URING_ENTER, uintptr(fd), uintptr(submit), uintptr(wait), uintptr(flags), 0, 0)
	return uint32(n), errno
}

// word is a counter that ring and kernel share, at an offset of the mapping.
func (r *Ring) word(off uint32) *uint32 {
	_ = r.ring[off+3]
	return (*uint32)(unsafe.Pointer(&r.ring[off]))
}

// Address is where memory given to the kernel in a command lies. The caller keeps p alive, and off
// the stack, until the command has completed.
func Address(p []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) }
