// Package crossing writes pools by script: the same list of operations runs on the kernel's
// dm-thin inside a test machine and on mica's engine on the host, and a model says what every
// device must hold afterwards. Contents are patterns that name the write they came from, so a
// wrong sector tells whose it is.
package crossing

import (
	"fmt"
	"io"
)

// SectorSize is the unit of writes and discards in scripts, in bytes.
const SectorSize = 512

// Kinds of operations.
const (
	CreateThin     = "create_thin"            // Dev, Size
	CreateSnap     = "create_snap"            // Dev, Origin
	Delete         = "delete"                 // Dev
	Write          = "write"                  // Dev, Off, Len, Seed
	Scatter        = "scatter"                // Dev, Off, Len, Stride, Count, Seed: Count writes of Len bytes, Stride apart
	Discard        = "discard"                // Dev, Off, Len: whole blocks inside are unmapped, the rest stays
	Zero           = "write_zeroes"           // Dev, Off, Len: reads as zeros; whole blocks may be unmapped
	Flush          = "flush"                  // Dev
	Commit         = "commit"                 //
	SetTransaction = "set_transaction_id"     // Old, New
	Reserve        = "reserve_metadata_snap"  //
	Release        = "release_metadata_snap"  //
	GrowData       = "grow_data"              // Size
	GrowMetadata   = "grow_metadata"          // Size
	Reopen         = "close_and_open_devices" //
)

// An Op is one operation. Off, Len, Stride and Size are bytes.
type Op struct {
	Kind   string `json:"op"`
	Dev    uint32 `json:"dev,omitempty"`
	Origin uint32 `json:"origin,omitempty"`
	Size   int64  `json:"size,omitempty"`
	Off    int64  `json:"off,omitempty"`
	Len    int64  `json:"len,omitempty"`
	Stride int64  `json:"stride,omitempty"`
	Count  int64  `json:"count,omitempty"`
	Seed   uint32 `json:"seed,omitempty"`
	Old    uint64 `json:"old,omitempty"`
	New    uint64 `json:"new,omitempty"`
}

func (o Op) String() string {
	switch o.Kind {
	case CreateThin:
		return fmt.Sprintf("%s %d of %d bytes", o.Kind, o.Dev, o.Size)
	case CreateSnap:
		return fmt.Sprintf("%s %d %d", o.Kind, o.Dev, o.Origin)
	case Write, Discard, Zero:
		return fmt.Sprintf("%s %d [%d, +%d) seed %d", o.Kind, o.Dev, o.Off, o.Len, o.Seed)
	case Scatter:
		return fmt.Sprintf("%s %d %d times [%d, +%d) every %d seed %d", o.Kind, o.Dev, o.Count, o.Off, o.Len, o.Stride, o.Seed)
	case SetTransaction:
		return fmt.Sprintf("%s %d %d", o.Kind, o.Old, o.New)
	case GrowData, GrowMetadata:
		return fmt.Sprintf("%s to %d bytes", o.Kind, o.Size)
	case Delete, Flush:
		return fmt.Sprintf("%s %d", o.Kind, o.Dev)
	}
	return o.Kind
}

// A Pool is what a script runs on.
type Pool interface {
	CreateThin(id uint32) error
	CreateSnap(id, origin uint32) error // origin may be open
	Delete(id uint32) error             // the device is closed
	SetTransactionID(old, next uint64) error
	ReserveMetadataSnap() error
	ReleaseMetadataSnap() error
	Open(id uint32, sizeBytes int64) (Thin, error)
	Commit() error
	GrowData(sizeBytes int64) error
	GrowMetadata(sizeBytes int64) error
}

// A Thin is an open thin device.
type Thin interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Discard(off, n int64) error
	WriteZeroes(off, n int64) error
	Close() error
}
