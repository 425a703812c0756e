package repair

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/thin"
)

// An item is a piece of a tree that is put together anew: a subtree that is taken over as it is, or,
// of height 0, one mapping.
type item struct {
	key    uint64 // first
	val    uint64 // metadata block, or packed mapping
	height int
}

// pack makes one tree of pieces, which are ascending. Pieces of one height that follow each other
// become nodes of the next; where they are too few, a neighbour is taken apart to go with them. So
// every node but the root has its least number of entries, and all that can be kept is.
func (b *builder) pack(items []item) (block.Loc, error) {
	for h := 0; ; h++ {
		if len(items) == 1 && items[0].height == h && h > 0 {
			return block.Loc(items[0].val), nil
		}
		var err error
		if items, err = b.packLevel(items, h); err != nil {
			return 0, err
		}
	}
}

// packLevel makes nodes of all pieces of height h, which is the least that there is.
func (b *builder) packLevel(items []item, h int) ([]item, error) {
	var out []item
	for i := 0; i < len(items); {
		if items[i].height > h {
			out = append(out, items[i])
			i++
			continue
		}
		j := i
		for j < len(items) && items[j].height == h {
			j++
		}
		run := slices.Clone(items[i:j])
		i = j
		for len(run) < leastEntries {
			switch n := len(out); {
			case n > 0: // what is before: taken apart down to this height
				parts, err := b.open(out[n-1])
				if err != nil {
					return nil, err
				}
				if parts[0].height == h {
					out, run = out[:n-1], append(parts, run...)
				} else {
					out = append(out[:n-1], parts...)
				}
				continue
			case i < len(items): // what is behind
				parts, err := b.open(items[i])
				if err != nil {
					return nil, err
				}
				if parts[0].height == h {
					run = append(run, parts...)
					i++
					for i < len(items) && items[i].height == h {
						run = append(run, items[i])
						i++
					}
				} else {
					items = append(parts, items[i+1:]...)
					i = 0
				}
				continue
			}
			break // it is all there is
		}
		nodes := (len(run) + mostEntries - 1) / mostEntries
		for k := range nodes {
			part := run[k*len(run)/nodes : (k+1)*len(run)/nodes]
			loc, err := b.node(h == 0, part)
			if err != nil {
				return nil, err
			}
			out = append(out, item{part[0].key, uint64(loc), h + 1})
		}
	}
	return out, nil
}

// open takes a subtree apart: its children, or its mappings.
func (b *builder) open(x item) ([]item, error) {
	loc := block.Loc(x.val)
	n, err := b.read(loc)
	if err != nil {
		return nil, err
	}
	parts := make([]item, n.Len())
	for i := range parts {
		parts[i] = item{n.Key(i), raw(n, i), x.height - 1}
	}
	if len(parts) == 0 {
		return nil, block.Corruptf(loc, "empty node in a tree")
	}
	return parts, nil
}

// read returns a node of the old metadata, or a new one.
func (b *builder) read(loc block.Loc) (btree.Node, error) {
	if b.fresh[loc] {
		return readNode(newNodes{b}, loc, 8)
	}
	return b.f.read(loc)
}

// node writes a new node to a place where nothing is taken over. A second one with the same
// contents is the first.
func (b *builder) node(leaf bool, part []item) (block.Loc, error) {
	buf := make([]byte, block.Size)
	var v [8]byte
	btree.EncodeNode(buf, leaf, 8, len(part), func(i int) (uint64, []byte) {
		binary.LittleEndian.PutUint64(v[:], part[i].val)
		return part[i].key, v[:]
	})
	sum := sha256.Sum256(buf)
	if loc, ok := b.same[sum]; ok {
		return loc, nil
	}
	loc, err := b.alloc()
	if err != nil {
		return 0, err
	}
	b.same[sum] = loc
	block.Seal(buf, loc, block.Node)
	if b.out == nil {
		b.mem[loc] = buf
		return loc, nil
	}
	if _, err := b.out.WriteAt(buf, int64(loc)*block.Size); err != nil {
		return 0, fmt.Errorf("write metadata block %d: %w", loc, err)
	}
	return loc, nil
}

// alloc chooses a place for a new node.
func (b *builder) alloc() (block.Loc, error) {
	size := b.f.n
	if b.out != nil {
		size = block.Loc(b.out.Size() / block.Size)
	}
	for b.next < size && b.next < b.f.n && b.kept[b.next] {
		b.next++
	}
	if b.next >= size {
		return 0, fmt.Errorf("the new metadata device of %d blocks is too small: %w", size, thin.ErrNoMetaSpace)
	}
	loc := b.next
	b.next++
	b.fresh[loc] = true
	return loc, nil
}

// newNodes reads the nodes that a builder has written.
type newNodes struct{ b *builder }

func (r newNodes) Read(loc block.Loc, k block.Kind) ([]byte, error) {
	if r.b.out == nil {
		return r.b.mem[loc], nil
	}
	buf := make([]byte, block.Size)
	return buf, block.ReadInto(r.b.out, buf, loc, k)
}
