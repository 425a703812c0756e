package thin

import (
	"encoding/binary"
	"fmt"
	"io"

	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/spacemap"
)

// WriteImage writes the metadata of the state as a metadata device: every block that the state uses
// in its place, verified, and zeros between. What devices share is shared in it. dataBlocks is the
// number of data blocks to name where the state does not have it, 0 otherwise: a metadata snapshot
// has no space maps, and the image has none then.
//
// ErrCorrupt if any block of the state is damaged.
func (v *View) WriteImage(w io.Writer, dataBlocks uint64) error {
	g := imageWalk{v: v, kind: make([]uint8, v.d.Size()/block.Size)}
	if err := g.state(&v.sb); err != nil {
		return fmt.Errorf("image of the metadata: %w", err)
	}
	sb := v.sb
	sb.Block = superblockAt
	if sb.DataMap.NrBlocks == 0 {
		sb.DataMap.NrBlocks = dataBlocks
	}
	first := make([]byte, block.Size)
	sb.Encode(first)
	block.Seal(first, superblockAt, block.Superblock)
	if err := g.write(w, first); err != nil {
		return fmt.Errorf("image of the metadata: %w", err)
	}
	return nil
}

// An imageWalk finds the blocks of a state.
type imageWalk struct {
	v    *View
	kind []uint8 // by metadata block: 1 and the kind, 0 if it is not used
	buf  []byte
}

// claim notes a block, and reports whether it is new.
func (g *imageWalk) claim(loc block.Loc, k block.Kind) (bool, error) {
	if loc == superblockAt || loc >= block.Loc(len(g.kind)) {
		return false, block.Corruptf(loc, "used as a %v, the device has %d blocks", k, len(g.kind))
	}
	if was := g.kind[loc]; was != 0 {
		if was != uint8(k)+1 {
			return false, block.Corruptf(loc, "used as a %v and as a %v", block.Kind(was-1), k)
		}
		return false, nil
	}
	g.kind[loc] = uint8(k) + 1
	return true, nil
}

// state notes everything that a superblock names.
func (g *imageWalk) state(s *Superblock) error {
	if s.HeldRoot != 0 {
		if _, err := g.claim(s.HeldRoot, block.Superblock); err != nil {
			return err
		}
		b, err := g.v.read.Read(s.HeldRoot, block.Superblock)
		if err != nil {
			return err
		}
		held := DecodeSuperblock(b)
		if held.HeldRoot != 0 {
			return block.Corruptf(s.HeldRoot, "a metadata snapshot with one of its own")
		}
		if err := g.state(&held); err != nil {
			return err
		}
	}
	mapping := func(b []byte) error { return g.tree(block.Loc(binary.LittleEndian.Uint64(b)), 8, 0, nil) }
	if err := g.tree(s.MappingRoot, 8, 0, mapping); err != nil {
		return err
	}
	if err := g.tree(s.DetailsRoot, detailsSize, 0, nil); err != nil {
		return err
	}
	if s.MetaMap.NrBlocks == 0 { // a metadata snapshot
		return nil
	}
	bitmap := func(b []byte) error {
		_, err := g.claim(spacemap.DecodeIndexEntry(b).Block, block.Bitmap)
		return err
	}
	if err := g.tree(s.DataMap.BitmapRoot, spacemap.IndexEntrySize, 0, bitmap); err != nil {
		return err
	}
	for _, over := range []block.Loc{s.DataMap.Overflow, s.MetaMap.Overflow} {
		if err := g.tree(over, 4, 0, nil); err != nil {
			return err
		}
	}
	if _, err := g.claim(s.MetaMap.BitmapRoot, block.Index); err != nil {
		return err
	}
	b, err := g.v.read.Read(s.MetaMap.BitmapRoot, block.Index)
	if err != nil {
		return err
	}
	for i := range spacemap.MaxIndexEntries {
		if uint64(i)*spacemap.EntriesPerBitmap >= s.MetaMap.NrBlocks {
			break
		}
		if _, err := g.claim(spacemap.MetaIndexEntry(b, i).Block, block.Bitmap); err != nil {
			return err
		}
	}
	return nil
}

// tree notes the nodes of a tree, each once, and calls leaf for the values.
func (g *imageWalk) tree(loc block.Loc, size, depth int, leaf func(v []byte) error) error {
	fresh, err := g.claim(loc, block.Node)
	if err != nil || !fresh {
		return err
	}
	if depth > btree.MaxDepth {
		return block.Corruptf(loc, "b-tree deeper than %d", btree.MaxDepth)
	}
	b, err := g.v.read.Read(loc, block.Node)
	if err != nil {
		return err
	}
	n, err := btree.ParseNode(b, loc, size)
	if err != nil {
		return err
	}
	for i := range n.Len() {
		switch {
		case !n.Leaf():
			err = g.tree(n.Child(i), size, depth+1, leaf)
		case leaf != nil:
			err = leaf(n.Value(i))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// imageRun is how many blocks are read and written at once.
const imageRun = 256

// write writes the blocks in order.
func (g *imageWalk) write(w io.Writer, superblock []byte) error {
	buf := make([]byte, imageRun*block.Size)
	for begin := 0; begin < len(g.kind); begin += imageRun {
		end := min(begin+imageRun, len(g.kind))
		b := buf[:(end-begin)*block.Size]
		clear(b)
		for i := begin; i < end; {
			if g.kind[i] == 0 {
				i++
				continue
			}
			j := i
			for j < end && g.kind[j] != 0 {
				j++
			}
			part := b[(i-begin)*block.Size : (j-begin)*block.Size]
			if _, err := g.v.d.ReadAt(part, int64(i)*block.Size); err != nil {
				return fmt.Errorf("read %d metadata blocks at %d: %w", j-i, i, err)
			}
			for ; i < j; i++ {
				at := b[(i-begin)*block.Size : (i-begin+1)*block.Size]
				if err := block.Verify(at, block.Loc(i), block.Kind(g.kind[i]-1)); err != nil {
					return err
				}
			}
		}
		if begin == 0 {
			copy(b, superblock)
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}
