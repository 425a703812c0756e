package repair

import (
	"fmt"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// A census counts references to the nodes and data blocks of the new pool.
type census struct {
	b     *builder
	nodes []uint32
	data  map[uint64]*[claimPage]uint8 // 255: in big
	big   map[thin.DataBlock]uint32
}

// node counts a pointer to a node, and with the first one what the node points at.
func (c *census) node(loc block.Loc, depth int) error {
	if c.nodes[loc]++; c.nodes[loc] > 1 {
		return nil
	}
	if depth > btree.MaxDepth {
		return block.Corruptf(loc, "b-tree deeper than %d", btree.MaxDepth)
	}
	n, err := c.b.read(loc)
	if err != nil {
		return err
	}
	for i := range n.Len() {
		if n.Leaf() {
			c.refer(thin.UnpackMapping(raw(n, i)).Block)
		} else if err := c.node(n.Child(i), depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (c *census) refer(b thin.DataBlock) {
	p := c.data[uint64(b)/claimPage]
	if p == nil {
		p = new([claimPage]uint8)
		c.data[uint64(b)/claimPage] = p
	}
	v := &p[uint64(b)%claimPage]
	switch {
	case *v < 254:
		*v++
	case *v == 254:
		*v, c.big[b] = 255, 255
	default:
		c.big[b]++
	}
}

func (c *census) dataCount(b thin.DataBlock) uint32 {
	p := c.data[uint64(b)/claimPage]
	if p == nil {
		return 0
	}
	if v := p[uint64(b)%claimPage]; v < 255 {
		return uint32(v)
	}
	return c.big[b]
}

// write counts, copies what is taken over, and makes the pool.
func (r *repairer) write(b *builder) error {
	size := max(b.f.n, block.Loc(r.out.Size()/block.Size))
	c := &census{b: b, nodes: make([]uint32, size), data: map[uint64]*[claimPage]uint8{}, big: map[thin.DataBlock]uint32{}}
	for _, d := range r.list {
		if err := c.node(d.Root, 0); err != nil {
			return err
		}
	}
	if err := r.copy(c); err != nil {
		return err
	}
	return thin.Assemble(r.out, thin.Assembly{
		Time: r.time, TransactionID: r.trans, DataBlockSize: r.rep.DataBlockSize, DataBlocks: r.rep.DataBlocks,
		Devices:   r.list,
		MetaCount: func(loc block.Loc) uint32 { return c.nodes[loc] },
		DataCount: c.dataCount,
	})
}

// copy brings the nodes that are taken over to their place, neighbours together.
func (r *repairer) copy(c *census) error {
	const most = 256
	var run []byte
	begin := block.Loc(0)
	flush := func() error {
		if len(run) == 0 {
			return nil
		}
		_, err := r.out.WriteAt(run, int64(begin)*block.Size)
		if err != nil {
			err = fmt.Errorf("write %d metadata blocks at %d: %w", len(run)/block.Size, begin, err)
		}
		run = run[:0]
		return err
	}
	for loc := block.Loc(1); loc < r.f.n; loc++ {
		if c.nodes[loc] == 0 || c.b.fresh[loc] {
			continue
		}
		b, err := r.f.cache.Read(loc, block.Node)
		if err != nil {
			return err
		}
		if begin+block.Loc(len(run)/block.Size) != loc || len(run) == most*block.Size {
			if err := flush(); err != nil {
				return err
			}
			begin = loc
		}
		run = append(run, b...)
		if loc%4096 == 0 {
			if err := r.o.progress("copy", uint64(loc), uint64(r.f.n)); err != nil {
				return err
			}
		}
	}
	return flush()
}
