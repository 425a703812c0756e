// Package thin is the metadata of a thin pool: which devices there are, and where each virtual
// block of each device lives on the data device. The bytes are those of the kernel's dm-thin.
//
// Metadata is an opened metadata device. Changes gather in memory in the open transaction and
// become durable, all or none, at a commit: every block but the superblock goes to places that
// the committed state does not use, then one write of the superblock switches.
//
//	Prepare          closes the transaction, opens the next       (memory only)
//	WriteBlocks      everything but the superblock, flush         (the data sync may run beside it)
//	WriteSuperblock  superblock, flush: the new state is there
//
// Check, Dump, Restore and Delta read or write whole metadata devices.
package thin
