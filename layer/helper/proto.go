package helper

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"syscall"

	"mica/layer/archive"
)

// Operations.
const (
	opMkfs   = "mkfs"
	opApply  = "apply"
	opDiff   = "diff"
	opFreeze = "freeze"
	opThaw   = "thaw"
	opReplay = "replay"
	opGrow   = "grow"
	opTrim   = "trim"
	opProbe  = "probe"
	opMount  = "mount"   // in the daemon's mount namespace
	opUmount = "unmount" // in the daemon's mount namespace
)

// A Request is what a helper is asked to do.
type Request struct {
	Op      string   `json:"op"`
	Node    string   `json:"node,omitempty"`
	Lower   string   `json:"lower,omitempty"`  // diff: the node of the tree below; empty: an empty tree
	Dir     string   `json:"dir,omitempty"`    // an existing directory to mount under
	Target  string   `json:"target,omitempty"` // mount, unmount
	FSType  string   `json:"fs_type,omitempty"`
	Options []string `json:"options,omitempty"` // mount options beside those that the operation needs
	Trim    bool     `json:"trim,omitempty"`    // apply: give unused blocks back at the end
	UUID    string   `json:"uuid,omitempty"`    // mkfs
	// Limits are apply's.
	Limits archive.Limits `json:"limits,omitzero"`
	// Changed is diff's archive.DiffOptions.Changed; null is not the same as an empty list.
	Changed []archive.InodeRange `json:"changed"`
	// FreezeMS is how long a freeze lasts at the most, in milliseconds; Record is a file that the
	// helper keeps locked (flock) for as long as it lives.
	FreezeMS int64  `json:"freeze_ms,omitempty"`
	Record   string `json:"record,omitempty"`
}

// A Response is an answer, or a part of one.
type Response struct {
	Err       *wireError `json:"error,omitempty"`
	State     State      `json:"state,omitempty"`
	Entries   int64      `json:"entries,omitempty"`
	Bytes     int64      `json:"bytes,omitempty"`
	Trimmed   int64      `json:"trimmed,omitempty"`
	Recovered bool       `json:"recovered,omitempty"`
	Warnings  []string   `json:"warnings,omitempty"`
}

// A State is what a freeze or probe found.
type State string

const (
	StateIdle     State = "idle"      // nobody has it mounted or claimed
	StateBusy     State = "busy"      // probe: mounted, or claimed by somebody
	StateFrozen   State = "frozen"    // frozen now
	StateThawed   State = "thawed"    // thawed when asked
	StateExpired  State = "expired"   // thawed because its time was over
	StateReadOnly State = "read-only" // mounted read-only: nothing to freeze
	StateForeign  State = "foreign"   // claimed by something that is not a file system the host can mount
)

// wireError carries an error over the pipe.
type wireError struct {
	Text  string `json:"text"`
	Kind  string `json:"kind,omitempty"`
	Errno int    `json:"errno,omitempty"`
	Entry string `json:"entry,omitempty"` // the tar entry or file
}

// kinds are the sentinel errors that cross the pipe.
var kinds = map[string]error{
	"escape":  archive.ErrEscape,
	"limit":   archive.ErrLimit,
	"invalid": archive.ErrInvalid,
	"missing": exec.ErrNotFound,
	"fs":      ErrFileSystem,
	"cut":     io.ErrUnexpectedEOF,
}

// Conditions that callers branch on.
var (
	// ErrFileSystem: the device does not hold a file system that can be used.
	ErrFileSystem = errors.New("file system cannot be used")
	// ErrDied: the helper ended without an answer.
	ErrDied = errors.New("helper died")
	// ErrTimeout: the helper did not answer in time, or moved no data for too long, and was killed.
	ErrTimeout = errors.New("helper timed out")
)

// An Error is what a helper reported.
type Error struct {
	Op    string
	Entry string // the tar entry or file, where there is one
	text  string
	kind  error
	errno syscall.Errno
}

func (e *Error) Error() string { return e.Op + ": " + e.text }

// Unwrap gives the error's kind (archive.ErrEscape, ErrFileSystem ...) and its errno.
func (e *Error) Unwrap() []error {
	var out []error
	if e.kind != nil {
		out = append(out, e.kind)
	}
	if e.errno != 0 {
		out = append(out, e.errno)
	}
	return out
}

func toWire(err error) *wireError {
	w := &wireError{Text: err.Error()}
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			w.Kind = name
		}
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		w.Errno = int(no)
	}
	var ee *archive.EntryError
	var pe *fs.PathError
	if errors.As(err, &ee) {
		w.Entry = ee.Name
	} else if errors.As(err, &pe) {
		w.Entry = pe.Path
	}
	return w
}

func (w *wireError) err(op string) error {
	return &Error{Op: op, Entry: w.Entry, text: w.Text, kind: kinds[w.Kind], errno: syscall.Errno(w.Errno)}
}

// fsError marks an error of a mount as the file system's fault, where it is.
func fsError(node, fstype string, err error) error {
	var no syscall.Errno
	if errors.As(err, &no) {
		switch no {
		case syscall.EINVAL, syscall.EUCLEAN, syscall.EBADMSG, syscall.EIO:
			return fmt.Errorf("mount %s as %s: %w: %w", node, fstype, ErrFileSystem, err)
		}
	}
	return fmt.Errorf("mount %s as %s: %w", node, fstype, err)
}
