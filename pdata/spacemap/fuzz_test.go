package spacemap

import (
	"bytes"
	"testing"

	"mica/pdata/block"
)

// FuzzBitmap: what is loaded from a bitmap is written back as it was, and the index entry tells
// the truth about it.
func FuzzBitmap(f *testing.F) {
	f.Add([]byte{0xfb, 0x09}, uint16(25))
	f.Add(bytes.Repeat([]byte{0xaa}, 4080), uint16(16319))
	f.Fuzz(func(t *testing.T, in []byte, blocks uint16) {
		n := uint64(blocks)%EntriesPerBitmap + 1
		b := make([]byte, block.Size)
		copy(b[bitmapHeader:], in)
		for e := int(n); e < EntriesPerBitmap; e++ {
			SetBitmapEntry(b, e, 0)
		}
		c := newCounts("data")
		c.grow(n)
		for _, o := range c.decodeBitmap(0, b) {
			c.load(o, 3+uint32(o))
		}
		out := make([]byte, block.Size)
		e := c.encodeBitmap(0, out)
		if !bytes.Equal(out, b) {
			t.Fatal("the bitmap is not what was loaded")
		}
		used, first := 0, int(n)
		for i := int(n) - 1; i >= 0; i-- {
			if BitmapEntry(b, i) == 0 {
				first = i
			} else {
				used++
			}
		}
		if int(e.NrFree) != EntriesPerBitmap-used || int(e.NoneFreeBefore) != first {
			t.Fatalf("nr_free %d none_free_before %d, want %d %d", e.NrFree, e.NoneFreeBefore, EntriesPerBitmap-used, first)
		}
		if c.mapped != uint64(used) {
			t.Fatalf("%d blocks mapped, want %d", c.mapped, used)
		}
	})
}
