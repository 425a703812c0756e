package thin

// A DeltaRange is a run of virtual blocks in which two devices compare alike.
type DeltaRange struct {
	Kind  string // "same", "different", "left_only" or "right_only"
	Begin VBlock
	Len   uint64
	// Left and Right are the data blocks at Begin, where mapped; they advance with the run.
	Left, Right DataBlock
}

// Usage counts the data blocks of one device.
type Usage struct {
	Mapped    uint64 // entries of its mapping tree
	Exclusive uint64 // data blocks that no other mapping names
}
