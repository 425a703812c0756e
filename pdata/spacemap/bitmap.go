package spacemap

import (
	"encoding/binary"

	"mica/pdata/block"
)

// Bitmap block of a space map: 4096 bytes, little-endian, counts of 16320 blocks.
//
//	offset  size  field
//	0       4     csum     CRC-32C of bytes 4..4095 without final inversion, XOR 240779
//	4       4     unused   zero
//	8       8     blocknr  where this block lives
//	16      4080  entries  2 bits each
//
// Entry e is bits 2*(e%4) and 2*(e%4)+1 of byte 16+e/4. The LOWER of the two bits is the high
// bit of the count: the pair is mirrored. Counts 0, 1, 2, "3 or more" in one byte are 0xD8
// (TestBitmapWorkedExample). Source: format description, section 4.3.

// EntriesPerBitmap is the number of blocks whose counts one bitmap holds.
const EntriesPerBitmap = 4 * (block.Size - bitmapHeader)

const bitmapHeader = 16

var countOfRaw = [4]uint8{0: 0, 1: 2, 2: 1, 3: 3}

// rawOfCount is the inverse of countOfRaw; counts above 3 are 3.
var rawOfCount = [4]uint8{0: 0, 1: 2, 2: 1, 3: 3}

// BitmapEntry returns the count of entry e: 0, 1, 2, or 3 for "3 or more".
func BitmapEntry(b []byte, e int) uint8 {
	return countOfRaw[b[bitmapHeader+e/4]>>(2*(e%4))&3]
}

// SetBitmapEntry stores min(count, 3).
func SetBitmapEntry(b []byte, e int, count uint32) {
	p, s := &b[bitmapHeader+e/4], 2*(e%4)
	*p = *p&^(3<<s) | rawOfCount[min(count, 3)]<<s
}

// encodeBitmap writes the entries of bitmap i and returns its index entry (without a place).
func (c *Counts) encodeBitmap(i uint64, b []byte) IndexEntry {
	clear(b[bitmapHeader:])
	begin := i * EntriesPerBitmap
	n := int(min(EntriesPerBitmap, c.Len()-begin))
	used, first := 0, -1
	for e, count := range c.counts[begin : begin+uint64(n)] {
		if count != 0 {
			used++
			b[bitmapHeader+e/4] |= rawOfCount[min(count, 3)] << (2 * (e % 4))
		} else if first < 0 {
			first = e
		}
	}
	if first < 0 {
		first = n // the next entry lies beyond the end, or does not exist
	}
	return IndexEntry{NrFree: uint32(EntriesPerBitmap - used), NoneFreeBefore: uint32(first)}
}

// decodeBitmap loads the counts 1, 2 of bitmap i and returns the blocks whose count is in the
// overflow tree. Bits beyond the last block are ignored.
func (c *Counts) decodeBitmap(i uint64, b []byte) (overflow []uint64) {
	begin := i * EntriesPerBitmap
	n := int(min(EntriesPerBitmap, c.Len()-begin))
	for e := 0; e < n; e++ {
		if e%4 == 0 && b[bitmapHeader+e/4] == 0 {
			e += 3
			continue
		}
		switch v := BitmapEntry(b, e); v {
		case 0:
		case 3:
			overflow = append(overflow, begin+uint64(e))
		default:
			c.load(begin+uint64(e), uint32(v))
		}
	}
	return overflow
}

// IndexEntry says where a bitmap is and what is free in it: 16 bytes on the medium.
//
//	offset  size  field
//	0       8     blocknr           where the bitmap is
//	8       4     nr_free           16320 less the entries that are not zero, also in the last bitmap
//	12      4     none_free_before  all entries below this one are not zero
//
// Source: format description, section 4.4.
type IndexEntry struct {
	Block          block.Loc
	NrFree         uint32
	NoneFreeBefore uint32
}

// IndexEntrySize is the length in bytes of an encoded IndexEntry.
const IndexEntrySize = 16

// Encode writes e into b.
func (e IndexEntry) Encode(b []byte) {
	binary.LittleEndian.PutUint64(b, uint64(e.Block))
	binary.LittleEndian.PutUint32(b[8:], e.NrFree)
	binary.LittleEndian.PutUint32(b[12:], e.NoneFreeBefore)
}

// DecodeIndexEntry reads an index entry.
func DecodeIndexEntry(b []byte) IndexEntry {
	return IndexEntry{block.Loc(binary.LittleEndian.Uint64(b)),
		binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])}
}

// MaxIndexEntries is the number of bitmaps that the metadata index block has room for.
const MaxIndexEntries = (block.Size - bitmapHeader) / IndexEntrySize

// MaxMetaBlocks is the largest number of metadata blocks: 15.875 GiB.
const MaxMetaBlocks = MaxIndexEntries * EntriesPerBitmap

// MetaIndexEntry reads entry i of a metadata index block.
func MetaIndexEntry(b []byte, i int) IndexEntry {
	return DecodeIndexEntry(b[bitmapHeader+i*IndexEntrySize:])
}

// Root is the 32-byte root of a space map in the superblock.
//
//	offset  size  field
//	0       8     nr_blocks
//	8       8     nr_allocated    blocks with a count above 0
//	16      8     bitmap_root     data: root of the index tree; metadata: the index block
//	24      8     ref_count_root  root of the overflow tree
//
// Source: format description, section 4.2.
type Root struct {
	NrBlocks    uint64
	NrAllocated uint64
	BitmapRoot  block.Loc
	Overflow    block.Loc
}

// Encode writes r into b[:32].
func (r Root) Encode(b []byte) {
	binary.LittleEndian.PutUint64(b, r.NrBlocks)
	binary.LittleEndian.PutUint64(b[8:], r.NrAllocated)
	binary.LittleEndian.PutUint64(b[16:], uint64(r.BitmapRoot))
	binary.LittleEndian.PutUint64(b[24:], uint64(r.Overflow))
}

// DecodeRoot reads a space map root.
func DecodeRoot(b []byte) Root {
	return Root{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]),
		block.Loc(binary.LittleEndian.Uint64(b[16:])), block.Loc(binary.LittleEndian.Uint64(b[24:]))}
}
