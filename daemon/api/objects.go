package api

import (
	"encoding/json"
	"time"

	"mica/engine"
	"mica/layer"
	"mica/thin"
)

// A List is one page of a listing. Next is the cursor of the next page, empty on the last one.
type List[T any] struct {
	Items []T    `json:"items"`
	Next  string `json:"next,omitempty"`
}

// A Container is the writable layer of an image.
type Container struct {
	layer.Container
	TTL Duration `json:"ttl,omitempty"` // in place of the embedded one, which is a number
}

// FromContainer makes the container to send.
func FromContainer(c layer.Container) Container {
	return Container{Container: c, TTL: Duration(c.TTL)}
}

// ForkResult is the answer to a fork.
type ForkResult struct {
	Containers []Container `json:"containers"`
	Level      layer.Level `json:"level"`
}

// An AttachmentOf is a container's attachment, with the container's name.
type AttachmentOf struct {
	Container string `json:"container"`
	layer.Attachment
}

// An OperationState says how far an operation is.
type OperationState string

// An operation goes from running to one of the others and stays there.
const (
	OperationRunning   OperationState = "running"
	OperationDone      OperationState = "done"
	OperationFailed    OperationState = "failed"
	OperationCancelled OperationState = "cancelled"
)

// An Operation is one piece of long work. It can be asked for until an hour after its end, and
// until the daemon ends.
type Operation struct {
	ID     string         `json:"id"`
	Kind   string         `json:"kind"` // "import", "commit", "trim", "check", "grow", "fork", "resize"
	Object string         `json:"object,omitempty"`
	State  OperationState `json:"state"`
	Start  time.Time      `json:"start"`
	End    *time.Time     `json:"end,omitempty"`
	// Steps are the parts that are known so far ("layer sha256:..."), with their progress.
	Steps []Step `json:"steps,omitempty"`
	// Result is what the work made; its type goes with the kind. Only when done.
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"` // failed and cancelled
}

// A Step is one part of an operation. Total is 0 as long as it is not known.
type Step struct {
	Name  string `json:"name"`
	Done  int64  `json:"done"`
	Total int64  `json:"total,omitempty"`
	Unit  string `json:"unit,omitempty"` // "bytes" or empty: a count
	Ended bool   `json:"ended,omitempty"`
}

// A TrimResult is the result of a trim of the pool.
type TrimResult struct {
	TrimmedBytes int64 `json:"trimmed_bytes"` // given back to the host
}

// A CheckResult is the result of a check of the pool as of its last commit.
type CheckResult struct {
	Clean bool `json:"clean"` // nothing but warnings
	thin.Report
}

// An ImportResult is the result of an import: the images of the archive.
type ImportResult struct {
	Images []Imported `json:"images"`
}

// Imported is one image that an import brought in.
type Imported struct {
	layer.Image
	NewLayers int  `json:"new_layers"` // that the store did not have
	Existed   bool `json:"existed"`    // the name stood for this very image already
}

// Pool is the daemon's pool.
type Pool struct {
	engine.Status
	Data     string `json:"data"`     // path of the data file or device
	Metadata string `json:"metadata"` // path of the metadata file or device
	// DataSpaceBytes is the whole, of which DataUsedBytes are mapped and DataFreeBytes can still be.
	DataSpaceBytes     int64 `json:"data_space_bytes"`
	DataUsedBytes      int64 `json:"data_used_bytes"`
	DataFreeBytes      int64 `json:"data_free_bytes"`
	MetadataSpaceBytes int64 `json:"metadata_space_bytes"`
	MetadataUsedBytes  int64 `json:"metadata_used_bytes"`
	MetadataFreeBytes  int64 `json:"metadata_free_bytes"`
	// HostFreeBytes is what the host's file system under the data file can still take, -1 if
	// the data is a block device.
	HostFreeBytes int64       `json:"host_free_bytes"`
	AutoExtend    *AutoExtend `json:"auto_extend,omitempty"`
}

// AutoExtend says when the pool's data file grows by itself.
type AutoExtend struct {
	ThresholdPercent int   `json:"threshold_percent"`
	StepPercent      int   `json:"step_percent"`
	MaxBytes         int64 `json:"max_bytes,omitempty"`
}

// Status is one look at the daemon.
type Status struct {
	Version   string    `json:"version"`
	PID       int       `json:"pid"`
	Started   time.Time `json:"started"`
	Root      string    `json:"root"`
	Run       string    `json:"run"`
	Config    string    `json:"config,omitempty"` // file that was read
	PoolName  string    `json:"pool_name"`
	Pool      Pool      `json:"pool"`
	Store     Store     `json:"store"`
	Exports   Exports   `json:"exports"`
	Running   int       `json:"operations_running"`
	LastEvent uint64    `json:"last_event"`
	// Backups says how the pool's metadata are backed up.
	Backups *BackupStatus `json:"backups,omitempty"`
	// MemoryBytes is the daemon's anonymous resident memory, MemoryLimitBytes the soft limit
	// given to the garbage collector.
	MemoryBytes      int64 `json:"memory_bytes"`
	MemoryLimitBytes int64 `json:"memory_limit_bytes"`
	// Notes are things that the operator should know ("no FUSE resend: ...").
	Notes []string `json:"notes,omitempty"`
}

// Store is the state of the layer store.
type Store struct {
	layer.Status
	Attachments []AttachmentOf `json:"attachments,omitempty"`
}

// ExportChoice is a way to export devices that was not chosen.
type ExportChoice struct {
	Kind string `json:"kind"`
	Why  string `json:"why"`
}

// Exports says how devices are exported on this host.
type Exports struct {
	Kind string `json:"kind"` // how nodes are made now: "dm", "ublk", "nbd" or "fuse"
	// NotChosen are the other ways, the better ones first, with the reason against each.
	NotChosen []ExportChoice `json:"not_chosen,omitempty"`
	// Resend: an attachment survives the death of the daemon without an I/O error.
	Resend bool `json:"resend"`
	// HolderPID is the process that keeps the descriptors meanwhile, 0 if there is none.
	HolderPID int    `json:"holder_pid,omitempty"`
	NBDSocket string `json:"nbd_socket,omitempty"`
	// NBDAddress is where NBD is served over TCP ("tls 0.0.0.0:10809", "127.0.0.1:10809"), empty
	// if it is not.
	NBDAddress string `json:"nbd_address,omitempty"`
	IOFlusher  bool   `json:"io_flusher"` // PR_SET_IO_FLUSHER is set
	// HostNamespaces is "yes", "no" or "unknown": whether the daemon sees the host's mounts and
	// processes.
	HostNamespaces string `json:"host_namespaces"`
}

// An Event tells what happened: to an object of the store (kind as in package layer), to the
// pool ("low_water_mark", "out_of_data_space", "data_space_available", "mode", "grow"), to an
// operation ("operation"), or to the daemon ("start", "stop"). IDs rise, also over restarts.
// An event of kind "lost" says that older ones than the next are no longer kept.
type Event struct {
	ID     uint64    `json:"id"`
	Time   time.Time `json:"time"`
	Kind   string    `json:"kind"`
	Object string    `json:"object,omitempty"` // "container/web", "image/debian:12", "pool", "operation/4f…"
	Detail string    `json:"detail,omitempty"`
}

// Event kinds beside those of the store and the pool.
const (
	EventLost      = "lost"
	EventStart     = "start"
	EventStop      = "stop"
	EventOperation = "operation"
	EventGrow      = "grow"
	EventHostSpace = "host_space"
)
