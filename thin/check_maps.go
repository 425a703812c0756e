package thin

import (
	"encoding/binary"

	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// An indexedEntry is an index entry and the block that holds it.
type indexedEntry struct {
	at place
	e  spacemap.IndexEntry
}

const perBitmap = spacemap.EntriesPerBitmap

// dataIndex walks the index tree of the data map, which tells how much memory the counts of
// data blocks may take.
func (c *checker) dataIndex() {
	t := treeCheck{c: c, at: place{where: whereDataIdx}, use: useDataIndex, size: spacemap.IndexEntrySize}
	t.leaf = func(t *treeCheck, n checkNode) {
		for i := 0; i < n.nr; i++ {
			if k := n.key(i); k != uint64(len(c.index)) {
				c.fatal(t.at.span(k, k+1), "follows bitmap %d", int64(len(c.index))-1)
				c.rep.Partial = true
				continue
			}
			if uint64(len(c.index)) == c.meta.n { // before memory is set aside for them
				c.fatal(t.at, "more bitmaps than metadata blocks")
				c.rep.Partial = true
				return
			}
			at := place{where: whereDataIdx, block: t.at.block, path: append([]block.Loc(nil), t.at.path...)}
			c.index = append(c.index, indexedEntry{at, spacemap.DecodeIndexEntry(n.value(i, spacemap.IndexEntrySize))})
		}
	}
	info := t.walk(c.sb.DataMap.BitmapRoot)
	nr := c.sb.DataMap.NrBlocks
	if want := (nr + perBitmap - 1) / perBitmap; info.whole && uint64(len(c.index)) != want {
		c.fatal(place{where: whereDataIdx, block: c.sb.DataMap.BitmapRoot}, "%d bitmaps, want %d for %d blocks", len(c.index), want, nr)
	}
	c.data = newTally(whereDataMap, min(nr, uint64(len(c.index))*perBitmap))
}

// bitmap reads one bitmap into the tally and compares its index entry.
func (c *checker) bitmap(t *tally, i uint64, u use, x indexedEntry) (used uint64) {
	begin := i * perBitmap
	n := min(perBitmap, t.n-min(begin, t.n))
	unknown := func() uint64 {
		for b := begin; b < begin+n; b++ {
			t.st[b] |= stUnknown
		}
		return 0
	}
	at := place{where: t.where, block: x.e.Block}.span(begin, begin+n)
	if x.e.Block == 0 {
		c.fatal(x.at.span(i, i+1), "bitmap %d has no block", i)
		c.rep.Partial = true
		return unknown()
	}
	if !c.claim(at, u, x.e.Block) {
		return unknown()
	}
	b := c.read(at, block.Bitmap, 0)
	if b == nil {
		return unknown()
	}
	if binary.LittleEndian.Uint32(b[4:]) != 0 {
		c.warn(at, "bytes 4 to 7 are not zero")
	}
	first := n
	for e := uint64(0); e < n; e++ {
		s := spacemap.BitmapEntry(b, int(e))
		t.st[begin+e] |= s
		if s != 0 {
			used++
		} else if first == n {
			first = e
		}
	}
	for e := n; e < perBitmap; e++ {
		if spacemap.BitmapEntry(b, int(e)) != 0 {
			c.warn(at, "entry %d is not zero, the last block is entry %d", e, int64(n)-1)
			break
		}
	}
	at = x.at.span(i, i+1)
	if free := perBitmap - used; uint64(x.e.NrFree) != free && uint64(x.e.NrFree) != n-used {
		c.warn(at, "nr_free %d, want %d", x.e.NrFree, free)
	}
	if uint64(x.e.NoneFreeBefore) > first && first < n {
		c.warn(at, "none_free_before %d, but entry %d is free", x.e.NoneFreeBefore, first)
	}
	return used
}

func (c *checker) allocated(t *tally, root spacemap.Root, used uint64) {
	for _, s := range t.st {
		if s&stUnknown != 0 {
			return
		}
	}
	if root.NrAllocated != used {
		c.warn(place{where: whereSuper, block: superblockAt}, "%s: nr_allocated %d, want %d", t.where, root.NrAllocated, used)
	}
}

// dataMap compares the data map with the mappings that have been counted.
func (c *checker) dataMap() {
	used := uint64(0)
	for i, x := range c.index {
		if uint64(i)*perBitmap < c.data.n {
			used += c.bitmap(&c.data, uint64(i), useDataBitmap, x)
		} else if x.e.Block != 0 {
			c.claim(x.at, useDataBitmap, x.e.Block)
		}
	}
	c.allocated(&c.data, c.sb.DataMap, used)
	r := diffRun{c: c, t: &c.data}
	info := c.overflowTree(whereDataOver, useDataOver, c.sb.DataMap.Overflow, func(at place, e overEntry) {
		c.overflow(&c.data, at, &r, e)
	})
	r.flush()
	c.compare(&c.data, info.whole)
}

// overflowTree walks an overflow tree.
func (c *checker) overflowTree(where string, u use, root block.Loc, fn func(place, overEntry)) nodeInfo {
	t := treeCheck{c: c, at: place{where: where}, use: u, size: 4}
	t.leaf = func(t *treeCheck, n checkNode) {
		for i := 0; i < n.nr; i++ {
			fn(t.at, overEntry{n.key(i), binary.LittleEndian.Uint32(n.value(i, 4))})
		}
	}
	return t.walk(root)
}

// metaMap compares the metadata map with the blocks that have been reached. The map's own
// blocks come last: with them everything has been counted.
func (c *checker) metaMap() {
	type foundEntry struct {
		at place
		e  overEntry
	}
	var found []foundEntry
	info := c.overflowTree(whereMetaOver, useMetaOver, c.sb.MetaMap.Overflow, func(at place, e overEntry) {
		at.path = append([]block.Loc(nil), at.path...)
		found = append(found, foundEntry{at, e})
	})
	at := place{where: whereMetaIdx, block: c.sb.MetaMap.BitmapRoot}
	if !c.claim(at, useMetaIndex, at.block) {
		return
	}
	b := c.read(at, block.Index, 1)
	if b == nil {
		return
	}
	if binary.LittleEndian.Uint32(b[4:]) != 0 {
		c.warn(at, "bytes 4 to 7 are not zero")
	}
	n := (c.sb.MetaMap.NrBlocks + perBitmap - 1) / perBitmap
	used := uint64(0)
	for i := uint64(0); i < spacemap.MaxIndexEntries; i++ {
		e := spacemap.MetaIndexEntry(b, int(i))
		switch {
		case i < n && i*perBitmap < c.meta.n:
			used += c.bitmap(&c.meta, i, useMetaBitmap, indexedEntry{at, e})
		case i >= n && e != spacemap.IndexEntry{}:
			c.fatal(at.span(i, i+1), "bitmap %d of %d has an index entry", i, n)
		}
	}
	c.allocated(&c.meta, c.sb.MetaMap, used)
	r := diffRun{c: c, t: &c.meta}
	for _, f := range found {
		c.overflow(&c.meta, f.at, &r, f.e)
	}
	r.flush()
	c.compare(&c.meta, info.whole)
}
