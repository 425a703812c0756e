// Package block reads and writes checked metadata blocks: 4096 bytes, each with a checksum and
// its own number in its header.
//
// Every block begins with
//
//	offset  size  field
//	0       4     csum     CRC-32C of bytes 4..4095 without final inversion, XOR a salt
//	4       4     flags    (superblock, node) or unused (bitmap, index)
//	8       8     blocknr  where this block lives
//
// The kind of a block is not stored: it follows from the pointer used to reach it, and selects
// the salt. All integers are little-endian. Source: format description, sections 1.1 to 1.3;
// TestChecksumVectors holds its test vectors.
package block

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Size is the length in bytes of every metadata block.
const Size = 4096

// A Loc is the number of a metadata block, counted in blocks of Size bytes from the start of
// the metadata device.
type Loc uint64

// A Kind is one of the four block types.
type Kind uint8

const (
	Superblock Kind = iota
	Node            // B-tree node
	Bitmap          // space map bitmap
	Index           // index block of the metadata space map
)

var salts = [...]uint32{Superblock: 160774, Node: 121107, Bitmap: 240779, Index: 160478}

func (k Kind) String() string {
	if int(k) < len(salts) {
		return [...]string{"superblock", "b-tree node", "bitmap", "metadata index"}[k]
	}
	return fmt.Sprintf("block kind %d", uint8(k))
}

// ErrCorrupt is what every complaint about bytes on the medium wraps.
var ErrCorrupt = errors.New("corrupt metadata")

// A CorruptError says which block is wrong and how.
type CorruptError struct {
	Block Loc
	What  string // "b-tree node checksum 0x1f2e3d4c, want 0x99aa0011"
}

func (e *CorruptError) Error() string { return fmt.Sprintf("metadata block %d: %s", e.Block, e.What) }

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Corruptf makes a CorruptError.
func Corruptf(b Loc, format string, args ...any) error {
	return &CorruptError{Block: b, What: fmt.Sprintf(format, args...)}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the csum field that b must carry as a block of kind k.
func Checksum(b []byte, k Kind) uint32 {
	return ^crc32.Checksum(b[4:Size], castagnoli) ^ salts[k]
}

// Seal sets blocknr and csum, as is done just before a block is written.
func Seal(b []byte, loc Loc, k Kind) {
	binary.LittleEndian.PutUint64(b[8:], uint64(loc))
	binary.LittleEndian.PutUint32(b, Checksum(b, k))
}

// Verify returns a CorruptError unless b is a sealed block of kind k that lives at loc.
func Verify(b []byte, loc Loc, k Kind) error {
	if got, want := binary.LittleEndian.Uint32(b), Checksum(b, k); got != want {
		if is, ok := Identify(b); ok {
			return Corruptf(loc, "is a %s, want a %s", is, k)
		}
		return Corruptf(loc, "%s checksum %#08x, want %#08x", k, got, want)
	}
	if got := binary.LittleEndian.Uint64(b[8:]); got != uint64(loc) {
		return Corruptf(loc, "%s says it is block %d", k, got)
	}
	return nil
}

// Identify returns the kind whose salt fits b's checksum, wherever b lives.
func Identify(b []byte) (Kind, bool) {
	r := Checksum(b, Superblock) ^ salts[Superblock] ^ binary.LittleEndian.Uint32(b)
	for k, s := range salts {
		if r == s {
			return Kind(k), true
		}
	}
	return 0, false
}
