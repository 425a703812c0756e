package ublk

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// withoutAdmin runs fn with CAP_SYS_ADMIN switched off for the calling thread, which the caller has
// locked. A device whose queues are armed like that is not searched for partitions when it is
// started: a container's device has none to be shown, and a server that were killed in the middle of
// the search would leave a device that can neither be adopted nor deleted.
func withoutAdmin(fn func() error) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var old, less [2]unix.CapUserData
	if err := unix.Capget(&hdr, &old[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	less = old
	less[unix.CAP_SYS_ADMIN/32].Effective &^= 1 << (unix.CAP_SYS_ADMIN % 32)
	if err := unix.Capset(&hdr, &less[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	err := fn()
	if cerr := unix.Capset(&hdr, &old[0]); cerr != nil && err == nil {
		err = fmt.Errorf("capset: %w", cerr)
	}
	return err
}
