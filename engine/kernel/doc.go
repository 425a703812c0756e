// Package kernel is the engine that leaves the data path to the kernel: the pool is a thin-pool
// target of device-mapper and every open thin device a thin target, driven by ioctls
// (internal/dmioctl). The bytes of the pool are those of engine/user: a pool closed by one is
// opened by the other as it is.
//
// # Names
//
// Every device of ours is called, and has the UUID, mica-POOL-..., where POOL is made from the
// identity of the metadata device (file: device and inode; block device: its number), so that a
// process finds what a dead predecessor left:
//
//	mica-3f9c0d21aa-pool       the pool
//	mica-3f9c0d21aa-65537      thin device 65537, writable: one at most
//	mica-3f9c0d21aa-65537-r4   a read-only one of the same
//
// # Where the truth is
//
// Creating, snapshotting, deleting and transaction ids are messages; the kernel commits after
// each. What no message tells (which devices there are, what they map) is read from the metadata
// device beside the kernel: short looks from the committed state, repeated if a commit came in
// between (view.go), long ones through the metadata snapshot, which this process owns and
// shares among its readers.
//
// # The death of the process
//
// The pool and its thin devices stay, and what is mounted goes on without a pause. The next Open
// takes over the pool (leftover.go): nothing of it is made anew, so no mounted device notices.
//
// Lock order, outermost first:
//
//	names      one operation on a thin device at a time; several are taken in order of the ids
//	  tableMu  reloads and suspends of the pool itself, trims
//	    mu     maps of Pool; a leaf, nothing waits under it
package kernel
