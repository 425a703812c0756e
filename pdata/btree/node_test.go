package btree

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"mica/pdata/block"
)

func TestCapacities(t *testing.T) {
	for _, c := range []struct{ size, max, valuesAt, valuesEnd int }{
		{4, 336, 2720, 4064}, {8, 252, 2048, 4064}, {16, 168, 1376, 4064}, {24, 126, 1040, 4064},
	} {
		m := MaxEntries(c.size)
		at := headerSize + 8*m
		if m != c.max || at != c.valuesAt || at+m*c.size != c.valuesEnd {
			t.Errorf("values of %d bytes: %d entries, values from %d to %d; want %d, %d to %d", c.size, m, at, at+m*c.size, c.max, c.valuesAt, c.valuesEnd)
		}
	}
}

// TestNodeWorkedExample builds two nodes of the format description's worked example.
func TestNodeWorkedExample(t *testing.T) {
	for _, c := range []struct {
		name   string
		loc    block.Loc
		size   int
		keys   []uint64
		values []string
		at     int    // where the values are
		want   string // bytes 0 to 47
		csum   uint32
	}{
		{"mapping top level", 62, 8, []uint64{0, 1, 2},
			[]string{"3f00000000000000", "2900000000000000", "3400000000000000"}, 0x800,
			"cbf00dac020000003e0000000000000003000000fc0000000800000000000000" + "00000000000000000100000000000000", 0xac0df0cb},
		{"mapping tree of device 0", 63, 8, []uint64{0, 1, 2, 5, 7},
			[]string{"0000000000000000", "0100000400000000", "0000000200000000", "0000000300000000", "0200000500000000"}, 0x800,
			"14feed3d020000003f0000000000000005000000fc0000000800000000000000" + "00000000000000000100000000000000", 0x3dedfe14},
		{"details", 65, 24, []uint64{0, 1, 2},
			[]string{
				"050000000000000000000000000000000000000002000000",
				"040000000000000000000000000000000100000001000000",
				"040000000000000000000000000000000200000002000000"}, 0x410,
			"b929b7c1020000004100000000000000030000007e0000001800000000000000" + "00000000000000000100000000000000", 0xc1b729b9},
	} {
		buf := make([]byte, block.Size)
		n := newNode(buf, true, c.size)
		// In an order that makes insert move things.
		for i := len(c.keys) - 1; i >= 0; i-- {
			v, err := hex.DecodeString(c.values[i])
			if err != nil {
				t.Fatal(err)
			}
			n.insert(0, c.keys[i], v)
		}
		block.Seal(buf, c.loc, block.Node)
		if got := hex.EncodeToString(buf[:48]); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
		if got := binary.LittleEndian.Uint32(buf); got != c.csum {
			t.Errorf("%s: csum %#08x, want %#08x", c.name, got, c.csum)
		}
		values := strings.Join(c.values, "")
		if got := hex.EncodeToString(buf[c.at : c.at+len(values)/2]); got != values {
			t.Errorf("%s: values\n got %s\nwant %s", c.name, got, values)
		}
	}
}

func TestCheckNodeRefusesBadHeaders(t *testing.T) {
	for _, c := range []struct {
		name string
		off  int
		val  uint32
		want string
	}{
		{"no kind", 4, 0, "node flags 0x0"},
		{"both kinds", 4, 3, "node flags 0x3"},
		{"other value size", 24, 16, "values of 16 bytes, want 8"},
		{"value size that overflows", 24, 1 << 31, "values of 2147483648 bytes"},
		{"no places", 20, 0, "node for 0 entries"},
		{"too many places", 20, 255, "node for 255 entries"},
		{"places that overflow", 20, 1 << 31, "node for 2147483648 entries"},
		{"more entries than places", 16, 253, "253 entries, more than its 252 places"},
		{"entries that overflow", 16, 1 << 31, "2147483648 entries"},
	} {
		buf := make([]byte, block.Size)
		newNode(buf, true, 8)
		binary.LittleEndian.PutUint32(buf[c.off:], c.val)
		_, err := ParseNode(buf, 7, 8)
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	buf := make([]byte, block.Size)
	newNode(buf, false, 8)
	if _, err := ParseNode(buf, 7, 8); err == nil {
		t.Error("an internal node without entries is accepted")
	}
}

// FuzzNode: whatever a node holds, reading a tree through it ends, with an error or without.
func FuzzNode(f *testing.F) {
	leaf := newNode(make([]byte, block.Size), true, 8)
	leaf.insert(0, 5, make([]byte, 8))
	inner := newNode(make([]byte, block.Size), false, 8)
	for i := range 84 {
		inner.insert(i, uint64(i), []byte{byte(i % 3), 0, 0, 0, 0, 0, 0, 0})
	}
	f.Add([]byte(leaf), []byte(inner))
	f.Add([]byte(inner), []byte(leaf))
	f.Add([]byte(inner), []byte(inner))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		r := Reader{Blocks: twoBlocks{pad(a), pad(b)}, ValueSize: 8}
		n := 0
		r.Walk(0, 0, func(uint64, []byte) bool { n++; return true })
		if n > 2*252*252 {
			t.Errorf("%d entries from two nodes", n)
		}
		r.Lookup(0, 5)
		r.Last(0)
		r.count(0, 0, bounds{})
		r.Merge(0, 1, false, func(uint64, []byte, []byte) error { return nil })
	})
}

func pad(b []byte) []byte {
	p := make([]byte, block.Size)
	copy(p, b)
	return p
}

// twoBlocks are all the blocks there are, again and again.
type twoBlocks [2][]byte

func (b twoBlocks) Read(loc block.Loc, k block.Kind) ([]byte, error) { return b[loc%2], nil }
