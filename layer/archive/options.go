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

// Limits bound what a layer may bring. Zero values mean the defaults named.
type Limits struct {
	// MaxName is the longest name, link target, or resolved path, in bytes. 4095, which is also
	// the most that Linux can open.
	MaxName int `json:"max_name,omitempty"`
	// MaxEntries is the largest number of entries. 8,388,608.
	MaxEntries int64 `json:"max_entries,omitempty"`
	// MaxBytes is the largest sum of file sizes, holes of sparse files included. 1 TiB.
	MaxBytes int64 `json:"max_bytes,omitempty"`
	// MaxTar is the longest uncompressed tar in bytes, what follows its end included. 1 TiB.
	MaxTar int64 `json:"max_tar,omitempty"`
	// MaxRatio is how many times its size a stream may unpack to, once it has unpacked to more
	// than RatioFree bytes: compressed to tar, and tar to files with holes. 10,000 and 1 GiB. Gzip
	// does not reach 1,100, zstd and sparse files do.
	MaxRatio  int64 `json:"max_ratio,omitempty"`
	RatioFree int64 `json:"ratio_free,omitempty"`
	// MaxXattr is the largest sum of names and values of the extended attributes of one entry,
	// in bytes. 262,144. A single value is limited to 65,536 by Linux.
	MaxXattr int `json:"max_xattr,omitempty"`
	// MaxNames is the memory that an Apply may take for the paths that it must remember, in bytes:
	// the length of each and 64. 536,870,912.
	MaxNames int64 `json:"max_names,omitempty"`
}

// WithDefaults fills in what is zero.
func (l Limits) WithDefaults() Limits {
	if l.MaxName <= 0 || l.MaxName > maxPath {
		l.MaxName = maxPath
	}
	l.MaxEntries = orDefault(l.MaxEntries, 8<<20)
	l.MaxBytes = orDefault(l.MaxBytes, 1<<40)
	l.MaxTar = orDefault(l.MaxTar, 1<<40)
	l.MaxRatio = orDefault(l.MaxRatio, 10_000)
	l.RatioFree = orDefault(l.RatioFree, 1<<30)
	if l.MaxXattr <= 0 {
		l.MaxXattr = 256 << 10
	}
	l.MaxNames = orDefault(l.MaxNames, 512<<20)
	return l
}

func orDefault(n, d int64) int64 {
	if n <= 0 {
		return d
	}
	return n
}

// expands says why a stream that unpacked from stored to n bytes is refused, or nil.
func (l *Limits) expands(n, stored int64) error {
	if n <= l.RatioFree || stored >= (n-1)/l.MaxRatio+1 {
		return nil
	}
	return fmt.Errorf("%d bytes unpack to more than %d, at most %d times as many: %w", stored, n, l.MaxRatio, ErrLimit)
}

// ApplyOptions say what an archive may do.
type ApplyOptions struct {
	Limits
	// Warn, if not nil, is told about details that were left out: attributes in a namespace
	// that Linux does not have, and user.* attributes on what cannot carry them.
	Warn func(name, what string)
}

func (o ApplyOptions) withDefaults() ApplyOptions {
	o.Limits = o.Limits.WithDefaults()
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
