package spacemap

import (
	"mica/pdata/block"
	"mica/pdata/txn"
)

// RebuildMeta makes the map of a metadata device of n blocks whose trees are there already: count
// says how often each block is referred to. The superblock counts too; the map's own blocks do
// not yet, they are allocated among the blocks of count 0.
func RebuildMeta(tm *txn.Manager, n uint64, count func(block.Loc) uint32) (*Meta, error) {
	m := newMeta(tm, n)
	tm.SetSpaceMap(m)
	m.c.rebuild(func(b uint64) uint32 { return count(block.Loc(b)) })
	var err error
	m.over, err = m.tree.Empty()
	return m, err
}

// RebuildData makes the map of n data blocks of which each is referred to as often as count says.
func RebuildData(tm *txn.Manager, n uint64, count func(uint64) uint32) (*Data, error) {
	d, err := FormatData(tm, n)
	if err == nil {
		d.c.rebuild(count)
	}
	return d, err
}

// rebuild sets every count, to be written by the first Finish.
func (c *Counts) rebuild(count func(uint64) uint32) {
	for i := range nrBitmaps(c.Len()) {
		c.dirtyBitmaps[i] = struct{}{}
	}
	for b := range c.Len() {
		n := count(b)
		if n == 0 {
			continue
		}
		c.load(b, n)
		if n >= 3 {
			c.dirtyOverflow[b] = struct{}{}
		}
	}
}
