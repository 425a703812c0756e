// Package journal keeps the changes of a pool's mappings that no commit has made durable yet,
// outside the process: in a file on tmpfs, which outlives the process and not the machine.
//
// When only the process that serves a pool dies, the kernel and the containers live on and
// remember every acknowledged write, flushed or not. The contents of blocks are safe: they went
// to the page cache of the data device. What died with the process is where they are: mappings
// set and removed since the last commit. The journal holds these, and nothing else; devices that
// are created, snapshots, deletes, growth and transaction ids are acknowledged after their commit.
//
// The file:
//
//	┌────────┬───────┬──────────┬──────────┬──────────────────┬──────────────────┐
//	│ header │ state │ gen. 0   │ gen. 1   │ slots of area 0  │ slots of area 1  │
//	└────────┴───────┴──────────┴──────────┴──────────────────┴──────────────────┘
//	 identity failed, number, follows,      32 bytes a change or run of changes
//	 boot id  done    to come
//
// Generations are numbered and take turns in the two areas. One is open and takes new changes. A
// commit closes it and opens the other one, which names the superblock on the medium at that
// moment (it follows it), and, before the commit writes block 0, the superblock to come. So a
// reader that finds on the medium
//
//	the superblock that the newest generation follows   takes both generations
//	the superblock to come                              takes the newest generation only
//	any other                                           takes nothing, and says so
//
// Once the superblock to come is known to be written, the one before it is among the others too:
// somebody has put back an older copy of the pool.
//
// Changes may be in the newest generation although the commit that it belongs to has them: taking
// the last change of each block gives the same mappings again.
//
// Appending takes no lock and allocates nothing: a slot is taken by an atomic addition, filled,
// and made valid by one atomic store of a word that holds its checksum and the number of its
// generation. A kill can leave slots that are taken and not valid: a reader skips them. The order
// of two changes is that of their generations, then that of their slots; whoever changes a block
// twice appends twice, one after the other.
//
// Version 1 is the first version. A build reads its own version and the one before it; what a
// newer build has left is refused, not skipped.
package journal
