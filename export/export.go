// Package export turns a dev.Device into something others can open: a block device node on this
// host, or a network block device. The transports are in the packages below it; this package
// holds what they have in common.
package export

import (
	"context"
	"errors"

	"mica/dev"
)

// Conditions that callers branch on.
var (
	// ErrBusy: the node is mounted or open; the error names by whom.
	ErrBusy = errors.New("device busy")
	// ErrExists: a live attachment, or a survivor, has this name.
	ErrExists = errors.New("attachment exists")
	// ErrNotFound: there is no survivor of this name.
	ErrNotFound = errors.New("no such attachment")
	// ErrUnavailable: this host cannot export this way; the error says what is missing.
	ErrUnavailable = errors.New("not available on this host")
)

// AttachOptions say how a device is exported.
type AttachOptions struct {
	ReadOnly bool
	// SectorSize is the node's logical sector size in bytes: 512 to 4096, a power of two; 0 is
	// 512. The device's size must be a multiple of it.
	SectorSize int
	// DirtyBytes bounds what the kernel keeps of writes to the node until it writes them back,
	// where it can (Linux 6.2); 0: as much as it likes. What is written in one go and then
	// unmounted is written back meanwhile, not in the end.
	DirtyBytes int64
}

// An Attachment is one exported device.
type Attachment interface {
	// Name is the name given to Attach: unique among live attachments of an exporter.
	Name() string
	// Node is the path of the kernel's block device ("/dev/loop7"). It is valid until Detach.
	// Minors are reused: give Link to others.
	Node() string
	// Link is the path to give to others ("/dev/mica/NAME"): it is gone before the minor is
	// reused. If the exporter keeps no links, it is Node.
	Link() string
	// Resize tells the kernel that the device's Size has changed.
	Resize(ctx context.Context) error
	// Detach takes the node away. If it is mounted or open it returns ErrBusy, naming the mount
	// or process where it can, and the attachment stays as it was. The device is flushed, not
	// closed.
	Detach(ctx context.Context) error
	// Done is closed when the attachment has ended: by Detach, by Close of the exporter, or
	// because the kernel's side was taken away by somebody else (an administrator's umount -f).
	Done() <-chan struct{}
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
