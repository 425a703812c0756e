// Package user is the pool engine whose data path runs in this process: it reads and writes the
// data device itself and keeps the metadata with package thin.
//
// How a request goes:
//
//	Thin.ReadAt    token -> table (lock-free) -> one pread a contiguous run
//	Thin.WriteAt   token -> table: mapped and not shared -> one pwrite a contiguous run
//	               else: block lock -> data block from the device's extent -> content
//	               (zeros, or the old block, with the caller's bytes) in one pwrite -> record
//	Flush          data sync, or a commit if mappings of this device are not durable yet
//
// A mapping that has been recorded is pending: it is in the device's table, which is what
// requests read, but not yet in the mapping tree. A commit closes the pending set:
//
//	pending entries of all devices -> trees (apply) -> Prepare
//	     data sync  |  WriteBlocks          at the same time
//	     WriteSuperblock
//	     blocks freed: wait for old requests, punch, release
//
// While it runs, new mappings gather in the next set.
//
// Tokens. Every request holds a token of its device, of the readers' or the writers' kind, from
// before its lookup until its I/O is done. A snapshot closes the writers' gate and waits for
// their tokens; a data block is released only when every token taken before it was freed is
// back. So a request that must wait for something that may itself wait for tokens (space, a
// commit, metadata) returns its token first and then looks up again.
//
// Lock order, outermost first:
//
//	compaction.mu, .opening           the pool's time is compacted; opening a device waits
//	space.tight                       a delete or a discard has the last metadata blocks; see tightly
//	token of a device                 see above
//	  Pool.applyMu                    pending sets to trees, create, snapshot, open, Prepare.
//	                                  Never taken by who holds a token; a snapshot takes it
//	                                  while gates are closed
//	  device.stripes                  one lock for every 256th block; several in rising order
//	    extent.mu                     data blocks set aside for the device
//	    table.fill                    one leaf at a time is read from the tree
//	      leaf.mu                     entries of 512 blocks; no I/O
//	        device.dirtyMu            list of leaves with pending entries
//	          Pool.dirtyMu            list of devices with such leaves
//	    thin.Metadata                 its own locks
//	Pool.mu                           open devices; no I/O
//	commits.mu, syncs.mu, space.mu    leaves
//
// Long-lived goroutines of a Pool, ended by Close: commitLoop (a commit one second after a
// change, or when the pending set is full) and releaseLoop (freed blocks).
package user
