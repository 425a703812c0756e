// Package catalog keeps the one truth about which thin device of a pool is what: records of
// layers, containers, snapshots and images in one bbolt file beside the pool, and the rule that
// ties file and pool together through every crash:
//
//	the pool may hold more devices than the catalog, never fewer;
//	and only what the catalog intended is ever deleted.
//
// How a device comes and goes:
//
//	create   1  ids are reserved in batches (an intent, one commit of the file)
//	         2  the device is created, the pool commits
//	         3  the pool's transaction id goes from T to T+1
//	         4  the file commits the record, drops the id from the reservation, remembers T+1
//	         (2 and 3 are one commit where the pool can do both: CreateSnapsAt)
//	remove   1  as 3
//	         2  the file commits: record out, removal intent in, T+1
//	         3  the device is deleted in the background, the pool commits
//	         4  the file drops the intent; only now may the id be reserved again
//
// At open exactly the devices that an intent names (reserved, or to be removed) are deleted. A
// device that no record and no intent names is foreign: listed, never touched, its id never
// handed out. A record whose device is missing is broken, with everything made from it. A new
// file beside an old pool makes every device foreign.
//
// The steps with a transaction id are serialised; those that wait together share one step and
// one commit of the file. At open the pool may be ahead by one (a crash between 3 and 4). Ahead
// by more, ahead of a file that was closed in order, or behind: one of the two was restored from
// a copy. Then the catalog opens read-only and says which side is old.
//
// Ids are handed out from FirstID upwards: the low ones are left to people who make devices by
// hand, so that a reservation left by a crash does not name a device made in between.
//
// Lock order, outermost first:
//
//	committer goroutine      all writes of the file; pool commits happen in it, under no lock
//	  bbolt's writer lock
//	    Catalog.mu           queues, ids, broken set; leaf, no I/O
package catalog
