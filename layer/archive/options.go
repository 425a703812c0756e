package archive

import (
	"errors"
	"fmt"
	"strconv"
)

// Conditions that callers branch on. They come wrapped in an *EntryError.
var (
	// ErrEscape: the entry would be outside the root, or could be if links were changed.
	ErrEscape = errors.New("leads out of the root")
	// ErrLimit: the archive is larger in some way than ApplyOptions allow.
	ErrLimit = errors.New("over the limit")
	// ErrInvalid: the entry cannot be what a layer means, or the tar itself is damaged.
	ErrInvalid = errors.New("invalid entry")
)

// An EntryError says which entry of an archive could not be applied, or which file of a tree
// could not be archived.
type EntryError struct {
	Name string // as in the archive; shortened in the message if it is very long
	Err  error
}

func (e *EntryError) Error() string { return fmt.Sprintf("entry %s: %v", quote(e.Name), e.Err) }

func (e *EntryError) Unwrap() error { return e.Err }

// quote quotes a name of unknown origin and cuts it to a readable length.
func quote(name string) string {
	const most = 200
	if len(name) <= most {
		return strconv.Quote(name)
	}
	return fmt.Sprintf("%s… (%d bytes)", strconv.Quote(name[:most]), len(name))
}

// ApplyOptions bound what an archive may do. Zero values mean the defaults named.
type ApplyOptions struct {
	// MaxName is the longest name, hard link target, or resolved path, in bytes. 4095, which
	// is also the most that Linux can open.
	MaxName int
	// MaxEntries is the largest number of entries. 8,388,608.
	MaxEntries int64
	// MaxBytes is the largest sum of file sizes, holes of sparse files included. 1 TiB.
	MaxBytes int64
	// MaxXattr is the largest sum of names and values of the extended attributes of one entry,
	// in bytes. 262,144. A single value is limited to 65,536 by Linux.
	MaxXattr int
	// Warn, if not nil, is told about details that were left out: attributes in a namespace
	// that Linux does not have, and user.* attributes on what cannot carry them.
	Warn func(name, what string)
}

func (o ApplyOptions) withDefaults() ApplyOptions {
	if o.MaxName <= 0 || o.MaxName > maxPath {
		o.MaxName = maxPath
	}
	if o.MaxEntries <= 0 {
		o.MaxEntries = 8 << 20
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = 1 << 40
	}
	if o.MaxXattr <= 0 {
		o.MaxXattr = 256 << 10
	}
	if o.Warn == nil {
		o.Warn = func(string, string) {}
	}
	return o
}

const (
	maxPath      = 4095 // PATH_MAX without its final NUL
	maxComponent = 255  // NAME_MAX
	maxValue     = 65536
)

// Stats count what Apply did or Diff wrote.
type Stats struct {
	Entries int64 // tar entries, whiteouts included
	Bytes   int64 // file contents, holes included
}
