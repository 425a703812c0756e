package trial

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestOpsText(t *testing.T) {
	s := Setup{BlockSize: 64 << 10, DataBlocks: 10, MaxDataBlocks: 20, MetaBlocks: 100, MaxMetaBlocks: 200, Workers: 3, Private: 3, Shared: 2, Sectors: 600}
	l := Generate(rand.New(rand.NewPCG(1, 1)), s, 2000)
	got, err := ParseOps(strings.NewReader("# a comment\n\n" + l.String()))
	if err != nil || !reflect.DeepEqual(got, l) {
		t.Fatalf("%d operations read of %d: %v", len(got), len(l), err)
	}
	seen := map[Kind]bool{}
	for _, o := range l {
		seen[o.Kind] = true
		if o.N > 0 && o.Kind != GrowData && o.Kind != GrowMeta && o.Off+o.N > s.Sectors {
			t.Errorf("%v reaches beyond %d sectors", o, s.Sectors)
		}
	}
	if len(seen) != int(kinds) {
		t.Errorf("%d of %d kinds of operations were made", len(seen), kinds)
	}
	for _, bad := range []string{"0 nothing slot=1 other=0 third=0 off=0 n=0", "write", "0 write slot=x other=0 third=0 off=0 n=0"} {
		if _, err := ParseOps(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// TestShrink: a list that fails because of three operations is made as long as three.
func TestShrink(t *testing.T) {
	var l Ops
	for i := range 200 {
		l = append(l, Op{Slot: i})
	}
	has := func(l Ops, slot int) bool { return slices.ContainsFunc(l, func(o Op) bool { return o.Slot == slot }) }
	got := Shrink(l, 1000, func(l Ops) bool { return has(l, 3) && has(l, 77) && has(l, 198) })
	if len(got) != 3 {
		t.Errorf("%d operations are left:\n%s", len(got), got)
	}
	calls := 0
	Shrink(l, 20, func(Ops) bool { calls++; return true })
	if calls > 20 {
		t.Errorf("%d attempts, want at most 20", calls)
	}
}

// TestHistory: which stamps a sector may hold after a cut.
func TestHistory(t *testing.T) {
	d := &Device{sectors: make([][]version, 1), base: []uint64{7}, flushes: []span{{begin: 30, end: 40}, {begin: 90, end: 0}}}
	d.sectors[0] = []version{{stamp: 1, begin: 10, end: 11}, {stamp: 2, begin: 20, end: 21}, {stamp: 3, begin: 50, end: 51}, {stamp: 4, begin: 60}}
	for _, c := range []struct {
		cut  int
		want []uint64
	}{
		{5, []uint64{7}},
		{15, []uint64{7, 1}},
		{39, []uint64{7, 1, 2}},
		{40, []uint64{2}},
		{55, []uint64{2, 3}},
		{100, []uint64{2, 3, 4}},
	} {
		var got []uint64
		for _, stamp := range []uint64{7, 1, 2, 3, 4, 5} {
			if d.may(0, stamp, d.durableBefore(c.cut), c.cut) {
				got = append(got, stamp)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("cut at %d: may hold %v, want %v", c.cut, got, c.want)
		}
	}
	b := make([]byte, SectorBytes)
	fillStamp(b, 5)
	if stamp, whole := readStamp(b); stamp != 5 || !whole {
		t.Errorf("stamp %d, whole %v", stamp, whole)
	}
	b[300]++
	if _, whole := readStamp(b); whole {
		t.Error("a torn sector is taken for a whole one")
	}
}
