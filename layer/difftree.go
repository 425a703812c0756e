package layer

import (
	"context"
	"io"

	"mica/engine"
	"mica/layer/archive"
	"mica/layer/ondisk"
	"mica/thin"
)

// A treeDev is a device whose file system is clean and does not change.
type treeDev struct {
	dev  thin.DevID
	size int64
}

// maxChangedInodes bounds the ranges of inodes that a helper is told of.
const maxChangedInodes = 1024

// diffTrees writes the layer tar that leads from lower (no device: an empty tree) to upper, which was
// made from it. object is whose the difference is, for warnings.
//
// The helper looks at names and inodes only where the devices differ: see changedInodes.
func (s *Store) diffTrees(ctx context.Context, lower, upper treeDev, fstype, object string, w io.Writer) error {
	var changed []archive.InodeRange
	if lower.dev != 0 {
		var err error
		if changed, err = s.changedInodes(ctx, lower, upper, fstype); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s.log.Info("a difference is found by comparing all files", "object", object, "because", err)
		}
	}
	diff := func(lowerNode string) error {
		return s.useView(ctx, upper.dev, upper.size, func(upperNode string) error {
			st, err := s.files.Diff(ctx, lowerNode, upperNode, fstype, changed, w)
			for _, m := range st.Warnings {
				s.log.Warn("diff", "object", object, "entry", m)
			}
			return err
		})
	}
	if lower.dev == 0 {
		return diff("")
	}
	return s.useView(ctx, lower.dev, lower.size, diff)
}

// A changesPool lists only what differs between two devices, without a look at what they share.
type changesPool interface {
	Changes(ctx context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error
}

// changedInodes tells which inodes of upper may differ from those of lower: the ones that lie in blocks
// which the two devices do not share. All else of upper's inodes is what it was in lower, with what
// they lead to: nothing of a file changes without its inode. The list may hold too much.
func (s *Store) changedInodes(ctx context.Context, lower, upper treeDev, fstype string) ([]archive.InodeRange, error) {
	list := s.pool.Delta
	if p, ok := s.pool.(changesPool); ok {
		list = p.Changes
	}
	var ranges []ondisk.Range
	err := list(ctx, lower.dev, upper.dev, func(d thin.DeltaRange) error {
		if d.Kind == thin.DeltaSame {
			return nil
		}
		off, n := int64(d.Begin)*s.block, int64(d.Len)*s.block
		if i := len(ranges) - 1; i >= 0 && ranges[i].Off+ranges[i].Len == off {
			ranges[i].Len += n
		} else {
			ranges = append(ranges, ondisk.Range{Off: off, Len: n})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var devs [2]engine.Thin
	for i, t := range []treeDev{lower, upper} {
		devs[i], err = s.pool.Open(ctx, t.dev, engine.OpenOptions{SizeBytes: t.size, ReadOnly: true})
		if err != nil {
			return nil, err
		}
		defer devs[i].Close()
	}
	inodes, err := ondisk.Inodes(devs[0], devs[1], fstype, ranges)
	if err != nil {
		return nil, err
	}
	return fewer(inodes, maxChangedInodes), nil
}

// fewer joins the ranges with the smallest gaps between them until there are at most n.
func fewer(list []archive.InodeRange, n int) []archive.InodeRange {
	for gap := uint64(1); len(list) > n; gap *= 2 {
		out := list[:1]
		for _, r := range list[1:] {
			if last := &out[len(out)-1]; r.First-last.End <= gap {
				last.End = r.End
			} else {
				out = append(out, r)
			}
		}
		list = out
	}
	return list
}
