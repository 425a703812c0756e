package nbd

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"mica/dev"
)

func pattern(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// TestReadBackAllSizes writes and reads back every path through the server: inline, pieces,
// whole, streamed; with both kinds of replies.
func TestReadBackAllSizes(t *testing.T) {
	sizes := []int{512, 4096, inlineMax, inlineMax + 512, pieceSize, pieceSize + 512, wholeSize, wholeSize + 4096, maxPayload}
	for _, structured := range []bool{false, true} {
		_, c := serveDevice(t, dev.NewMem(64<<20), ExportOptions{}, structured, false)
		for _, n := range sizes {
			for _, fua := range []uint16{0, cmdFlagFUA} {
				off := uint64(1<<20 + 512)
				want := pattern(uint64(n), n)
				if _, _, err := c.do(fua, cmdWrite, off, uint32(n), want); err != nil {
					t.Fatalf("structured %v: write of %d: %v", structured, n, err)
				}
				got, _, err := c.do(0, cmdRead, off, uint32(n), nil)
				if err != nil {
					t.Fatalf("structured %v: read of %d: %v", structured, n, err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("structured %v: read of %d differs from what was written", structured, n)
				}
			}
		}
	}
}
