package dev

import "unsafe"

// aligned reports whether p begins at a multiple of n.
func aligned(p []byte, n uintptr) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%n == 0
}
