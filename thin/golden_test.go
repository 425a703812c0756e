package thin

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"strings"
	"testing"

	"mica/dev"
	"mica/pdata/block"
)

// The worked example of the format description, section 10: a pool that a kernel wrote, every
// block of it as offset and bytes; what is not named is zero.
var workedExample = []struct {
	loc  block.Loc
	kind block.Kind
	csum uint32 // where the description names it
	text string
}{
	{0, block.Superblock, 0xef1bd6b5, `
000  b5 d6 1b ef 00 00 00 00  00 00 00 00 00 00 00 00
020  ba 52 9c 01 00 00 00 00  02 00 00 00 02 00 00 00
030  05 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
040  19 00 00 00 00 00 00 00  06 00 00 00 00 00 00 00
050  42 00 00 00 00 00 00 00  40 00 00 00 00 00 00 00
0c0  00 04 00 00 00 00 00 00  0c 00 00 00 00 00 00 00
0d0  43 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00
140  3e 00 00 00 00 00 00 00  41 00 00 00 00 00 00 00
150  80 00 00 00 08 00 00 00  00 04 00 00 00 00 00 00`},
	{62, block.Node, 0xac0df0cb, `
000  cb f0 0d ac 02 00 00 00  3e 00 00 00 00 00 00 00
010  03 00 00 00 fc 00 00 00  08 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
030  02 00 00 00 00 00 00 00
800  3f 00 00 00 00 00 00 00  29 00 00 00 00 00 00 00
810  34 00 00 00 00 00 00 00`},
	{63, block.Node, 0x3dedfe14, `
000  14 fe ed 3d 02 00 00 00  3f 00 00 00 00 00 00 00
010  05 00 00 00 fc 00 00 00  08 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
030  02 00 00 00 00 00 00 00  05 00 00 00 00 00 00 00
040  07 00 00 00 00 00 00 00
800  00 00 00 00 00 00 00 00  01 00 00 04 00 00 00 00
810  00 00 00 02 00 00 00 00  00 00 00 03 00 00 00 00
820  02 00 00 05 00 00 00 00`},
	{41, block.Node, 0, `
000  00 00 00 00 02 00 00 00  29 00 00 00 00 00 00 00
010  04 00 00 00 fc 00 00 00  08 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
030  02 00 00 00 00 00 00 00  05 00 00 00 00 00 00 00
800  00 00 00 00 00 00 00 00  00 00 00 01 00 00 00 00
810  00 00 00 02 00 00 00 00  00 00 00 03 00 00 00 00`},
	{52, block.Node, 0, `
000  00 00 00 00 02 00 00 00  34 00 00 00 00 00 00 00
010  04 00 00 00 fc 00 00 00  08 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
030  02 00 00 00 00 00 00 00  05 00 00 00 00 00 00 00
800  00 00 00 00 00 00 00 00  01 00 00 04 00 00 00 00
810  00 00 00 02 00 00 00 00  00 00 00 03 00 00 00 00`},
	{65, block.Node, 0xc1b729b9, `
000  b9 29 b7 c1 02 00 00 00  41 00 00 00 00 00 00 00
010  03 00 00 00 7e 00 00 00  18 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00
030  02 00 00 00 00 00 00 00
410  05 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
420  00 00 00 00 02 00 00 00  04 00 00 00 00 00 00 00
430  00 00 00 00 00 00 00 00  01 00 00 00 01 00 00 00
440  04 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
450  02 00 00 00 02 00 00 00`},
	{66, block.Node, 0, `
000  00 00 00 00 02 00 00 00  42 00 00 00 00 00 00 00
010  01 00 00 00 a8 00 00 00  10 00 00 00 00 00 00 00
560  3c 00 00 00 00 00 00 00  ba 3f 00 00 06 00 00 00`},
	{60, block.Bitmap, 0, `
000  00 00 00 00 00 00 00 00  3c 00 00 00 00 00 00 00
010  fb 09 00 00`},
	{64, block.Node, 0, `
000  00 00 00 00 02 00 00 00  40 00 00 00 00 00 00 00
010  03 00 00 00 50 01 00 00  04 00 00 00 00 00 00 00
020  00 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00
030  03 00 00 00 00 00 00 00
aa0  03 00 00 00 03 00 00 00  03 00 00 00`},
	{67, block.Index, 0, `
000  00 00 00 00 00 00 00 00  43 00 00 00 00 00 00 00
010  3d 00 00 00 00 00 00 00  b4 3f 00 00 01 00 00 00`},
	{61, block.Bitmap, 0, `
000  00 00 00 00 00 00 00 00  3d 00 00 00 00 00 00 00
010  22 00 00 00 00 00 00 00  00 00 08 00 00 02 00 aa
020  aa 00 00 00`},
	{2, block.Node, 0, `
000  00 00 00 00 02 00 00 00  02 00 00 00 00 00 00 00
010  00 00 00 00 50 01 00 00  04 00 00 00 00 00 00 00`},
}

// parseDump makes a block of offsets and bytes.
func parseDump(t testing.TB, text string) []byte {
	t.Helper()
	b := make([]byte, block.Size)
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Fields(line)
		off, err := strconv.ParseUint(f[0], 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		v, err := hex.DecodeString(strings.Join(f[1:], ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(b[off:], v)
	}
	return b
}

// goldenPool is the worked example as a device of 1024 blocks.
func goldenPool(t testing.TB) *dev.Mem {
	t.Helper()
	mem := dev.NewMem(1024 * block.Size)
	for _, g := range workedExample {
		b := parseDump(t, g.text)
		csum := binary.LittleEndian.Uint32(b)
		block.Seal(b, g.loc, g.kind)
		if got := binary.LittleEndian.Uint32(b); g.csum != 0 && (got != g.csum || csum != g.csum) {
			t.Fatalf("block %d: csum %#08x, want %#08x", g.loc, got, g.csum)
		}
		if _, err := mem.WriteAt(b, int64(g.loc)*block.Size); err != nil {
			t.Fatal(err)
		}
	}
	return mem
}

func goldenState() *testState {
	m := func(b DataBlock, t uint32) Mapping { return Mapping{b, t} }
	return &testState{time: 2, txID: 5, data: 25, devs: map[DevID]*testDev{
		0: {map[VBlock]Mapping{0: m(0, 0), 1: m(4, 1), 2: m(2, 0), 5: m(3, 0), 7: m(5, 2)}, Details{5, 0, 0, 2}},
		1: {map[VBlock]Mapping{0: m(0, 0), 1: m(1, 0), 2: m(2, 0), 5: m(3, 0)}, Details{4, 0, 1, 1}},
		2: {map[VBlock]Mapping{0: m(0, 0), 1: m(4, 1), 2: m(2, 0), 5: m(3, 0)}, Details{4, 0, 2, 2}},
	}}
}

// TestWorkedExample reads the pool that a kernel wrote, byte for byte, checks it, and goes on
// with it.
func TestWorkedExample(t *testing.T) {
	mem := goldenPool(t)
	r, err := Check(mem, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mustClean(t, r)
	if r.MetaUsed != 12 || r.DataUsed != 6 || r.Mappings != 13 || r.Devices != 3 {
		t.Errorf("%d metadata and %d data blocks, %d mappings of %d devices; want 12, 6, 13, 3", r.MetaUsed, r.DataUsed, r.Mappings, r.Devices)
	}
	tool(t, "thin_check", devFile(t, mem))
	p := &testPool{t: t, d: mem, mem: mem, committed: goldenState()}
	p.reopen()
	p.compare()
	sp := p.m.Space()
	if sp.MetaTotal != 1024 || sp.MetaUsed != 12 || sp.MetaReserve != 102 || sp.DataUsed != 6 || sp.DataTotal != 25 {
		t.Errorf("%+v", sp)
	}
	for b, want := range []uint32{3, 1, 3, 3, 2, 1, 0} {
		if got := p.m.data.Count(uint64(b)); got != want {
			t.Errorf("data block %d: count %d, want %d", b, got, want)
		}
	}
	p.snap(3, 0)
	p.delete(2)
	p.commit()
	p.compare()
	p.check()
	p.thinCheck()
}

// TestSuperblockWorkedExample: the fields, and that encoding them gives the bytes back.
func TestSuperblockWorkedExample(t *testing.T) {
	b := parseDump(t, workedExample[0].text)
	s := DecodeSuperblock(b)
	if err := s.Validate(false); err != nil {
		t.Fatal(err)
	}
	if s.Time != 2 || s.TransactionID != 5 || s.HeldRoot != 0 || s.MappingRoot != 62 || s.DetailsRoot != 65 ||
		s.DataBlockSize != 128 || s.MetaBlockSize != 8 || s.MetaBlocksThen != 1024 || s.Version != 2 ||
		s.DataMap.NrBlocks != 25 || s.DataMap.NrAllocated != 6 || s.DataMap.BitmapRoot != 66 || s.DataMap.Overflow != 64 ||
		s.MetaMap.NrBlocks != 1024 || s.MetaMap.NrAllocated != 12 || s.MetaMap.BitmapRoot != 67 || s.MetaMap.Overflow != 2 {
		t.Errorf("%+v", s)
	}
	out := make([]byte, block.Size)
	s.Encode(out)
	block.Seal(out, 0, block.Superblock)
	if !bytes.Equal(out, b) {
		t.Error("encoding the fields gives other bytes")
	}
}
