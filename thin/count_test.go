package thin

import (
	"mica/pdata/block"
	"mica/pdata/btree"
)

// countBlocks counts the blocks that are read through it.
type countBlocks struct {
	btree.Blocks
	n int
}

func (c *countBlocks) Read(loc block.Loc, k block.Kind) ([]byte, error) {
	c.n++
	return c.Blocks.Read(loc, k)
}
