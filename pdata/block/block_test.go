package block

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"

	"mica/dev"
)

// TestChecksumVectors holds the vectors of the format description, section 1.1.
func TestChecksumVectors(t *testing.T) {
	register := func(b []byte) uint32 { return ^crc32.Checksum(b, castagnoli) }
	if got := register([]byte("123456789")); got != 0x1CF96D7C {
		t.Errorf("register over 123456789: %#08x, want 0x1CF96D7C", got)
	}
	if got := register(make([]byte, 4092)); got != 0x58CDA791 {
		t.Errorf("register over 4092 zeros: %#08x, want 0x58CDA791", got)
	}
	leaf := func(size, most uint32) []byte {
		b := make([]byte, Size)
		binary.LittleEndian.PutUint32(b[4:], 2)
		binary.LittleEndian.PutUint32(b[20:], most)
		binary.LittleEndian.PutUint32(b[24:], size)
		return b
	}
	for _, c := range []struct {
		name string
		b    []byte
		loc  Loc
		kind Kind
		want uint32
	}{
		{"bitmap, all free, block 10", make([]byte, Size), 10, Bitmap, 0x58A67D79},
		{"empty leaf, values of 8, block 6", leaf(8, 252), 6, Node, 0xCB3DDA35},
		{"empty leaf, values of 24, block 7", leaf(24, 126), 7, Node, 0xB1C81346},
	} {
		Seal(c.b, c.loc, c.kind)
		if got := binary.LittleEndian.Uint32(c.b); got != c.want {
			t.Errorf("%s: csum %#08x, want %#08x", c.name, got, c.want)
		}
		if err := Verify(c.b, c.loc, c.kind); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if k, ok := Identify(c.b); !ok || k != c.kind {
			t.Errorf("%s: identified as %v %v", c.name, k, ok)
		}
	}
}

func TestVerifyFindsEveryFlippedBit(t *testing.T) {
	b := make([]byte, Size)
	for i := range b {
		b[i] = byte(i * 7)
	}
	Seal(b, 99, Bitmap)
	for _, i := range []int{0, 3, 4, 8, 15, 16, 4095} {
		for bit := range 8 {
			b[i] ^= 1 << bit
			if err := Verify(b, 99, Bitmap); !errors.Is(err, ErrCorrupt) {
				t.Errorf("bit %d of byte %d flipped: %v, want ErrCorrupt", bit, i, err)
			}
			b[i] ^= 1 << bit
		}
	}
	if err := Verify(b, 98, Bitmap); err == nil || !strings.Contains(err.Error(), "says it is block 99") {
		t.Errorf("misplaced block: %v", err)
	}
	if err := Verify(b, 99, Node); err == nil || !strings.Contains(err.Error(), "is a bitmap, want a b-tree node") {
		t.Errorf("block of another kind: %v", err)
	}
}

func sealed(loc Loc, k Kind, fill byte) []byte {
	b := make([]byte, Size)
	for i := 16; i < Size; i++ {
		b[i] = fill
	}
	Seal(b, loc, k)
	return b
}

func TestCacheBoundHoldAndKinds(t *testing.T) {
	const blocks = 1000
	mem := dev.NewMem(blocks * Size)
	for i := Loc(0); i < blocks; i++ {
		if _, err := mem.WriteAt(sealed(i, Node, byte(i)), int64(i)*Size); err != nil {
			t.Fatal(err)
		}
	}
	f := dev.NewFault(mem)
	c := NewCache(f, 256*Size)
	read := func(loc Loc, want byte) {
		t.Helper()
		b, err := c.Read(loc, Node)
		if err != nil {
			t.Fatal(err)
		}
		if b[100] != want {
			t.Fatalf("block %d holds %d, want %d", loc, b[100], want)
		}
	}
	for i := Loc(0); i < blocks; i++ {
		read(i, byte(i))
	}
	kept := 0
	for i := range c.shards {
		kept += len(c.shards[i].m)
	}
	if kept > 256 {
		t.Errorf("%d blocks kept, bound is 256", kept)
	}
	before := f.Counts().Reads
	for range 10 {
		read(999, 231)
	}
	if n := f.Counts().Reads - before; n != 0 {
		t.Errorf("%d reads of a block that is cached", n)
	}

	c.Hold(999, Node, sealed(999, Node, 5))
	read(999, 5)
	if _, err := c.Read(999, Bitmap); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read as another kind: %v, want ErrCorrupt", err)
	}
	c.Drop(999)
	read(999, 5)
	if _, err := c.Read(blocks, Node); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read beyond the device: %v, want ErrCorrupt", err)
	}
	f.Add(dev.Rule{Ops: dev.OpRead})
	if _, err := c.Read(1, Node); !errors.Is(err, dev.ErrInjected) || errors.Is(err, ErrCorrupt) {
		t.Errorf("unreadable block: %v, want the device's error", err)
	}
}
