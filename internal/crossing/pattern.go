package crossing

import (
	"encoding/binary"
	"fmt"
	"hash/crc64"
)

// Fill writes the pattern of seed into p, which lies at byte off of its device; off and len(p)
// are multiples of SectorSize. Every sector begins with a word of seed (top 32 bits) and sector
// number (low 32 bits) and goes on with a random sequence derived from that word. Seed 0 is
// zeros.
func Fill(p []byte, seed uint32, off int64) {
	if seed == 0 {
		clear(p)
		return
	}
	for sector := uint64(off / SectorSize); len(p) >= SectorSize; sector++ {
		head := uint64(seed)<<32 | sector&0xffffffff
		binary.LittleEndian.PutUint64(p, head)
		x := head
		for i := 8; i < SectorSize; i += 8 {
			x = x*6364136223846793005 + 1442695040888963407
			binary.LittleEndian.PutUint64(p[i:], x)
		}
		p = p[SectorSize:]
	}
}

// Describe says what a sector looks like, for messages.
func Describe(sector []byte) string {
	for _, b := range sector {
		if b != 0 {
			head := binary.LittleEndian.Uint64(sector)
			var want [SectorSize]byte
			Fill(want[:], uint32(head>>32), int64(head&0xffffffff)*SectorSize)
			if head>>32 != 0 && string(want[:]) == string(sector) {
				return fmt.Sprintf("write %d of sector %d", head>>32, head&0xffffffff)
			}
			return fmt.Sprintf("neither zeros nor one write (% x...)", sector[:16])
		}
	}
	return "zeros"
}

var crcTable = crc64.MakeTable(crc64.ECMA)

// Hash is the checksum by which blocks are compared: CRC-64/ECMA.
func Hash(block []byte) uint64 { return crc64.Checksum(block, crcTable) }

// HashBlocks reads size bytes from r in blocks and returns the hash of each; the last may be
// short.
func HashBlocks(r interface {
	ReadAt([]byte, int64) (int, error)
}, size, block int64, buf []byte) ([]uint64, error) {
	per := max(int64(len(buf))/block, 1)
	if int64(len(buf)) < block {
		return nil, fmt.Errorf("buffer of %d bytes for blocks of %d", len(buf), block)
	}
	hashes := make([]uint64, 0, (size+block-1)/block)
	for off := int64(0); off < size; {
		p := buf[:min(per*block, size-off)]
		if n, err := r.ReadAt(p, off); n < len(p) {
			return nil, fmt.Errorf("read of %d bytes at %d: got %d: %w", len(p), off, n, err)
		}
		off += int64(len(p))
		for len(p) > 0 {
			n := min(block, int64(len(p)))
			hashes = append(hashes, Hash(p[:n]))
			p = p[n:]
		}
	}
	return hashes, nil
}
