package ondisk

import (
	"fmt"

	"mica/dev"
	"mica/layer/archive"
)

// The number of an XFS inode says where it lies:
//
//	group << (agblklog + inopblog) | block in the group << inopblog | inode in the block
//
// so that every block has the numbers of the inodes that it would hold if it held any, and no tables
// need be read. Source: "XFS Algorithms & Data Structures", "Inode Numbers".

// xfsIncompat are the features with which that is so: file types in directories, sparse inode chunks,
// a UUID of the metadata, large timestamps, large extent counters.
const xfsIncompat = 0x1 | 0x2 | 0x4 | 0x8 | 0x20

func xfsNumbers(lower, upper dev.Device) (*xfsSuperblock, error) {
	low, err := readXFSSuper(lower)
	if err != nil {
		return nil, err
	}
	up, err := readXFSSuper(upper)
	if err != nil {
		return nil, err
	}
	if up.version != 5 || up.incompat&^xfsIncompat != 0 {
		return nil, fmt.Errorf("%w: version %d, features %#x", ErrUnknown, up.version, up.incompat)
	}
	if up.inodeSize < 256 || up.inodeBits > 16 || up.inBlock != 1<<up.inodeBits || up.inodeSize*up.inBlock != up.block ||
		up.blocks <= 0 || up.blocks > upper.Size()/up.block {
		return nil, fmt.Errorf("%w: %d blocks of %d bytes with %d inodes of %d bytes", ErrUnknown, up.blocks, up.block, up.inBlock, up.inodeSize)
	}
	// Enlarging adds groups; nothing else of this ever changes.
	if low.block != up.block || low.agblocks != up.agblocks || low.agbits != up.agbits || low.inodeBits != up.inodeBits || low.blocks > up.blocks {
		return nil, fmt.Errorf("%w: the two differ in their groups", ErrUnknown)
	}
	return &up, nil
}

func (s *xfsSuperblock) inodes(off, end int64) (list []archive.InodeRange) {
	last := min((end+s.block-1)/s.block, s.blocks)
	for b := off / s.block; b < last; {
		group, in := b/s.agblocks, b%s.agblocks
		n := min(last-b, s.agblocks-in)
		first := uint64(group)<<(s.agbits+s.inodeBits) | uint64(in)<<s.inodeBits
		list = append(list, archive.InodeRange{First: first, End: first + uint64(n)<<s.inodeBits})
		b += n
	}
	return list
}
