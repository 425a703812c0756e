package thin

import (
	"encoding/binary"
	"errors"
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// Superblock: metadata block 0, little-endian. All meaning is in the first 512 bytes.
//
//	offset  size  field
//	0       4     csum                     salt 160774
//	4       4     flags                    bit 0: needs_check
//	8       8     blocknr                  0; in a metadata snapshot its own number
//	16      16    uuid                     not interpreted
//	32      8     magic                    27022010
//	40      4     version                  2
//	44      4     time                     snapshot counter, below 2^24
//	48      8     trans_id                 the caller's transaction id
//	56      8     held_root                block of the metadata snapshot, 0: none
//	64      128   data_space_map_root      32 bytes used
//	192     128   metadata_space_map_root  32 bytes used
//	320     8     data_mapping_root        top level of the mapping tree
//	328     8     device_details_root
//	336     4     data_block_size          512-byte sectors
//	340     4     metadata_block_size      8 sectors
//	344     8     metadata_nr_blocks       at format time; not kept up to date
//	352     4     compat_flags
//	356     4     compat_ro_flags
//	360     4     incompat_flags
//
// Source: format description, section 2; TestSuperblockWorkedExample.
type Superblock struct {
	Flags          uint32
	Block          block.Loc
	UUID           [16]byte
	Magic          uint64
	Version        uint32
	Time           uint32
	TransactionID  uint64
	HeldRoot       block.Loc
	DataMap        spacemap.Root
	MetaMap        spacemap.Root
	MappingRoot    block.Loc
	DetailsRoot    block.Loc
	DataBlockSize  uint32 // sectors
	MetaBlockSize  uint32 // sectors
	MetaBlocksThen uint64
	CompatFlags    uint32
	CompatROFlags  uint32
	IncompatFlags  uint32
}

const (
	superblockMagic   = 27022010
	superblockVersion = 2
	flagNeedsCheck    = 1
	metaSectors       = block.Size / sectorSize
	sectorSize        = 512
	smRootSlot        = 128
	superblockUsed    = 364
	superblockAt      = block.Loc(0)

	// MinBlockSize and MaxBlockSize bound the data block size, in bytes; it is a multiple of
	// MinBlockSize.
	MinBlockSize = 64 << 10
	MaxBlockSize = 1 << 30
)

// DecodeSuperblock reads the fields; it judges nothing.
func DecodeSuperblock(b []byte) Superblock {
	le := binary.LittleEndian
	s := Superblock{
		Flags: le.Uint32(b[4:]), Block: block.Loc(le.Uint64(b[8:])), Magic: le.Uint64(b[32:]),
		Version: le.Uint32(b[40:]), Time: le.Uint32(b[44:]), TransactionID: le.Uint64(b[48:]),
		HeldRoot: block.Loc(le.Uint64(b[56:])),
		DataMap:  spacemap.DecodeRoot(b[64:]), MetaMap: spacemap.DecodeRoot(b[64+smRootSlot:]),
		MappingRoot: block.Loc(le.Uint64(b[320:])), DetailsRoot: block.Loc(le.Uint64(b[328:])),
		DataBlockSize: le.Uint32(b[336:]), MetaBlockSize: le.Uint32(b[340:]), MetaBlocksThen: le.Uint64(b[344:]),
		CompatFlags: le.Uint32(b[352:]), CompatROFlags: le.Uint32(b[356:]), IncompatFlags: le.Uint32(b[360:]),
	}
	copy(s.UUID[:], b[16:])
	return s
}

// NeedsCheck reports whether the pool is marked needs_check.
func (s *Superblock) NeedsCheck() bool { return s.Flags&flagNeedsCheck != 0 }

// Encode writes the fields into b, which keeps what Superblock does not name. It does not seal.
func (s *Superblock) Encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], s.Flags)
	le.PutUint64(b[8:], uint64(s.Block))
	copy(b[16:32], s.UUID[:])
	le.PutUint64(b[32:], s.Magic)
	le.PutUint32(b[40:], s.Version)
	le.PutUint32(b[44:], s.Time)
	le.PutUint64(b[48:], s.TransactionID)
	le.PutUint64(b[56:], uint64(s.HeldRoot))
	s.DataMap.Encode(b[64:])
	s.MetaMap.Encode(b[64+smRootSlot:])
	le.PutUint64(b[320:], uint64(s.MappingRoot))
	le.PutUint64(b[328:], uint64(s.DetailsRoot))
	le.PutUint32(b[336:], s.DataBlockSize)
	le.PutUint32(b[340:], s.MetaBlockSize)
	le.PutUint64(b[344:], s.MetaBlocksThen)
	le.PutUint32(b[352:], s.CompatFlags)
	le.PutUint32(b[356:], s.CompatROFlags)
	le.PutUint32(b[360:], s.IncompatFlags)
}

// readSuperblock reads and verifies block 0; ErrNoPool if it is all zeros.
func readSuperblock(d dev.Device, buf []byte) error {
	err := block.ReadInto(d, buf, superblockAt, block.Superblock)
	if errors.Is(err, ErrCorrupt) && d.Size() >= block.Size && allZero(buf[:block.Size]) {
		return ErrNoPool
	}
	return err
}

// Validate refuses what this code, or a kernel, must not open: another magic, unknown
// features, an illegal data block size.
func (s *Superblock) Validate(readOnly bool) error {
	switch size := int64(s.DataBlockSize) * sectorSize; {
	case s.Magic != superblockMagic:
		return block.Corruptf(superblockAt, "superblock magic %d, want %d: not a thin pool's metadata", s.Magic, superblockMagic)
	case s.IncompatFlags != 0:
		return fmt.Errorf("superblock has incompatible features %#x that this version does not know", s.IncompatFlags)
	case s.CompatROFlags != 0 && !readOnly:
		return fmt.Errorf("superblock has features %#x with which it can only be opened read-only", s.CompatROFlags)
	case s.MetaBlockSize != metaSectors:
		return block.Corruptf(superblockAt, "metadata block size %d sectors, want %d", s.MetaBlockSize, metaSectors)
	case CheckBlockSize(size) != nil:
		return block.Corruptf(superblockAt, "%v", CheckBlockSize(size))
	}
	return nil
}

// CheckBlockSize says whether a pool may have data blocks of size bytes.
func CheckBlockSize(size int64) error {
	if size < MinBlockSize || size > MaxBlockSize || size%MinBlockSize != 0 {
		return fmt.Errorf("data block size %d bytes: must be a multiple of %d from %d to %d",
			size, MinBlockSize, MinBlockSize, MaxBlockSize)
	}
	return nil
}
