package helper

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// setThreadName sets the name of the calling thread, at most 15 bytes.
func setThreadName(name string) {
	var b [16]byte
	copy(b[:15], name)
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
}
