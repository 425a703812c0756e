// Package repair makes a pool again from whatever of its metadata can be read. The damaged device
// is only read; the result goes to another one.
//
// It works in this order:
//
//	roots     which trees belong together: from the superblock, from what a damaged superblock
//	          says, or by a search through all blocks
//	forest    every node of every mapping tree is looked at once, however many devices share it
//	claims    a data block that two owners claim, and that no snapshot explains, is left to the
//	          newest one, or treated as shared: two devices never write the same block
//	build     a mapping tree without damage is taken over as it is, with everything that it shares;
//	          of a damaged one the readable leaves are, below new internal nodes
//	assemble  new trees of devices, new space maps, the superblock last
//
// Space maps are never believed. The metadata snapshot is dropped.
//
// What is lost is known from the keys above it, and reported by device and range.
package repair
