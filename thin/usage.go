package thin

import (
	"encoding/binary"
	"fmt"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/spacemap"
)

// Usage counts the data blocks of one device.
type Usage struct {
	Mapped    uint64 // entries of its mapping tree
	Exclusive uint64 // data blocks that no other mapping names
}

// Usage counts the blocks of every device. It reads every node of the mapping trees at most
// three times, however many devices share it, and needs one byte a data block and one a
// metadata block.
func (v *View) Usage() (map[DevID]Usage, error) {
	devs, err := v.Devices()
	if err != nil {
		return nil, err
	}
	// A wrong superblock must not set the size of an allocation: bitmaps have to fit the device.
	n := uint64(v.d.Size() / block.Size)
	if meta, data := v.pool.MetaMap.NrBlocks, v.pool.DataMap.NrBlocks; meta > n || data/spacemap.EntriesPerBitmap > n {
		return nil, block.Corruptf(superblockAt, "counts %d metadata and %d data blocks, the metadata device has %d blocks", meta, data, n)
	}
	u := usageWalk{r: v.reader(8), nodes: make([]uint8, v.pool.MetaMap.NrBlocks), data: make([]uint8, v.pool.DataMap.NrBlocks)}
	roots := make([]block.Loc, len(devs))
	for i, d := range devs {
		if roots[i], err = v.root(d.ID); err == nil {
			err = u.mark(roots[i], 0)
		}
		if err != nil {
			return nil, fmt.Errorf("usage of thin %d: %w", d.ID, err)
		}
	}
	all := make(map[DevID]Usage, len(devs))
	for i, d := range devs {
		n, err := u.exclusive(roots[i], 0)
		if err != nil {
			return nil, fmt.Errorf("usage of thin %d: %w", d.ID, err)
		}
		all[d.ID] = Usage{d.MappedBlocks, n}
	}
	return all, nil
}

// A usageWalk counts how often nodes and data blocks are reached from devices: 0, 1, or 2 for
// more often.
type usageWalk struct {
	r     btree.Reader
	nodes []uint8 // by metadata block
	data  []uint8 // by data block
}

// node reads one node of a mapping tree and checks what it is used for.
func (u *usageWalk) node(loc block.Loc, depth int) (btree.Node, error) {
	if loc >= block.Loc(len(u.nodes)) {
		return btree.Node{}, block.Corruptf(loc, "mapping node lies beyond the %d metadata blocks", len(u.nodes))
	}
	if depth > btree.MaxDepth {
		return btree.Node{}, block.Corruptf(loc, "b-tree deeper than %d", btree.MaxDepth)
	}
	buf, err := u.r.Blocks.Read(loc, block.Node)
	if err != nil {
		return btree.Node{}, err
	}
	return btree.ParseNode(buf, loc, u.r.ValueSize)
}

// mark counts one more way to a subtree. Below a node that is reached twice, everything is.
func (u *usageWalk) mark(loc block.Loc, depth int) error {
	if loc < block.Loc(len(u.nodes)) && u.nodes[loc] == 2 {
		return nil
	}
	n, err := u.node(loc, depth)
	if err != nil {
		return err
	}
	u.nodes[loc]++
	for i, l := 0, n.Len(); i < l; i++ {
		if !n.Leaf() {
			if err := u.mark(n.Child(i), depth+1); err != nil {
				return err
			}
			continue
		}
		b := UnpackMapping(binary.LittleEndian.Uint64(n.Value(i))).Block
		if b >= DataBlock(len(u.data)) {
			return block.Corruptf(loc, "virtual block %d is mapped to data block %d of %d", n.Key(i), b, len(u.data))
		}
		u.data[b] = min(u.data[b]+1, 2)
	}
	return nil
}

// exclusive counts the data blocks below a node that are reached once.
func (u *usageWalk) exclusive(loc block.Loc, depth int) (uint64, error) {
	if u.nodes[loc] != 1 {
		return 0, nil
	}
	n, err := u.node(loc, depth)
	if err != nil {
		return 0, err
	}
	total := uint64(0)
	for i, l := 0, n.Len(); i < l; i++ {
		if n.Leaf() {
			if u.data[UnpackMapping(binary.LittleEndian.Uint64(n.Value(i))).Block] == 1 {
				total++
			}
			continue
		}
		c, err := u.exclusive(n.Child(i), depth+1)
		if err != nil {
			return 0, err
		}
		total += c
	}
	return total, nil
}
