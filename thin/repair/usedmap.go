package repair

import (
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// usedBlocks returns what the metadata space map says of a block, as far as it can be read: a
// hint, for those that look for lost trees. Without a whole superblock nothing is known.
func (x *finder) usedBlocks(st *state) func(block.Loc) (used, known bool) {
	bitmaps := map[block.Loc][]byte{} // by number
	if st.known {
		if index, err := x.f.cache.Read(st.sb.MetaMap.BitmapRoot, block.Index); err == nil {
			for i := range block.Loc(spacemap.MaxIndexEntries) {
				e := spacemap.MetaIndexEntry(index, int(i))
				if e.Block == 0 || i*spacemap.EntriesPerBitmap >= x.f.n {
					break
				}
				if b, err := x.f.cache.Read(e.Block, block.Bitmap); err == nil {
					bitmaps[i] = b
				}
			}
		}
	}
	return func(loc block.Loc) (used, known bool) {
		b := bitmaps[loc/spacemap.EntriesPerBitmap]
		if b == nil {
			return false, false
		}
		return spacemap.BitmapEntry(b, int(loc%spacemap.EntriesPerBitmap)) != 0, true
	}
}
