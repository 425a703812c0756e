package fuse

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// SetIOFlusher tells the kernel that this process is a part of the I/O path: when it needs memory,
// the kernel must not make it wait for writes that only it can serve, and must not throttle it
// for dirty pages that it is about to clean (PR_SET_IO_FLUSHER, Linux 5.6).
//
// The setting belongs to a thread, is inherited by threads and processes that it starts, and
// survives exec. A Go program has threads before main, so that a daemon calls this first and then
// replaces itself by execve from the same thread; it must stay locked to it in between:
//
//	if on, _ := fuse.IOFlusher(); !on && fuse.SetIOFlusher() == nil {
//		unix.Exec("/proc/self/exe", os.Args, os.Environ())
//	}
//
// The goroutine stays locked to its thread when SetIOFlusher returns nil. It needs
// CAP_SYS_RESOURCE; without it the error is EPERM, which a daemon reports in its status and lives
// with: bounded memory and direct I/O then have to do.
func SetIOFlusher() error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("PR_SET_IO_FLUSHER (needs CAP_SYS_RESOURCE): %w", err)
	}
	return nil
}

// IOFlusher reports whether the calling thread has the setting, and with it, in a process that
// did as SetIOFlusher says, all threads. The error is EPERM without CAP_SYS_RESOURCE.
func IOFlusher() (bool, error) {
	v, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	if err != nil {
		return false, fmt.Errorf("PR_GET_IO_FLUSHER (needs CAP_SYS_RESOURCE): %w", err)
	}
	return v == 1, nil
}
