package nbd

import (
	"errors"
	"fmt"

	"mica/dev"
)

// Conditions that callers branch on.
var (
	// ErrExists: an export of that name is there already.
	ErrExists = errors.New("export exists")
	// ErrNotFound: there is no export of that name.
	ErrNotFound = errors.New("no such export")
	// ErrClosed: the server was closed.
	ErrClosed = errors.New("nbd server closed")
	// ErrInUse: another server answers on the socket.
	ErrInUse = errors.New("socket in use")
	// ErrTimeout: connections had to be cut off; the error says how many requests still hang in
	// the device.
	ErrTimeout = errors.New("requests in flight did not end in time")
)

// ExportOptions say how a device is exported.
type ExportOptions struct {
	ReadOnly bool
	// Network: clients that come through ListenTCP see it too. Others are only seen on Unix sockets.
	Network     bool
	Description string // shown to people by clients that list exports
	// CloseDevice closes the device once the export was removed or the server closed, and its
	// last connection has ended; it does not flush it. Otherwise the server never closes a device.
	CloseDevice bool
}

// ExportInfo is one line of a listing.
type ExportInfo struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	SizeBytes   int64  `json:"size_bytes"`
	ReadOnly    bool   `json:"read_only"`
	Connections int    `json:"connections"`
}

// An export is a device under a name. Immutable.
type export struct {
	name        string
	description string
	readOnly    bool
	network     bool
	closeDevice bool
	d           dev.Device
	preferred   uint32 // block size in bytes

	// What the device can do beside dev.Device; nil where it cannot.
	discarder dev.Discarder
	zeroer    dev.Zeroer
	extenter  dev.Extenter
	trier     dev.Trier
}

func newExport(name string, d dev.Device, o ExportOptions) (*export, error) {
	if err := checkString(name, "export name"); err != nil {
		return nil, err
	}
	if err := checkString(o.Description, "description"); err != nil {
		return nil, err
	}
	if n := d.Size(); n < 0 || n%minBlock != 0 {
		return nil, fmt.Errorf("export %q: size of %d bytes is not a multiple of %d", name, n, minBlock)
	}
	e := &export{name: name, description: o.Description, readOnly: o.ReadOnly, network: o.Network, closeDevice: o.CloseDevice,
		d: d, preferred: 4096}
	e.discarder, _ = d.(dev.Discarder)
	e.zeroer, _ = d.(dev.Zeroer)
	e.extenter, _ = d.(dev.Extenter)
	e.trier, _ = d.(dev.Trier)
	if b, ok := d.(dev.BlockSizer); ok {
		e.preferred = preferredBlock(b.BlockSize())
	}
	return e, nil
}

// preferredBlock is the largest power of two that divides the device's block size and is not
// below minBlock nor above maxPayload, as the protocol wants it.
func preferredBlock(n int64) uint32 {
	if n <= 0 {
		return 4096
	}
	return uint32(min(max(n&-n, minBlock), maxPayload))
}

// findsHoles: Extents is cheap enough to be asked on reads. See the package comment.
func (e *export) findsHoles() bool { return e.extenter != nil && e.trier != nil }
