package thin

import "fmt"

// A DevID is the 24-bit number of a thin device.
type DevID uint32

// MaxDevID is the largest device id of the interface (spec: 24 bits).
const MaxDevID DevID = 1<<24 - 1

// A VBlock is a block of a thin device, in units of the pool's data block size.
type VBlock uint64

// A DataBlock is a block of the data device, in units of the pool's data block size.
type DataBlock uint64

// A Mapping says where a virtual block lives, and at which pool time it was inserted.
type Mapping struct {
	Block DataBlock
	Time  uint32
}

// MaxTime is the first value that the pool's snapshot counter must never reach: times are
// packed into 24 bits.
const MaxTime = 1 << 24

// Pack returns the on-disk value of m: the data block in the top 40 bits, the time in the low 24.
func (m Mapping) Pack() uint64 { return uint64(m.Block)<<24 | uint64(m.Time)&(MaxTime-1) }

// UnpackMapping is the inverse of Pack.
func UnpackMapping(v uint64) Mapping {
	return Mapping{Block: DataBlock(v >> 24), Time: uint32(v & (MaxTime - 1))}
}

func (m Mapping) String() string { return fmt.Sprintf("data block %d time %d", m.Block, m.Time) }

// An Entry is one mapping of a thin device with its virtual block.
type Entry struct {
	VBlock VBlock
	Mapping
}

// A DataRun is a run of Len data blocks from Begin.
type DataRun struct {
	Begin DataBlock
	Len   uint64
}

// End is the block after the run.
func (r DataRun) End() DataBlock { return r.Begin + DataBlock(r.Len) }

// Details is what the pool records about a thin device beside its mappings.
type Details struct {
	MappedBlocks    uint64 // entries of the device's mapping tree
	TransactionID   uint64 // the pool's transaction id when the device was created
	CreationTime    uint32 // the pool's time at creation
	SnapshottedTime uint32 // the pool's time when it last took part in a snapshot
}

// DeviceInfo is one line of a device listing.
type DeviceInfo struct {
	ID DevID
	Details
}
