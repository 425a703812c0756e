package journal

import (
	"sync/atomic"
	"unsafe"
)

// word is the word at off of a mapping, for atomic access. off is a multiple of 8, b begins at one.
func word(b []byte, off int) *atomic.Uint64 {
	_ = b[off+7]
	return (*atomic.Uint64)(unsafe.Pointer(&b[off]))
}
