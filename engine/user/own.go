package user

import (
	"context"
	"fmt"

	"mica/thin"
)

// A device's own blocks are those that it provisioned (or broke sharing of) since it was made
// and still maps: what a layer or container uses beyond what it was made from. Their mappings
// have a time not before the device's creation; what came with the snapshot is older.

// ownMapping reports whether a packed mapping is one of the device's own.
func (d *device) ownMapping(val uint64) bool {
	return val != absent && uint32(val&(thin.MaxTime-1)) >= d.created
}

// OwnChange is by how many the device's own blocks have changed since it was opened.
func (t *Thin) OwnChange() int64 { return t.d.own.Load() }

// OwnBlocks counts a device's own blocks, as of a commit made in the call, by a walk of its
// mappings. Who keeps the number from one opening to the next needs only Thin.OwnChange.
func (p *Pool) OwnBlocks(ctx context.Context, id thin.DevID) (uint64, error) {
	v, err := p.view()
	if err != nil {
		return 0, err
	}
	defer v.Unpin()
	det, err := v.Device(id)
	if err != nil {
		return 0, fmt.Errorf("own blocks of thin %d: %w", id, err)
	}
	n, seen := uint64(0), 0
	err = v.Walk(id, 0, func(e thin.Entry) bool {
		if e.Time >= det.CreationTime {
			n++
		}
		seen++
		return seen%4096 != 0 || ctx.Err() == nil
	})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return 0, fmt.Errorf("own blocks of thin %d: %w", id, err)
	}
	return n, nil
}
