// Package export turns a dev.Device into something others can open: a block device node on this
// host, or a network block device. The transports are in the packages below it; this package
// holds what they have in common.
package export

import (
	"context"
	"errors"

	"mica/dev"
)

// ErrBusy: the node is mounted or open; the error names by whom.
var ErrBusy = errors.New("device busy")

// AttachOptions say how a device is exported.
type AttachOptions struct {
	ReadOnly bool
}

// An Attachment is one exported device.
type Attachment interface {
	// Name is the name given to Attach: unique among live attachments of an exporter.
	Name() string
	// Node is the path of the kernel's block device ("/dev/loop7"). It is valid until Detach.
	Node() string
	// Resize tells the kernel that the device's Size has changed.
	Resize(ctx context.Context) error
	// Detach takes the node away. If it is mounted or open it returns ErrBusy, naming the mount
	// or process where it can, and the attachment stays as it was. The device is flushed, not
	// closed.
	Detach(ctx context.Context) error
}

// An Exporter makes block device nodes of one kind.
type Exporter interface {
	// Kind is "fuse", "ublk", "nbd" or "dm".
	Kind() string
	// Attach exports d under a name that is new among live attachments.
	Attach(ctx context.Context, name string, d dev.Device, o AttachOptions) (Attachment, error)
	// Survivors lists attachments of a dead predecessor that are still there: their nodes exist,
	// their requests wait. Each must be adopted or dropped.
	Survivors(ctx context.Context) ([]string, error)
	// Adopt goes on serving a survivor from d, which must be the same device. Requests that the
	// predecessor had not answered are served again.
	Adopt(ctx context.Context, name string, d dev.Device) (Attachment, error)
	// Drop ends a survivor that nobody can serve any more: its requests fail.
	Drop(ctx context.Context, name string) error
	// Close stops serving. Attachments that are still there are left to the holder for a
	// successor to adopt, where the transport can do that.
	Close() error
}
