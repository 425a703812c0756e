package thin

import (
	"fmt"

	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// FreeData calls fn for every run of free data blocks from begin on, ascending, until fn returns
// false or an error. It reads one bitmap at a time. The state must not be a metadata snapshot,
// which has no space maps.
func (v *View) FreeData(begin DataBlock, fn func(DataRun) (bool, error)) error {
	const per = spacemap.EntriesPerBitmap
	total := v.sb.DataMap.NrBlocks
	var run DataRun
	more := true
	emit := func() (err error) {
		if run.Len > 0 && more {
			more, err = fn(run)
		}
		run = DataRun{}
		return err
	}
	var bad error
	err := v.reader(spacemap.IndexEntrySize).Walk(v.sb.DataMap.BitmapRoot, uint64(begin)/per, func(k uint64, b []byte) bool {
		e := spacemap.DecodeIndexEntry(b)
		first := k * per
		if first >= total {
			return false
		}
		n := min(per, total-first)
		var bitmap []byte
		if e.NrFree < per {
			if bitmap, bad = v.read.Read(e.Block, block.Bitmap); bad != nil {
				bad = fmt.Errorf("data space map, bitmap %d: %w", k, bad)
				return false
			}
		}
		for i := uint64(0); i < n && more; i++ {
			at := DataBlock(first + i)
			if at < begin {
				continue
			}
			if bitmap != nil && spacemap.BitmapEntry(bitmap, int(i)) != 0 {
				if bad = emit(); bad != nil {
					return false
				}
				continue
			}
			if run.Len == 0 {
				run.Begin = at
			}
			run.Len++
		}
		return more
	})
	if err == nil {
		err = bad
	}
	if err == nil {
		err = emit()
	}
	return err
}
