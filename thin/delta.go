package thin

import (
	"encoding/binary"
	"fmt"
)

// A DeltaRange is a run of virtual blocks in which two devices compare alike. Data blocks
// decide, times do not.
type DeltaRange struct {
	Kind  string // DeltaSame, DeltaDifferent, DeltaLeftOnly or DeltaRightOnly
	Begin VBlock
	Len   uint64
	// Left and Right are the data blocks at Begin, where mapped; they advance with the run.
	Left, Right DataBlock
}

// Kinds of a DeltaRange.
const (
	DeltaSame      = "same"
	DeltaDifferent = "different"
	DeltaLeftOnly  = "left_only"
	DeltaRightOnly = "right_only"
)

// Delta calls fn for every run of blocks that the left or the right device has mapped,
// ascending, until fn returns an error. What neither has mapped is left out.
func (v *View) Delta(left, right DevID, fn func(DeltaRange) error) error {
	return v.delta(left, right, false, fn)
}

// Changes is Delta without the runs that are the same. It does not read what the trees of the
// two devices share, so its cost is that of the difference and not that of the devices.
func (v *View) Changes(left, right DevID, fn func(DeltaRange) error) error {
	return v.delta(left, right, true, fn)
}

func (v *View) delta(left, right DevID, changesOnly bool, fn func(DeltaRange) error) error {
	l, err := v.root(left)
	if err != nil {
		return err
	}
	r, err := v.root(right)
	if err != nil {
		return err
	}
	var run DeltaRange
	emit := func() error {
		if run.Len == 0 || changesOnly && run.Kind == DeltaSame {
			return nil
		}
		return fn(run)
	}
	err = v.reader(8).Merge(l, r, changesOnly, func(key uint64, lv, rv []byte) error {
		d := deltaOf(VBlock(key), lv, rv)
		if run.extend(d) {
			return nil
		}
		err := emit()
		run = d
		return err
	})
	if err == nil {
		err = emit()
	}
	if err != nil {
		return fmt.Errorf("delta of thin %d and thin %d: %w", left, right, err)
	}
	return nil
}

func deltaOf(b VBlock, lv, rv []byte) DeltaRange {
	d := DeltaRange{Begin: b, Len: 1}
	if lv != nil {
		d.Left = UnpackMapping(binary.LittleEndian.Uint64(lv)).Block
	}
	if rv != nil {
		d.Right = UnpackMapping(binary.LittleEndian.Uint64(rv)).Block
	}
	switch {
	case rv == nil:
		d.Kind = DeltaLeftOnly
	case lv == nil:
		d.Kind = DeltaRightOnly
	case d.Left == d.Right:
		d.Kind = DeltaSame
	default:
		d.Kind = DeltaDifferent
	}
	return d
}

// extend adds d, one block, to the run if it goes on there in every respect.
func (r *DeltaRange) extend(d DeltaRange) bool {
	if r.Len == 0 || d.Kind != r.Kind || d.Begin != r.Begin+VBlock(r.Len) {
		return false
	}
	if r.Kind != DeltaRightOnly && d.Left != r.Left+DataBlock(r.Len) ||
		r.Kind != DeltaLeftOnly && d.Right != r.Right+DataBlock(r.Len) {
		return false
	}
	r.Len++
	return true
}
