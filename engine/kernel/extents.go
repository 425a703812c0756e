package kernel

import (
	"context"

	"mica/dev"
	"mica/thin"
)

// maxExtents bounds one answer of Extents.
const maxExtents = 1024

// Extents tells mapped blocks from holes, as of a commit made in the call. Where the metadata
// cannot be read, everything is data.
func (t *Thin) Extents(off, n int64) ([]dev.Extent, error) {
	var out []dev.Extent
	err := t.use("extents", false, func(*direct) error {
		if err := dev.CheckRange(off, n, t.size.Load()); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		err := t.p.look(context.Background(), func(v *thin.View) error {
			out = out[:0]
			x := extents{t: t, end: off + n, at: off}
			err := v.Walk(t.id, thin.VBlock(off/t.p.bs), x.mapped)
			out = x.finish()
			return err
		})
		if err != nil {
			out = []dev.Extent{{Off: off, Len: n}}
		}
		return nil
	})
	return out, err
}

// extents is an answer in the making: what lies before at is described.
type extents struct {
	t       *Thin
	at, end int64
	out     []dev.Extent
}

// mapped takes the next mapping; false when the answer is full or the range over.
func (x *extents) mapped(e thin.Entry) bool {
	begin := int64(e.VBlock) * x.t.p.bs
	if begin >= x.end {
		return false
	}
	if begin > x.at {
		x.add(begin, true)
	}
	x.add(min(begin+x.t.p.bs, x.end), false)
	return len(x.out) < maxExtents && x.at < x.end
}

// add describes everything up to a byte.
func (x *extents) add(to int64, hole bool) {
	if l := len(x.out); l > 0 && x.out[l-1].Hole == hole {
		x.out[l-1].Len += to - x.at
	} else {
		// What is behind the end of an external origin reads as zeros; it is not worth telling.
		x.out = append(x.out, dev.Extent{Off: x.at, Len: to - x.at, Hole: hole, Zero: hole && x.t.origin == nil})
	}
	x.at = to
}

// finish describes the rest as a hole, unless the answer was cut short.
func (x *extents) finish() []dev.Extent {
	if x.at < x.end && len(x.out) < maxExtents {
		x.add(x.end, true)
	}
	return x.out
}
