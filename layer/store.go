// Package layer is the layer store: image layers, containers, snapshots and images, each a thin
// device of one pool with a file system on it, and the catalog that says which is which.
//
// The lowest layer of every image is a snapshot of the base (an empty file system made once per
// pool), every layer a snapshot of its parent, a container a snapshot of its image's top layer.
// Nothing here opens or mounts a device node that this process serves: what can wait for one
// runs in a helper process (package layer/helper).
package layer

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/export"
	"mica/layer/archive"
	"mica/thin"
)

// Conditions that callers branch on. Every error names the object and the numbers.
var (
	// ErrExists: the name is taken by an object with other parameters.
	ErrExists = errors.New("already exists")
	// ErrNotFound: there is no such object.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: a name, size, label or option that cannot be used.
	ErrInvalid = errors.New("invalid")
	// ErrInUse: something else needs the object (an image with containers, a layer with
	// children), or it is attached where it must be detached.
	ErrInUse = errors.New("in use")
	// ErrBusy: the node is mounted or open; the error names by whom.
	ErrBusy = export.ErrBusy
	// ErrReadOnly: the store was opened read-only; the error says why.
	ErrReadOnly = dev.ErrReadOnly
	// ErrBroken: the object's thin device, or one that it was made from, is missing.
	ErrBroken = errors.New("broken")
	// ErrGuestOwned: the file system was written by a guest and the host was not told to trust it.
	ErrGuestOwned = errors.New("file system belongs to a guest")
	// ErrDigest: the contents of a layer do not have the digest they should have.
	ErrDigest = errors.New("digest mismatch")
	// ErrNoSpace: the pool has too little free space for the operation.
	ErrNoSpace = dev.ErrNoSpace
	// ErrState: the object is not in the state that the operation needs (a commit of a view).
	ErrState = errors.New("wrong state")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store closed")
)

// DefaultBaseSize is the size in bytes of the base device unless Options.BaseSize says another.
const DefaultBaseSize = 10 << 30

// Options say how a store is opened.
type Options struct {
	// Root is the directory of the store's own files; the catalog is Root/catalog.db unless
	// Catalog names another file.
	Root    string
	Catalog string
	// Run is the directory of what does not outlive a reboot (freeze records).
	Run string
	// Pool is open and stays the caller's: closed after the store.
	Pool engine.Pool
	// Exporter makes block device nodes, and their links. It is the store's from Open on, and
	// closed by Store.Close: requests must be over before their devices are closed.
	Exporter export.Exporter
	// NBD serves devices as network block devices. Nil: Attach with AsNBD is refused.
	NBD NBDServer
	// BaseSize is the size in bytes of the base device if it must be made (10 GiB if 0), FSType
	// its file system ("ext4" if empty, or "xfs"). A store that has a base keeps it.
	BaseSize int64
	FSType   string
	// MountOptions are added to the mount options of every container ("context=...").
	MountOptions []string
	// Discard adds the mount option discard: blocks of deleted files are freed at once.
	Discard bool
	// HelperCommand is the program and first arguments of the helper role, for example
	// {"/proc/self/exe", "helper"}.
	HelperCommand []string
	// HelperTimeout bounds one short helper operation (mount, freeze, resize; 60 s if 0). Apply
	// and diff are bounded by progress instead: StallTimeout without a byte (5 min if 0).
	HelperTimeout time.Duration
	StallTimeout  time.Duration
	// Limits bound what a layer may bring; what is zero has a default.
	Limits archive.Limits
	// AcceptPool opens a store for writing although catalog and pool are not of the same moment
	// (one was restored from a copy): the catalog takes over the pool's transaction id, its
	// intents are dropped and nothing is deleted.
	AcceptPool bool
	// NoTrim leaves out the fstrim of a new layer before it is committed.
	NoTrim bool
	Logger *slog.Logger // nil: slog.Default()
}

// An NBDServer serves devices as network block devices: on a Unix socket, and over TCP those that
// are to be.
type NBDServer interface {
	// Serve exports d under a name that is new among live exports.
	Serve(ctx context.Context, name string, d dev.Device, o NBDOptions) (NBDExport, error)
}

// NBDOptions of one device.
type NBDOptions struct {
	ReadOnly bool
	TCP      bool // over TCP too, as the server was set up for it
}

// An NBDExport is one device that an NBDServer serves.
type NBDExport interface {
	// URI is what clients connect to ("nbd+unix:///name?socket=/run/mica/nbd.sock",
	// "nbds://192.0.2.1:10809/name").
	URI() string
	// Clients counts open connections.
	Clients() int
	// Close disconnects the clients and stops serving. The device is flushed, not closed.
	Close(ctx context.Context) error
}

// OwnerMica owns what was made by the everyday commands. Others are "containerd/<snapshotter>".
const OwnerMica = "mica"

// A Layer is one committed image layer. It never changes.
type Layer struct {
	// ChainID is "sha256:..."; "block:..." of what a guest wrote, "shared:..." of what snapshotters
	// share and nobody here has verified.
	ChainID   string            `json:"chain_id"`
	Parent    string            `json:"parent,omitempty"` // chain id; empty: the base
	DiffID    string            `json:"diff_id,omitempty"`
	Device    thin.DevID        `json:"device"`
	SizeBytes int64             `json:"size_bytes"` // length of the device
	Owner     string            `json:"owner"`
	Labels    map[string]string `json:"labels,omitempty"`
	Created   time.Time         `json:"created"`
	// UsedBytes is what was provisioned since the snapshot of the parent, less what was discarded.
	UsedBytes int64  `json:"used_bytes"`
	Broken    string `json:"broken,omitempty"` // why it cannot be used
}

// An Image is a name for a top layer with the configuration that goes with it.
type Image struct {
	Name    string `json:"name"`
	ChainID string `json:"chain_id"` // top layer
	// Config is the OCI image configuration, byte for byte.
	Config json.RawMessage `json:"config"`
	// Digest is that of the manifest (or of the configuration, where the archive has no
	// manifest), "sha256:...".
	Digest    string            `json:"digest"`
	MediaType string            `json:"media_type,omitempty"`
	Platform  string            `json:"platform,omitempty"` // "linux/amd64"
	Labels    map[string]string `json:"labels,omitempty"`
	Owner     string            `json:"owner"`
	Created   time.Time         `json:"created"` // when it came into the store
	// Layers are the chain ids, lowest first, and UsedBytes what they hold together.
	Layers    []string `json:"layers"`
	UsedBytes int64    `json:"used_bytes"`
	Broken    string   `json:"broken,omitempty"`
}

// A Container is the writable device made from an image.
type Container struct {
	Name       string            `json:"name"`
	ID         string            `json:"id"` // never reused, also not by a container of the same name
	Image      string            `json:"image,omitempty"`
	ChainID    string            `json:"chain_id"` // of the layer it was made from
	Device     thin.DevID        `json:"device"`
	SizeBytes  int64             `json:"size_bytes"`
	FSType     string            `json:"fs_type"`
	Owner      string            `json:"owner"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`
	TTL        time.Duration     `json:"ttl,omitempty"`
	Expires    *time.Time        `json:"expires,omitempty"`
	GuestOwned bool              `json:"guest_owned,omitempty"`
	// UsedBytes is what was provisioned since the container was made, less what was discarded.
	UsedBytes  int64       `json:"used_bytes"`
	Snapshots  int         `json:"snapshots"`
	Attachment *Attachment `json:"attachment,omitempty"`
	Broken     string      `json:"broken,omitempty"`
}

// Level says how consistent a copy of a file system is.
type Level string

const (
	LevelFileSystem Level = "file-system"     // frozen, or not mounted: as after a clean unmount
	LevelCrash      Level = "crash"           // as after power loss; the journal was replayed where allowed
	LevelCaller     Level = "caller-quiesced" // as the caller left it
)

// A Snapshot is a named moment of a container.
type Snapshot struct {
	Container  string            `json:"container"`
	Name       string            `json:"name"`
	ID         string            `json:"id"`
	ChainID    string            `json:"chain_id"` // of the layer below the container
	Device     thin.DevID        `json:"device"`
	SizeBytes  int64             `json:"size_bytes"`
	Level      Level             `json:"level"`
	Labels     map[string]string `json:"labels,omitempty"`
	Created    time.Time         `json:"created"`
	GuestOwned bool              `json:"guest_owned,omitempty"`
	UsedBytes  int64             `json:"used_bytes"` // provisioned in the snapshot itself (journal replay)
	Broken     string            `json:"broken,omitempty"`
}

// As is a kind of attachment.
type As string

const (
	AsBlock As = "block" // a block device node of this host
	AsNBD   As = "nbd"   // an NBD export, for a virtual machine
)

// An Attachment says where a container's device can be opened. It lasts until Detach or Remove,
// also over a restart of the daemon.
type Attachment struct {
	As       As   `json:"as"`
	ReadOnly bool `json:"read_only,omitempty"`
	// TCP: an NBD export that is served over TCP too; URI is its address there.
	TCP bool   `json:"tcp,omitempty"`
	ID  string `json:"id"`
	// Node is the kernel's block device ("/dev/loop7"), Link the name to give to others
	// ("/dev/mica/<id>"): it is never reused and goes away before the node does. Both are empty
	// with AsNBD.
	Node string `json:"node,omitempty"`
	Link string `json:"link,omitempty"`
	URI  string `json:"uri,omitempty"` // AsNBD only
	// FSType and MountOptions are what to mount it with.
	FSType       string   `json:"fs_type"`
	MountOptions []string `json:"mount_options,omitempty"`
	// Mounts are the directories that NoteMount told of; a hint.
	Mounts []string `json:"mounts,omitempty"`
}

// CreateOptions describe a new container.
type CreateOptions struct {
	Name, Image string
	SizeBytes   int64 // 0: that of the image; smaller than the image's is ErrInvalid
	Labels      map[string]string
	TTL         time.Duration // 0: none
	Owner       string        // empty: OwnerMica
}

// UpdateOptions change a container; nil fields stay.
type UpdateOptions struct {
	Labels map[string]*string // nil value: remove the label
	TTL    *time.Duration     // counted from now; 0: none
}

// AttachOptions say how a container is exported.
type AttachOptions struct {
	As         As // empty: AsBlock
	ReadOnly   bool
	TCP        bool // AsNBD: serve it over TCP too, if the server has a TCP listener
	TrustGuest bool // AsNBD: do not mark the container as owned by a guest
}

// RemoveOptions of Remove.
type RemoveOptions struct {
	// Deferred: a container that is busy is taken out of the lists at once, and detached and
	// deleted by the background queue when it is free. Without it Remove returns ErrBusy.
	Deferred bool
	// Snapshots: remove the container's snapshots too. Without it they make ErrInUse.
	Snapshots bool
}

// DetachOptions of Detach.
type DetachOptions struct {
	// Deferred: if it is busy, the background queue goes on trying; the call still returns ErrBusy.
	Deferred bool
}

// QuiesceOptions say what a copy of a container that is in use may rely on.
type QuiesceOptions struct {
	// Quiesced: the caller has made the contents consistent and keeps them so during the call.
	Quiesced bool
	// CrashOK: where the file system cannot be frozen, a crash-consistent copy will do. Without
	// it that is an error, but for guest-owned devices and NBD, whose copies are always so.
	CrashOK bool
	// TrustGuest: the host may mount (replay, walk, trim) a guest-owned file system.
	TrustGuest bool
}

// SnapshotOptions of Snapshot.
type SnapshotOptions struct {
	Name   string // empty: a name is made from the time
	Labels map[string]string
	QuiesceOptions
}

// ForkOptions of Fork.
type ForkOptions struct {
	Names  []string
	Labels map[string]string // nil: those of the source
	TTL    time.Duration
	QuiesceOptions
}

// ForkResult of Fork.
type ForkResult struct {
	Containers []Container `json:"containers"`
	Level      Level       `json:"level"`
}

// CommitOptions of Commit.
type CommitOptions struct {
	Image   string // name of the new image; an existing one is moved only with Replace
	Replace bool
	Author  string
	Comment string
	Labels  map[string]string
	QuiesceOptions
}

// CommitResult of Commit.
type CommitResult struct {
	Image Image `json:"image"`
	Level Level `json:"level"`
}

// DiffOptions of Diff.
type DiffOptions struct {
	Snapshot string // diff this snapshot of the container instead of its state now
	QuiesceOptions
}

// LayerSpec names a layer to apply. ParentChain is empty for the lowest layer.
type LayerSpec struct {
	ParentChain string
	ChainID     string
	DiffID      string // digest of the uncompressed tar
	Labels      map[string]string
}

// ImageSpec describes an image to register.
type ImageSpec struct {
	Name      string
	ChainID   string // its layers were applied in the same import, or are there already
	Config    []byte
	Digest    string
	MediaType string
	Platform  string
	Labels    map[string]string
	Replace   bool // move an existing name; without it a name with another digest is ErrExists
}

// An Import is an image on its way into the store. The layers that it applied or looked up are
// held until Commit or Abort; after Abort, or a crash, those that no image needs are removed.
// Safe for concurrent use.
type Import interface {
	// Layer returns a layer if the store has it, and holds it. ErrNotFound otherwise.
	Layer(ctx context.Context, chainID string) (Layer, error)
	// ApplyLayer makes a layer from an uncompressed layer tar. r is read to its end; any error
	// of r (a digest that does not match, a cut archive) fails the layer, and nothing of it is
	// visible. The store checks the digest of what it read against DiffID (ErrDigest). If the
	// store has the chain id already, r is not read and the existing layer is returned. Two
	// calls with one chain id at the same time make one layer. Cancelling ctx undoes it.
	ApplyLayer(ctx context.Context, s LayerSpec, r io.Reader) (Layer, error)
	// Commit registers the image and ends the import. Repeating it with the same name and
	// digest gives the existing image.
	Commit(ctx context.Context, s ImageSpec) (Image, error)
	// Abort ends the import; after Commit it does nothing.
	Abort(ctx context.Context) error
}

// Filter selects from a listing. All conditions must hold; zero values select everything.
type Filter struct {
	Owner  string            // empty: OwnerMica; "*": everybody
	Labels map[string]string // value "": the label exists
	Image  string            // containers only
	Prefix string            // of the name
	Limit  int               // 0: all
	Cursor string            // names after this one
}

// DF is how the pool's space is used. Bytes of data blocks.
type DF struct {
	BlockSize  int64     `json:"block_size"`
	TotalBytes int64     `json:"total_bytes"`
	UsedBytes  int64     `json:"used_bytes"`
	FreeBytes  int64     `json:"free_bytes"`
	Entries    []DFEntry `json:"entries"`
}

// DFEntry is one device of DF.
type DFEntry struct {
	Kind           string     `json:"kind"` // "base", "layer", "container", "snapshot", "removing", "foreign"
	Name           string     `json:"name"`
	Owner          string     `json:"owner,omitempty"`
	Device         thin.DevID `json:"device"`
	MappedBytes    int64      `json:"mapped_bytes"`
	ExclusiveBytes int64      `json:"exclusive_bytes"` // only this device maps it: freed by its removal
	SharedBytes    int64      `json:"shared_bytes"`
	UsedBytes      int64      `json:"used_bytes"` // provisioned since its snapshot, less discarded
}

// QueueItem is one piece of background work.
type QueueItem struct {
	Kind     string     `json:"kind"` // "delete", "detach", "expire"
	Object   string     `json:"object"`
	Device   thin.DevID `json:"device"`
	Since    time.Time  `json:"since"`
	Attempts int        `json:"attempts"`
	Running  bool       `json:"running"`
	LastErr  string     `json:"last_error,omitempty"`
}

// Status is one look at a store.
type Status struct {
	StoreID       string       `json:"store_id"`
	Catalog       string       `json:"catalog"`
	ReadOnly      string       `json:"read_only,omitempty"` // why
	TransactionID uint64       `json:"transaction_id"`
	FSType        string       `json:"fs_type"`
	BaseSize      int64        `json:"base_size"`
	BaseReady     bool         `json:"base_ready"`
	BaseError     string       `json:"base_error,omitempty"`
	Images        int          `json:"images"`
	Layers        int          `json:"layers"`
	Containers    int          `json:"containers"`
	Snapshots     int          `json:"snapshots"`
	Snaps         int          `json:"containerd_snapshots"` // of all snapshotters and kinds
	Attached      int          `json:"attached"`
	Broken        []string     `json:"broken,omitempty"`  // "container web: device 65541 is missing"
	Foreign       []thin.DevID `json:"foreign,omitempty"` // devices that the catalog does not know
	Reserved      int          `json:"reserved"`          // ids reserved for the next objects
	Queue         []QueueItem  `json:"queue,omitempty"`
}

// Event kinds: what happened to an object.
const (
	EventCreate   = "create"
	EventRemove   = "remove" // out of the lists; its blocks are freed later
	EventDeleted  = "deleted"
	EventAttach   = "attach"
	EventDetach   = "detach"
	EventSnapshot = "snapshot"
	EventFork     = "fork"
	EventRollback = "rollback"
	EventCommit   = "commit"
	EventResize   = "resize"
	EventUpdate   = "update"
	EventImport   = "import"
	EventExpire   = "expire"
	EventBroken   = "broken"
	EventBase     = "base"
)

// An Event tells what happened. IDs rise, also over restarts.
type Event struct {
	ID     uint64    `json:"id"`
	Kind   string    `json:"kind"`
	Object string    `json:"object"` // "container/web", "image/debian:12", "snapshot/web/one", "layer/sha256:..."
	Time   time.Time `json:"time"`
	Detail string    `json:"detail,omitempty"`
}

// API is what a *Store offers (see Open); callers may code and test against it. Safe for
// concurrent use: operations on different objects run in parallel, those on one object wait for
// each other. Cancelling the context of an operation that has not finished undoes it. What a
// call returned without error is durable.
type API interface {
	BeginImport(ctx context.Context) (Import, error)
	Images(ctx context.Context, f Filter) ([]Image, error)
	Image(ctx context.Context, name string) (Image, error)
	// RemoveImage takes the name away and removes the layers that nothing needs any more.
	// Containers made from the image keep theirs.
	RemoveImage(ctx context.Context, name string) error
	// TagImage gives an image a further name.
	TagImage(ctx context.Context, name, newName string) (Image, error)
	Layers(ctx context.Context) ([]Layer, error)
	Layer(ctx context.Context, chainID string) (Layer, error)

	// Create makes a container. If there is one with the same name and parameters, it is
	// returned with created false; with others the error is ErrExists.
	Create(ctx context.Context, o CreateOptions) (c Container, created bool, err error)
	Containers(ctx context.Context, f Filter) ([]Container, error)
	Container(ctx context.Context, name string) (Container, error)
	Update(ctx context.Context, name string, o UpdateOptions) (Container, error)
	// Remove removes a container: out of the catalog at the return, its blocks are freed in the
	// background (Queue, WaitQueue). It is detached first; ErrBusy names who holds it.
	Remove(ctx context.Context, name string, o RemoveOptions) error

	// Attach exports a container's device; attached already in the same way, it returns that.
	Attach(ctx context.Context, name string, o AttachOptions) (Attachment, error)
	// Detach takes the node away. ErrBusy names the mount or process that holds it. A container
	// that is not attached is no error.
	Detach(ctx context.Context, name string, o DetachOptions) error
	// NoteMount and ForgetMount keep the list of where a container's node was mounted.
	NoteMount(ctx context.Context, name, dir string) error
	ForgetMount(ctx context.Context, name, dir string) error

	// Snapshot keeps the container's contents as of now.
	Snapshot(ctx context.Context, name string, o SnapshotOptions) (Snapshot, error)
	Snapshots(ctx context.Context, name string) ([]Snapshot, error)
	RemoveSnapshot(ctx context.Context, name, snap string) error
	// Fork makes copies of a container, all of the same moment, also while it is in use.
	Fork(ctx context.Context, name string, o ForkOptions) (ForkResult, error)
	// Rollback gives a detached container the contents of a snapshot, which stays.
	Rollback(ctx context.Context, name, snap string) (Container, error)
	// Commit makes a new image from a container: its image's layers and one more. The container
	// goes on unchanged. A guest-owned container gives a layer without a diff id.
	Commit(ctx context.Context, name string, o CommitOptions) (CommitResult, error)
	// Diff writes what the container changed, against its layer, as an OCI layer tar.
	Diff(ctx context.Context, name string, w io.Writer, o DiffOptions) (Level, error)
	// Resize enlarges a container's device and file system, mounted or not. Shrinking is ErrInvalid.
	Resize(ctx context.Context, name string, sizeBytes int64) (Container, error)

	DF(ctx context.Context) (DF, error)
	Status(ctx context.Context) (Status, error)
	// Queue lists background work; WaitQueue waits until all of it that can make progress is done.
	Queue() []QueueItem
	WaitQueue(ctx context.Context) error
	// Events returns the events after id (0: from now on; older ones as far as they are kept).
	// A reader that is too slow loses the oldest: ids then have a gap.
	Events(after uint64) (events <-chan Event, cancel func())
	// Close stops background work and closes the exporter, with which attachments stay for a
	// successor. Other operations must be over.
	Close() error
}
