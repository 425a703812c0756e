package journal

import (
	"encoding/binary"
	"encoding/hex"
	"testing"

	"mica/thin"
)

// TestSlotWorkedExample: device 7, virtual blocks 1000..1002 to data blocks 40000.., the sixth
// slot of generation 9.
func TestSlotWorkedExample(t *testing.T) {
	b := make([]byte, slotBytes)
	e := Entry{ID: 7, VBlock: 1000, Len: 3, Block: 40000}
	putSlot(b, 9, 5, e)
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("SKIPPED: the example is that of a little-endian machine")
	}
	want := "9f4bdc7509000080" + // CRC, generation 9 with bit 31
		"e803000000070000" + // virtual block 0x3e8, device 7 above bit 40
		"409c000000000300" + // data block 0x9c40, 3 above bit 48
		"0500000000000001" // slot 5, set
	if got := hex.EncodeToString(b); got[8:] != want[8:] {
		t.Errorf("slot %s, want %s", got, want)
	}
	if got, ok := readSlot(b, 9, 5); !ok || got != e {
		t.Errorf("read back: %+v %v", got, ok)
	}
	for _, c := range []struct {
		what      string
		number, i uint64
	}{{"another generation", 8, 5}, {"a generation 2^31 later", 9 + 1<<31, 5}, {"another slot", 9, 6}} {
		if _, ok := readSlot(b, c.number, c.i); ok {
			t.Errorf("the slot is valid as one of %s", c.what)
		}
	}
	for bit := range slotBytes * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if got, ok := readSlot(b, 9, 5); ok {
			t.Errorf("with bit %d flipped it reads %+v", bit, got)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
}

func TestSlotLimits(t *testing.T) {
	b := make([]byte, slotBytes)
	for _, e := range []Entry{
		{ID: thin.MaxDevID, VBlock: 1<<40 - 1, Len: 1, Block: 1<<48 - 1},
		{ID: 0, VBlock: 0, Len: GroupBlocks, Block: 0},
		{ID: 1, VBlock: 511, Len: 1, Removed: true},
	} {
		if !e.valid() {
			t.Errorf("%+v is not valid", e)
		}
		putSlot(b, 1, 0, e)
		if got, ok := readSlot(b, 1, 0); !ok || got != e {
			t.Errorf("%+v reads as %+v, %v", e, got, ok)
		}
	}
	for _, e := range []Entry{
		{ID: thin.MaxDevID + 1, Len: 1}, {VBlock: 1 << 40, Len: 1}, {Block: 1 << 48, Len: 1}, {Len: 0},
		{VBlock: 511, Len: 2}, {Len: GroupBlocks + 1}, {VBlock: 1, Len: 1<<64 - 1},
	} {
		if e.valid() {
			t.Errorf("%+v is valid", e)
		}
	}
}

func TestRecord(t *testing.T) {
	b := make([]byte, recordBytes)
	for n := range uint64(50) {
		putRecord(b, markToCome, n, state(n*977))
		number, s, ok := readRecord(b, markToCome)
		if !ok || number != n || s != state(n*977) {
			t.Fatalf("record %d reads %d, %v, %v", n, number, s, ok)
		}
		if _, _, ok := readRecord(b, markFollows); ok {
			t.Fatal("a record of one kind is valid as one of another")
		}
	}
	for bit := range recordBytes * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		if _, _, ok := readRecord(b, markToCome); ok {
			t.Errorf("a record with bit %d flipped is valid", bit)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	if _, _, ok := readRecord(make([]byte, recordBytes), markToCome); ok {
		t.Error("zeros are a record")
	}
}

// TestStateTellsSuperblocksApart: each field that a commit can change counts.
func TestStateTellsSuperblocksApart(t *testing.T) {
	base := thin.Superblock{}
	change := []func(*thin.Superblock){
		func(s *thin.Superblock) { s.Time++ }, func(s *thin.Superblock) { s.TransactionID++ },
		func(s *thin.Superblock) { s.HeldRoot++ }, func(s *thin.Superblock) { s.DataMap.NrBlocks++ },
		func(s *thin.Superblock) { s.DataMap.NrAllocated++ }, func(s *thin.Superblock) { s.DataMap.BitmapRoot++ },
		func(s *thin.Superblock) { s.DataMap.Overflow++ }, func(s *thin.Superblock) { s.MetaMap.NrBlocks++ },
		func(s *thin.Superblock) { s.MetaMap.NrAllocated++ }, func(s *thin.Superblock) { s.MetaMap.BitmapRoot++ },
		func(s *thin.Superblock) { s.MetaMap.Overflow++ }, func(s *thin.Superblock) { s.MappingRoot++ },
		func(s *thin.Superblock) { s.DetailsRoot++ },
	}
	if len(change) != stateWords {
		t.Fatalf("%d fields are tried, a state has %d words", len(change), stateWords)
	}
	for i, c := range change {
		s := base
		c(&s)
		if StateOf(s) == StateOf(base) {
			t.Errorf("change %d makes no other state", i)
		}
		if got := stateFrom(StateOf(s).words()); got != StateOf(s) {
			t.Errorf("change %d: %v reads back as %v", i, StateOf(s), got)
		}
	}
	// The needs_check mark is set in place and is not a commit.
	s := base
	s.Flags = 1
	if StateOf(s) != StateOf(base) {
		t.Error("the needs_check mark makes another state")
	}
}
