// Package ondisk reads from the devices of ext4 and XFS file systems what can be known without
// mounting them: whether one was unmounted in order, and which inodes lie in the blocks in which two
// devices differ. It trusts no byte: what it does not know is an error, on which callers do without.
package ondisk

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/layer/archive"
)

// ErrUnknown: the file system has a form that this package does not know; it may be a sound one.
var ErrUnknown = errors.New("form of file system not known")

// Clean tells whether a file system can be mounted without its journal or log: it was unmounted in
// order, or frozen. unix.EUCLEAN: there is no such file system on the device.
func Clean(d dev.Device, fstype string) (bool, error) {
	switch fstype {
	case "ext4":
		return ext4Clean(d)
	case "xfs":
		return xfsClean(d)
	}
	return false, fmt.Errorf("file system %q: %w", fstype, ErrUnknown)
}

// A Range is bytes of a device.
type Range struct{ Off, Len int64 }

// Inodes returns the numbers of the inodes that lie, or may lie, in the ranges of the device upper,
// whose file system began as a copy of lower's and may have been enlarged since. Every other inode of
// upper is byte for byte what the inode of its number is in lower, if the ranges hold all in which the
// devices differ. Both file systems must be clean: what is in a journal is not looked at.
//
// ErrUnknown: where the inodes lie cannot be told.
func Inodes(lower, upper dev.Device, fstype string, ranges []Range) ([]archive.InodeRange, error) {
	var where interface {
		inodes(off, end int64) []archive.InodeRange
	}
	var err error
	switch fstype {
	case "ext4":
		where, err = ext4Tables(lower, upper)
	case "xfs":
		where, err = xfsNumbers(lower, upper)
	default:
		err = ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("inodes of a changed %s: %w", fstype, err)
	}
	list := []archive.InodeRange{} // nil would mean that nothing is known
	for _, r := range ranges {
		if r.Off < 0 || r.Len <= 0 || r.Off > upper.Size() {
			continue
		}
		list = append(list, where.inodes(r.Off, min(r.Off+r.Len, upper.Size()))...)
	}
	return archive.MergeInodes(list), nil
}
