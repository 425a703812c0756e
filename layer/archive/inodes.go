package archive

import (
	"cmp"
	"slices"
)

// An InodeRange is the inode numbers from First up to, not including, End.
type InodeRange struct {
	First uint64 `json:"first"`
	End   uint64 `json:"end"`
}

// MergeInodes sorts ranges and joins those that touch.
func MergeInodes(list []InodeRange) []InodeRange {
	slices.SortFunc(list, func(a, b InodeRange) int { return cmp.Compare(a.First, b.First) })
	out := list[:0]
	for _, r := range list {
		if r.First >= r.End {
			continue
		}
		if n := len(out); n > 0 && r.First <= out[n-1].End {
			out[n-1].End = max(out[n-1].End, r.End)
			continue
		}
		out = append(out, r)
	}
	return out
}

// holds tells whether merged ranges have a number.
func holds(list []InodeRange, ino uint64) bool {
	_, found := slices.BinarySearchFunc(list, ino, func(r InodeRange, ino uint64) int {
		switch {
		case r.End <= ino:
			return -1
		case r.First > ino:
			return 1
		}
		return 0
	})
	return found
}
