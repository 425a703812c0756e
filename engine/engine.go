// Package engine is the pool as the layers above see it: thin devices that are created,
// snapshotted, opened as block devices and deleted. Two implementations work on the same pool
// bytes: engine/user (the data path in this process) and engine/kernel (the dm-thin target).
package engine

import (
	"context"
	"errors"
	"time"

	"mica/dev"
	"mica/thin"
)

// Conditions that callers branch on, beside those of package dev and package thin.
var (
	// ErrInUse: the thin device is open, or the pool is held by somebody else.
	ErrInUse = errors.New("in use")
	// ErrFailed: a sync or a metadata write failed; the pool must be reopened and checked.
	ErrFailed = errors.New("pool failed: close it, check it and open it again")
)

// Mode is what a pool accepts, with the kernel's words for it.
type Mode int

const (
	ModeWrite          Mode = iota // rw
	ModeOutOfDataSpace             // out_of_data_space
	ModeOutOfMetaSpace             // ro (metadata reserve reached)
	ModeReadOnly                   // ro
	ModeFail                       // Fail
)

func (m Mode) String() string {
	switch m {
	case ModeWrite:
		return "rw"
	case ModeOutOfDataSpace:
		return "out_of_data_space"
	case ModeOutOfMetaSpace, ModeReadOnly:
		return "ro"
	}
	return "Fail"
}

// Status is one look at a pool. Blocks are data blocks of BlockSize bytes or metadata blocks
// of 4096 bytes; they are counted as of now, not as of the last commit.
type Status struct {
	Engine          string  `json:"engine"` // "user" or "kernel"
	Mode            string  `json:"mode"`
	NeedsCheck      bool    `json:"needs_check"`
	FailReason      string  `json:"fail_reason,omitempty"` // why the pool left mode rw for good
	BlockSize       int64   `json:"block_size"`            // bytes
	DataBlocks      uint64  `json:"data_blocks"`
	DataUsed        uint64  `json:"data_used"`     // mapped by some device
	DataReserved    uint64  `json:"data_reserved"` // handed to a writer or an extent, not mapped yet
	DataFreeing     uint64  `json:"data_freeing"`  // freed, waiting for a commit, readers or a punch
	MetaBlocks      uint64  `json:"metadata_blocks"`
	MetaUsed        uint64  `json:"metadata_used"`
	TransactionID   uint64  `json:"transaction_id"`
	Time            uint32  `json:"time"` // snapshot counter
	HeldRoot        uint64  `json:"held_root"`
	Devices         int     `json:"devices"`
	LowWaterMark    uint64  `json:"low_water_mark"` // free data blocks at which an event is sent
	ErrorIfNoSpace  bool    `json:"error_if_no_space"`
	WaitingForSpace int     `json:"waiting_for_space"` // writers
	Commits         uint64  `json:"commits"`           // since open
	DataFlushes     uint64  `json:"data_flushes"`
	MetaFlushes     uint64  `json:"metadata_flushes"`
	HostBytes       int64   `json:"host_bytes"` // what the data medium really occupies, -1 if unknown
	Journal         Journal `json:"journal"`
}

// Journal is what keeps acknowledged writes when only the process that serves the pool dies.
type Journal struct {
	State   string `json:"state"`             // "on", "off", or "waiting": left by an opener that was killed, the pool is read-only
	Path    string `json:"path,omitempty"`    // of its file, on tmpfs
	Bytes   int64  `json:"bytes,omitempty"`   // length of the file
	Entries uint64 `json:"entries,omitempty"` // changes, or runs of changes, since the last commit; or that wait
	// TakenOver is how many blocks had their mapping set or removed from the journal of an opener
	// that was killed, when the pool was opened.
	TakenOver uint64 `json:"taken_over"`
	Problem   string `json:"problem,omitempty"` // what was lost with an earlier journal, or why there is none
}

// EventKind says what happened to a pool.
type EventKind string

const (
	EventLowWater   EventKind = "low_water_mark"
	EventNoSpace    EventKind = "out_of_data_space"
	EventSpaceAgain EventKind = "data_space_available"
	EventMode       EventKind = "mode"
	EventJournal    EventKind = "journal" // taken over from an opener that was killed, or lost
)

// Event is sent when a pool crosses a mark or changes its mode.
type Event struct {
	Kind   EventKind `json:"kind"`
	Detail string    `json:"detail"`
}

// OpenOptions are the properties of a thin device that the pool does not store.
type OpenOptions struct {
	// SizeBytes is the length of the device, a multiple of 512. Blocks mapped beyond it are
	// hidden, not dropped.
	SizeBytes int64
	ReadOnly  bool
	// ExternalOrigin, if not nil, is read where nothing is mapped. It must not change while
	// it is used, and is not closed with the thin device.
	ExternalOrigin dev.Device
	// SpaceWait bounds how long writes of this handle wait for data blocks, from the moment at which
	// the first one has to; 0: as long as the pool's options say. Devices of the kernel engine wait as
	// their pool does.
	SpaceWait time.Duration
}

// A Thin is an opened thin device. Close it before its pool. In addition to dev.Device it
// discards, writes zeros, tells holes from data and serves mapped blocks without waiting.
type Thin interface {
	dev.Device
	dev.Discarder
	dev.Zeroer
	dev.Extenter
	dev.BlockSizer
	dev.Trier
	// WriteAtNoWait is WriteAt for a server whose requests may not all wait for space: where the
	// engine can tell, it returns dev.ErrNoSpace instead of waiting.
	WriteAtNoWait(p []byte, off int64) (int, error)
	ID() thin.DevID
	ReadOnly() bool
	// Resize changes the length in bytes; growing needs no I/O.
	Resize(sizeBytes int64) error
	// MappedBlocks counts what is mapped now, pending writes included.
	MappedBlocks() uint64
}

// SnapPair names one snapshot to take.
type SnapPair struct{ ID, Origin thin.DevID }

// A Pool is one opened pool of thin devices. Safe for concurrent use.
//
// Durability: CreateThin, CreateSnaps, Delete and SetTransactionID are durable when they
// return. Writes to thin devices are durable after a Flush of that device.
type Pool interface {
	// CreateThin makes an empty device. thin.ErrExists if the id is taken.
	CreateThin(ctx context.Context, id thin.DevID) error
	// CreateSnap makes id a copy of origin as of now: it holds every write acknowledged before
	// the call and none begun after the return. The origin may be open and busy.
	CreateSnap(ctx context.Context, id, origin thin.DevID) error
	// CreateSnaps takes several snapshots in one step and one commit; those of the same origin
	// are copies of the same moment. All or none.
	CreateSnaps(ctx context.Context, pairs []SnapPair) error
	// Delete removes a device in bounded steps. ErrInUse if it is open, thin.ErrNotFound if
	// there is none.
	Delete(ctx context.Context, id thin.DevID) error
	// SetTransactionID is compare-and-swap on the pool's transaction id.
	SetTransactionID(ctx context.Context, old, next uint64) error

	// Open opens a device. A device may be open once for writing, or several times read-only.
	Open(ctx context.Context, id thin.DevID, o OpenOptions) (Thin, error)
	Devices(ctx context.Context) ([]thin.DeviceInfo, error)
	// Device returns one device's details, pending writes included.
	Device(ctx context.Context, id thin.DevID) (thin.DeviceInfo, error)
	// HighestMapped returns the last virtual block that a device maps, pending writes included;
	// ok is false if it maps none.
	HighestMapped(ctx context.Context, id thin.DevID) (last thin.VBlock, ok bool, err error)
	// Delta lists the ranges in which two devices differ or agree, as of the last commit made
	// in the call. fn is called in order; left or right is "left_only", "right_only",
	// "different" or "same".
	Delta(ctx context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error
	// Usage counts, for every device, the blocks that only it maps (exclusive) and all it maps.
	Usage(ctx context.Context) (map[thin.DevID]thin.Usage, error)

	// Commit makes everything acknowledged so far durable and frees what was deleted.
	Commit(ctx context.Context) error
	// GrowData and GrowMetadata enlarge the pool (and, for files, the file). Sizes in bytes;
	// shrinking is refused.
	GrowData(ctx context.Context, sizeBytes int64) error
	GrowMetadata(ctx context.Context, sizeBytes int64) error
	// Trim gives free blocks back to the host and returns how many bytes it passed down.
	Trim(ctx context.Context) (int64, error)
	Status(ctx context.Context) (Status, error)
	// Events returns a channel of events from now on; cancel stops it.
	Events() (events <-chan Event, cancel func())
	// Close commits and closes. It fails with ErrInUse while thin devices are open.
	Close() error
}
