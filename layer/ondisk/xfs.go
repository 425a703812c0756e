package ondisk

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"mica/dev"
)

// The parts of an XFS file system that tell whether it was unmounted in order; everything is
// big-endian. Superblock, at byte 0 of the device:
//
//	offset  size  field
//	0       4     magic      "XFSB"
//	4       4     blocksize  bytes
//	8       8     dblocks    blocks of the file system
//	48      8     logstart   first block of the log, as group and block in it; 0: the log is elsewhere
//	84      4     agblocks   blocks of an allocation group
//	96      4     logblocks
//	100     2     version    its low four bits; 5 has checksums and feature words
//	104     2     inodesize  bytes
//	106     2     inopblock  inodes of a block
//	123     1     inopblog   bits of the number of an inode in its block
//	124     1     agblklog   bits of the block number within a group
//	212     4     features that a kernel must know to mount it for writing
//	216     4     features that a kernel must know to mount it
//
// Source: "XFS Algorithms & Data Structures", chapter on superblocks.
const (
	xfsSuper  = 0x58465342
	xfsSector = 512
)

// xfsSuperblock is what is read of it. Blocks are those of the file system.
type xfsSuperblock struct {
	block, agblocks    int64 // bytes of a block, blocks of a group
	agbits, inodeBits  uint  // of a block's number in its group, of an inode's in its block
	blocks             int64
	logStart           uint64 // as group and block in it
	logBytes           int64
	inodeSize, inBlock int64 // bytes of an inode, inodes of a block
	version            uint16
	incompat           uint32
}

func readXFSSuper(d dev.Device) (s xfsSuperblock, err error) {
	sb := make([]byte, xfsSector)
	if _, err := d.ReadAt(sb, 0); err != nil {
		return s, err
	}
	be := binary.BigEndian
	if be.Uint32(sb) != xfsSuper {
		return s, fmt.Errorf("no XFS superblock: %w", unix.EUCLEAN)
	}
	s = xfsSuperblock{block: int64(be.Uint32(sb[4:])), agblocks: int64(be.Uint32(sb[84:])), agbits: uint(sb[124]),
		inodeBits: uint(sb[123]), logStart: be.Uint64(sb[48:]), inodeSize: int64(be.Uint16(sb[104:])),
		inBlock: int64(be.Uint16(sb[106:])), version: be.Uint16(sb[100:]) & 15, incompat: be.Uint32(sb[216:])}
	if n := be.Uint64(sb[8:]); n <= 1<<52 {
		s.blocks = int64(n)
	}
	if s.agbits > 31 || s.agblocks == 0 || s.agblocks > 1<<s.agbits || s.block < xfsSector || s.block > 64<<10 {
		return s, fmt.Errorf("XFS groups of %d blocks of %d bytes: %w", s.agblocks, s.block, unix.EUCLEAN)
	}
	s.logBytes = int64(be.Uint32(sb[96:])) * s.block
	return s, nil
}

// Features that kernel 5.4 knows: free inode trees, reverse maps, shared blocks to write; types in
// directories, sparse chunks of inodes and another UUID to mount at all.
const (
	xfsOldROCompat = 0x1 | 0x2 | 0x4
	xfsOldIncompat = 0x1 | 0x2 | 0x4
)

// CheckXFS returns an error if kernel 5.4 does not mount the XFS file system on a device for writing.
func CheckXFS(r io.ReaderAt) error {
	sb := make([]byte, xfsSector)
	if _, err := r.ReadAt(sb, 0); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint32(sb) != xfsSuper {
		return fmt.Errorf("no XFS superblock: %w", unix.EUCLEAN)
	}
	ro, in := be.Uint32(sb[212:]), be.Uint32(sb[216:])
	if ro&^xfsOldROCompat != 0 || in&^xfsOldIncompat != 0 {
		return fmt.Errorf("this mkfs.xfs makes features (%#x, %#x) that kernel 5.4 does not know: %w", ro, in, ErrUnknown)
	}
	return nil
}

// xfsClean tells whether an XFS file system can be mounted without its log.
func xfsClean(d dev.Device) (bool, error) {
	s, err := readXFSSuper(d)
	if err != nil {
		return false, err
	}
	length := s.logBytes
	if s.logStart == 0 || length <= 0 || length > xfsMaxLog {
		return false, fmt.Errorf("XFS log at block %d of %d bytes: %w", s.logStart, length, unix.EUCLEAN)
	}
	at := (int64(s.logStart>>s.agbits)*s.agblocks + int64(s.logStart&(1<<s.agbits-1))) * s.block
	if err := dev.CheckRange(at, length, d.Size()); err != nil {
		return false, fmt.Errorf("XFS log: %w: %w", unix.EUCLEAN, err)
	}
	return xfsLog{d, at, length}.clean()
}
