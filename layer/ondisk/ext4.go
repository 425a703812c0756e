package ondisk

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/layer/archive"
)

// The parts of an ext4 file system that are read here; everything is little-endian. Superblock, at
// byte 1024 of the device:
//
//	offset  size  field
//	0x04    4     blocks, low half
//	0x14    4     first data block: 1 if blocks have 1 KiB, else 0
//	0x18    4     block size is 1024 << this
//	0x20    4     blocks of a group
//	0x28    4     inodes of a group
//	0x38    2     magic 0xef53
//	0x3a    2     state: 1 unmounted in order, 2 errors
//	0x4c    4     revision; 0 has no fields beyond 0x54
//	0x58    2     inode size, bytes
//	0x60    4     features that a kernel must know to mount it
//	0xe8    4     first inode of the list of orphans
//	0xfe    2     size of a group's descriptor, if the feature 64bit is set
//	0x150   4     blocks, high half, if the feature 64bit is set
//
// The descriptors of all groups follow the block that the superblock is in (unless the feature meta_bg
// scatters them). Descriptor:
//
//	0x08    4     first block of the inode table, low half
//	0x28    4     high half, if a descriptor has 64 bytes
//
// Inode n is entry (n-1) mod (inodes of a group) in the table of group (n-1) / (inodes of a group).
//
// Source: Linux, Documentation/filesystems/ext4.
const (
	ext4At     = 1024
	ext4Magic  = 0x38
	ext4State  = 0x3a
	ext4Orphan = 0xe8

	ext4Filetype = 0x2
	ext4Recover  = 0x4
	ext4Extents  = 0x40
	ext464Bit    = 0x80
	ext4FlexBG   = 0x200
	// ext4Known are the features with which the tables are where this file looks for them.
	ext4Known = ext4Filetype | ext4Extents | ext464Bit | ext4FlexBG

	ext4MaxGroups = 1 << 20 // 128 TiB with blocks of 4 KiB
)

type ext4Super struct {
	magic, state         uint16
	incompat, orphan     uint32
	blocks               uint64
	first                uint32
	blockSize            int64
	groupBlocks, groupIn uint32 // blocks and inodes of a group
	inodeSize, descSize  int64
}

func readExt4Super(d dev.Device) (s ext4Super, err error) {
	b := make([]byte, 1024)
	if _, err := d.ReadAt(b, ext4At); err != nil {
		return s, err
	}
	le := binary.LittleEndian
	s.magic, s.state = le.Uint16(b[ext4Magic:]), le.Uint16(b[ext4State:])
	if s.magic != 0xef53 {
		return s, fmt.Errorf("no ext4 superblock: %w", unix.EUCLEAN)
	}
	s.incompat, s.orphan = le.Uint32(b[0x60:]), le.Uint32(b[ext4Orphan:])
	s.blocks, s.first = uint64(le.Uint32(b[0x4:])), le.Uint32(b[0x14:])
	if n := le.Uint32(b[0x18:]); n <= 6 {
		s.blockSize = 1024 << n
	}
	s.groupBlocks, s.groupIn = le.Uint32(b[0x20:]), le.Uint32(b[0x28:])
	s.inodeSize, s.descSize = 128, 32
	if le.Uint32(b[0x4c:]) > 0 {
		s.inodeSize = int64(le.Uint16(b[0x58:]))
	}
	if s.incompat&ext464Bit != 0 {
		s.blocks |= uint64(le.Uint32(b[0x150:])) << 32
		s.descSize = int64(le.Uint16(b[0xfe:]))
	}
	return s, nil
}

func ext4Clean(d dev.Device) (bool, error) {
	s, err := readExt4Super(d)
	return err == nil && s.incompat&ext4Recover == 0 && s.orphan == 0 && s.state&1 != 0, err
}

// An ext4Inodes knows where the inode tables are.
type ext4Inodes struct {
	s      ext4Super
	tables []int64 // of each group: where its table begins, bytes
}

func ext4Tables(lower, upper dev.Device) (*ext4Inodes, error) {
	up, err := readExt4Tables(upper)
	if err != nil {
		return nil, err
	}
	low, err := readExt4Tables(lower)
	if err != nil {
		return nil, err
	}
	// Enlarging adds groups; nothing else of this ever changes.
	if low.s.groupIn != up.s.groupIn || low.s.inodeSize != up.s.inodeSize || len(low.tables) > len(up.tables) {
		return nil, fmt.Errorf("%w: the two differ in their inode tables", ErrUnknown)
	}
	for g, at := range low.tables {
		if up.tables[g] != at {
			return nil, fmt.Errorf("%w: the inode table of group %d was moved", ErrUnknown, g)
		}
	}
	return up, nil
}

func readExt4Tables(d dev.Device) (*ext4Inodes, error) {
	s, err := readExt4Super(d)
	if err != nil {
		return nil, err
	}
	if s.incompat&^ext4Known != 0 || s.incompat&ext4Extents == 0 {
		return nil, fmt.Errorf("%w: features %#x", ErrUnknown, s.incompat)
	}
	if s.blockSize == 0 || s.groupBlocks == 0 || s.groupIn == 0 || s.inodeSize < 128 || s.inodeSize > s.blockSize ||
		bits.OnesCount64(uint64(s.inodeSize)) != 1 || s.descSize < 32 || s.descSize > 64 || uint64(s.first) >= s.blocks ||
		s.blocks > uint64(d.Size()/s.blockSize) {
		return nil, fmt.Errorf("%w: %d blocks of %d bytes, %d blocks and %d inodes of %d bytes in a group", ErrUnknown,
			s.blocks, s.blockSize, s.groupBlocks, s.groupIn, s.inodeSize)
	}
	groups := (s.blocks - uint64(s.first) + uint64(s.groupBlocks) - 1) / uint64(s.groupBlocks)
	if groups > ext4MaxGroups {
		return nil, fmt.Errorf("%w: %d groups", ErrUnknown, groups)
	}
	desc := make([]byte, int64(groups)*s.descSize)
	at := (int64(s.first) + 1) * s.blockSize
	if err := dev.CheckRange(at, int64(len(desc)), d.Size()); err != nil {
		return nil, fmt.Errorf("%w: group descriptors: %w", ErrUnknown, err)
	}
	if _, err := d.ReadAt(desc, at); err != nil {
		return nil, err
	}
	t := &ext4Inodes{s: s}
	for len(desc) > 0 {
		n := uint64(binary.LittleEndian.Uint32(desc[0x8:]))
		if s.descSize >= 64 {
			n |= uint64(binary.LittleEndian.Uint32(desc[0x28:])) << 32
		}
		if n == 0 || n >= s.blocks {
			return nil, fmt.Errorf("%w: inode table of group %d at block %d of %d", ErrUnknown, len(t.tables), n, s.blocks)
		}
		t.tables = append(t.tables, int64(n)*s.blockSize)
		desc = desc[s.descSize:]
	}
	return t, nil
}

func (t *ext4Inodes) inodes(off, end int64) (list []archive.InodeRange) {
	size, per := t.s.inodeSize, int64(t.s.groupIn)
	for g, at := range t.tables {
		if at >= end || at+per*size <= off {
			continue
		}
		first := max(0, (off-at)/size)
		last := min(per, (end-at+size-1)/size)
		base := uint64(g)*uint64(per) + 1
		list = append(list, archive.InodeRange{First: base + uint64(first), End: base + uint64(last)})
	}
	return list
}
