package btree

// Levels bounds the levels above the leaves of a tree with so many entries, whose leaves hold
// at least leafMin each unless the leaf is the root.
func Levels(entries, leafMin uint64) uint64 {
	const innerMin = (4096 - headerSize) / 16 / 3 // of 252 places
	levels := uint64(0)
	for n := entries / leafMin; n >= 2; n /= innerMin {
		levels++
	}
	return levels
}

// MaxNew bounds the new nodes that a transaction can hold at once in a tree of values of size
// bytes that never has more than so many entries, after touched keys were inserted, changed or
// removed: two leaves a key, two nodes above each, but never more than the whole tree at its
// minimum fill.
func MaxNew(entries, touched uint64, size int) uint64 {
	const innerMin = (4096 - headerSize) / 16 / 3
	leafMin := uint64(MaxEntries(size) / 3)
	levels := Levels(entries, leafMin)
	allLeaves := entries/leafMin + 1
	leaves := min(2*touched, allLeaves)
	inner := min(2*touched*levels+1, allLeaves/(innerMin-1)+1)
	return leaves + inner + 2*levels // what one operation holds in between
}
