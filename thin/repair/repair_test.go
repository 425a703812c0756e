package repair

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/thin"
)

// TestWhole: of a pool without damage everything comes back, with everything that is shared: the
// new metadata is no larger than the old.
func TestWhole(t *testing.T) {
	p := newPool(t, 1, 2048, 40000)
	p.fill(20)
	r, out := repaired(t, p.mem, Options{})
	if !r.Complete || r.From != FromSuperblock || r.Superblock != "" || r.TransactionGuessed {
		t.Errorf("%s", text(t, r))
	}
	if got, want := dump(t, out), dump(t, p.mem); got != want {
		t.Error("the dump differs")
	}
	a, _ := thin.Check(p.mem, thin.CheckOptions{})
	b, _ := thin.Check(out, thin.CheckOptions{})
	if b.MetaUsed > a.MetaUsed {
		t.Errorf("%d metadata blocks used, were %d", b.MetaUsed, a.MetaUsed)
	}
}

// TestWrongSpaceMaps: whatever is in the space maps, the new ones are right.
func TestWrongSpaceMaps(t *testing.T) {
	p := newPool(t, 2, 1024, 40000)
	p.fill(3)
	want := dump(t, p.mem)
	sb := super(t, p.mem)
	for _, loc := range []block.Loc{sb.DataMap.BitmapRoot, sb.DataMap.Overflow, sb.MetaMap.BitmapRoot, sb.MetaMap.Overflow} {
		smash(t, p.mem, loc)
	}
	r, out := repaired(t, p.mem, Options{})
	if !r.Complete || dump(t, out) != want {
		t.Errorf("%s", text(t, r))
	}
}

// TestBrokenNode: of a device with a broken node exactly the range below it is lost; what does not
// share the node is whole.
func TestBrokenNode(t *testing.T) {
	p := newPool(t, 3, 2048, 40000)
	p.fill(10)
	root := rootOf(t, p.mem, 1)
	want := map[thin.DevID]map[thin.VBlock]thin.Mapping{}
	for _, id := range []thin.DevID{1, 10, 15, 19, 500} {
		want[id] = mappings(t, p.mem, id)
	}
	leaf, lost := childOf(t, p.mem, root, 4)
	smash(t, p.mem, leaf)
	r, out := repaired(t, p.mem, Options{})
	if r.Complete {
		t.Error("nothing is lost")
	}
	for id, maps := range want {
		d := device(t, r, id)
		inside := uint64(0)
		shares := false
		for vb := range maps {
			if lost.has(uint64(vb)) {
				inside++
			}
		}
		for _, l := range d.Lost {
			shares = true
			if l.Range != lost || !strings.Contains(l.Why, "checksum") {
				t.Errorf("thin %d lost %v (%s), want %v", id, l, l.Why, lost)
			}
		}
		got := mappings(t, out, id)
		for vb, m := range maps {
			if g, ok := got[vb]; ok != !(shares && lost.has(uint64(vb))) || ok && g != m {
				t.Errorf("thin %d block %d: %v %v, was %v", id, vb, g, ok, m)
			}
		}
		if id == 1 && (!shares || d.Kept != uint64(len(maps))-inside || *d.Mapped != uint64(len(maps))) || id == 500 && shares {
			t.Errorf("thin %d: %+v", id, d)
		}
	}
}

// TestBrokenLeafOfMany: a leaf that all devices share is broken: it is missing in each, and what
// they share otherwise stays shared.
func TestBrokenLeafOfMany(t *testing.T) {
	p := newPool(t, 4, 2048, 60000)
	p.fill(100)
	leaf, _ := childOf(t, p.mem, rootOf(t, p.mem, 1), 0)
	smash(t, p.mem, leaf)
	before, _ := thin.Check(p.mem, thin.CheckOptions{})
	r, out := repaired(t, p.mem, Options{})
	after, _ := thin.Check(out, thin.CheckOptions{})
	if damaged, _, _ := r.totals(); damaged < 50 {
		t.Errorf("%d devices are damaged", damaged)
	}
	if after.MetaUsed > before.MetaUsed {
		t.Errorf("%d metadata blocks, were %d", after.MetaUsed, before.MetaUsed)
	}
}

// TestBrokenRoot: the device is gone, and so are those that share its root; the others are whole.
func TestBrokenRoot(t *testing.T) {
	p := newPool(t, 5, 2048, 40000)
	p.fill(2)
	p.must(p.m.CreateSnap(77, 500))
	p.commit()
	smash(t, p.mem, rootOf(t, p.mem, 500))
	r, out := repaired(t, p.mem, Options{})
	for _, id := range []thin.DevID{77, 500} {
		if d := device(t, r, id); !d.Gone || *d.Mapped != 400 {
			t.Errorf("%+v", d)
		}
	}
	if d := device(t, r, 1); d.Gone || !d.whole() {
		t.Errorf("%+v", d)
	}
	if strings.Contains(dump(t, out), `dev_id="500"`) {
		t.Error("thin 500 is there")
	}
	if !strings.Contains(text(t, r), "thin 500: gone, with 400 mapped blocks\n  lost: all virtual blocks: metadata block ") {
		t.Errorf("%s", text(t, r))
	}
}

// TestBrokenDeviceTree: without the device tree every device is found again: by the entries that
// older versions of the tree have, and by its number of mappings.
func TestBrokenDeviceTree(t *testing.T) {
	p := newPool(t, 6, 2048, 40000)
	p.fill(6)
	p.write(500, 9000, 33, 1) // its root is named by nothing but the newest tree
	p.write(12, 20000, 44, 1)
	p.commit()
	want := dump(t, p.mem)
	smash(t, p.mem, super(t, p.mem).MappingRoot)
	r, out := repaired(t, p.mem, Options{})
	if got := dump(t, out); got != want || !r.Complete || len(r.Trees) != 1 {
		t.Errorf("%s", text(t, r))
	}
}

// TestBrokenDetails: without the details the devices and their mappings are there, and every block
// that may be shared is taken for shared.
func TestBrokenDetails(t *testing.T) {
	p := newPool(t, 7, 2048, 40000)
	p.fill(4)
	want := map[thin.DevID]map[thin.VBlock]thin.Mapping{}
	for _, id := range []thin.DevID{1, 10, 11, 12, 13, 500} {
		want[id] = mappings(t, p.mem, id)
	}
	det := readDetailsTree(newForest(p.mem).cache, super(t, p.mem).DetailsRoot).details
	smash(t, p.mem, super(t, p.mem).DetailsRoot)
	r, out := repaired(t, p.mem, Options{})
	if len(r.Devices) != 6 || !r.Complete {
		t.Errorf("%s", text(t, r))
	}
	v, err := thin.OpenView(out)
	p.must(err)
	for id, d := range det {
		got, err := v.Device(id)
		p.must(err)
		if got.CreationTime != d.CreationTime || got.TransactionID != d.TransactionID || got.SnapshottedTime < d.SnapshottedTime || got.MappedBlocks != d.MappedBlocks {
			t.Errorf("thin %d: %+v, were %+v", id, got.Details, d)
		}
	}
	oneWriter(t, out)
	for id, m := range want {
		if !maps.Equal(m, mappings(t, out, id)) {
			t.Errorf("thin %d differs", id)
		}
	}
}

// TestBrokenSuperblock: with a flipped bit its fields still lead to everything; zeroed, the newest
// state is found among those that commits have left behind.
func TestBrokenSuperblock(t *testing.T) {
	p := newPool(t, 8, 4096, 40000)
	p.fill(6)
	for i := range 20 { // commits that only times and places tell apart
		p.write(500, thin.VBlock(1000+50*i), 40, 1)
		p.commit()
	}
	want := dump(t, p.mem)
	flipped := p.mem.Clone()
	b := readBlock(t, flipped, 0)
	b[700] ^= 1
	writeBlock(t, flipped, 0, b)
	r, out := repaired(t, flipped, Options{DataBytes: 40000 * blockSize})
	if got := dump(t, out); got != want || r.From != FromDamaged || !strings.Contains(r.Superblock, "checksum") {
		t.Errorf("%s", text(t, r))
	}

	b = readBlock(t, flipped, 0)
	putU64(b, 320, 1) // the device tree's root is wrong
	writeBlock(t, flipped, 0, b)
	if r, out = repaired(t, flipped, Options{}); dump(t, out) != want || r.From != FromSearch {
		t.Errorf("%s", text(t, r))
	}

	zeroed := p.mem.Clone()
	writeBlock(t, zeroed, 0, make([]byte, block.Size))
	if _, err := Repair(zeroed, nil, Options{DataBytes: 40000 * blockSize}); err == nil || !strings.Contains(err.Error(), "--block-size") {
		t.Errorf("without a block size: %v", err)
	}
	if _, err := Repair(zeroed, nil, Options{DataBlockSize: blockSize}); err == nil || !strings.Contains(err.Error(), "--data-size") {
		t.Errorf("without a length: %v", err)
	}
	tx := p.m.TransactionID()
	r, out = repaired(t, zeroed, Options{DataBlockSize: blockSize, DataBytes: 40000 * blockSize, TransactionID: &tx})
	if got := dump(t, out); got != want || r.From != FromSearch || r.TransactionGuessed {
		t.Errorf("%s", text(t, r))
	}
}

// TestSearchByHeldCopy: the copy of the superblock in a metadata snapshot tells the block size.
func TestSearchByHeldCopy(t *testing.T) {
	p := newPool(t, 9, 2048, 40000)
	p.fill(3)
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.write(500, 5000, 10, 1)
	p.commit()
	want := dump(t, p.mem)
	if r, out := repaired(t, p.mem, Options{}); !r.SnapshotDropped || dump(t, out) != want {
		t.Errorf("%s", text(t, r))
	}
	writeBlock(t, p.mem, 0, make([]byte, block.Size))
	r, out := repaired(t, p.mem, Options{DataBytes: 40000 * blockSize})
	if got := dump(t, out); r.DataBlockSize != blockSize || strings.Replace(got, `transaction="3"`, "", 1) != strings.Replace(want, `transaction="3"`, "", 1) {
		t.Errorf("%s", text(t, r))
	}
}

// TestConflicts: a data block that two devices claim for their own.
func TestConflicts(t *testing.T) {
	for _, c := range []struct {
		name  string
		claim func(mine, other thin.Mapping) thin.Mapping // what the second device claims
		lost  int                                         // mappings that go
	}{
		{"of the same time: shared", func(_, other thin.Mapping) thin.Mapping { return other }, 0},
		{"older than the true owner's", func(mine, other thin.Mapping) thin.Mapping { return thin.Mapping{Block: other.Block} }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool(t, 10, 1024, 20000)
			p.must(p.m.CreateThin(1))
			p.write(1, 0, 100, 1)
			p.must(p.m.CreateSnap(2, 1))
			p.write(2, 0, 100, 1) // at time 1, its own
			p.must(p.m.CreateThin(3))
			p.write(3, 0, 100, 1)
			p.commit()
			other := mappings(t, p.mem, 2)[50]
			change(t, p.mem, rootOf(t, p.mem, 3), func(b []byte) {
				mine := thin.UnpackMapping(uint64(b[2048+8*20]))
				putU64(b, 2048+8*20, c.claim(mine, other).Pack())
			})
			r, out := repaired(t, p.mem, Options{})
			if r.Conflicts != 1 {
				t.Errorf("%d conflicts", r.Conflicts)
			}
			if d := device(t, r, 3); len(d.Lost) != c.lost || c.lost > 0 && d.Lost[0].Range != (Range{20, 21}) {
				t.Errorf("%+v", d)
			}
			if got := mappings(t, out, 2)[50]; got != other {
				t.Errorf("the owner has %v, had %v", got, other)
			}
			oneWriter(t, out)
		})
	}
}

// oneWriter finds data blocks that a device takes for its own although another maps them.
func oneWriter(t testing.TB, d dev.Device) {
	t.Helper()
	v, err := thin.OpenView(d)
	if err != nil {
		t.Fatal(err)
	}
	devs, err := v.Devices()
	if err != nil {
		t.Fatal(err)
	}
	users, own := map[thin.DataBlock]int{}, map[thin.DataBlock]thin.DevID{}
	for _, i := range devs {
		if err := v.Walk(i.ID, 0, func(e thin.Entry) bool {
			users[e.Block]++
			if e.Time >= i.SnapshottedTime {
				own[e.Block] = i.ID
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
	}
	for b, id := range own {
		if users[b] > 1 {
			t.Errorf("thin %d takes data block %d for its own, %d mappings name it", id, b, users[b])
		}
	}
}

// TestSharedNodeTakenForOwn: a leaf of two devices of which one takes its blocks for its own.
func TestSharedNodeTakenForOwn(t *testing.T) {
	p := newPool(t, 11, 1024, 20000)
	p.fill(2)
	change(t, p.mem, super(t, p.mem).DetailsRoot, func(b []byte) {
		clear(b[1040+20 : 1040+24]) // thin 1: last in a snapshot at time 0
		clear(b[1040+16 : 1040+20])
	})
	r, out := repaired(t, p.mem, Options{})
	if d := device(t, r, 1); len(d.Notes) != 1 || !r.Complete {
		t.Errorf("%s", text(t, r))
	}
	oneWriter(t, out)
}

// TestBeyondTheEnd: mappings to data blocks that do not exist go, one by one.
func TestBeyondTheEnd(t *testing.T) {
	p := newPool(t, 12, 1024, 20000)
	p.fill(1)
	change(t, p.mem, rootOf(t, p.mem, 500), func(b []byte) {})
	leaf, _ := childOf(t, p.mem, rootOf(t, p.mem, 500), 1)
	change(t, p.mem, leaf, func(b []byte) { putU64(b, 2048, 20000<<24) })
	r, out := repaired(t, p.mem, Options{})
	d := device(t, r, 500)
	if len(d.Lost) != 1 || d.Kept != 399 || !strings.Contains(d.Lost[0].Why, "mapped to data blocks beyond the 20000 that there are") {
		t.Errorf("%+v", d)
	}
	if n := len(mappings(t, out, 500)); n != 399 {
		t.Errorf("%d mappings", n)
	}
}

// TestNothingThere: what never was a pool is refused, and block 0 stays zeroed.
func TestNothingThere(t *testing.T) {
	out := dev.NewMem(1 << 20)
	if _, err := Repair(dev.NewMem(1<<20), out, Options{DataBlockSize: blockSize, DataBytes: 1 << 30}); err == nil || !strings.Contains(err.Error(), "nothing to repair") {
		t.Errorf("%v", err)
	}
	p := newPool(t, 13, 1024, 20000)
	p.fill(1)
	if _, err := Repair(p.mem, out, Options{}); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("%v", err)
	}
	if !slices.Equal(readBlock(t, out, 0), make([]byte, block.Size)) {
		t.Error("block 0 was written")
	}
}

// TestThinnedLeaves: mappings go everywhere in the trees, few or nearly all, so that leaves must be
// brought together. Exactly those stay whose data block exists.
func TestThinnedLeaves(t *testing.T) {
	p := newPool(t, 14, 2048, 40000)
	p.fill(8)
	was := map[thin.DevID]map[thin.VBlock]thin.Mapping{}
	for _, id := range []thin.DevID{1, 10, 14, 17, 500} {
		was[id] = mappings(t, p.mem, id)
	}
	for _, left := range []uint64{39900, 36000, 30000, 20000, 13000, 8000, 2000, 300, 20, 1} {
		r, out := repaired(t, p.mem, Options{DataBlocks: left})
		for id, m := range was {
			d := device(t, r, id)
			var got map[thin.VBlock]thin.Mapping
			if !d.Gone {
				got = mappings(t, out, id)
			}
			lost := uint64(0)
			for vb, e := range m {
				g, ok := got[vb]
				if ok != (uint64(e.Block) < left) || ok && g != e {
					t.Fatalf("%d data blocks: thin %d block %d is mapped to %v (%v), was %v", left, id, vb, g, ok, e)
				}
				if !ok {
					lost++
				}
			}
			ranges := uint64(0)
			for _, l := range d.Lost {
				ranges += l.End - l.Begin
			}
			if d.Kept != uint64(len(got)) || ranges != lost || d.Gone != (len(got) == 0) {
				t.Fatalf("%d data blocks: thin %d: %d kept, %d lost, want %d and %d", left, id, d.Kept, ranges, len(got), lost)
			}
		}
	}
}

// TestReportForms holds the texts that people and programs read.
func TestReportForms(t *testing.T) {
	n := uint64(100)
	r := &Report{Superblock: "metadata block 0: superblock checksum 0x1, want 0x2", From: FromSearch, MappingRoot: 5, DetailsRoot: 6,
		Candidates: []Candidate{{5, 6, 3, true}, {7, 8, 3, false}}, Trees: []string{"device tree: devices 7 to 9: metadata block 4: unreadable"},
		UnknownDevices: true, Conflicts: 2, SnapshotDropped: true, TransactionID: 9, TransactionGuessed: true, Time: 3, DataBlockSize: 65536, DataBlocks: 1000,
		Devices: []Device{
			{ID: 1, Mapped: &n, Kept: 90, Lost: []LostRange{{Range{10, 20}, "metadata block 9: b-tree node checksum 0x5, want 0x6"}, {Range{30, 31}, "x"}, {Range{40, 0}, "y"}}},
			{ID: 2, Mapped: &n, Gone: true, Lost: []LostRange{{Why: "its entry in the device tree cannot be read"}}},
			{ID: 3, Mapped: &n, Kept: 100},
			{ID: 4, Kept: 5, Lost: []LostRange{{Range{1, 2}, "z"}}, Notes: []string{"a note"}},
		}}
	want := `superblock: metadata block 0: superblock checksum 0x1, want 0x2
devices found by: search (device tree in metadata block 5, details in 6)
2 states are equally new as far as can be told; others can be chosen with --mapping-root and --details-root:
  device tree 5, details 6, 3 devices, chosen
  device tree 7, details 8, 3 devices
device tree: devices 7 to 9: metadata block 4: unreadable
thin 1: 90 of 100 mapped blocks kept
  lost: virtual blocks 10 to 19: metadata block 9: b-tree node checksum 0x5, want 0x6
  lost: virtual block 30: x
  lost: virtual blocks from 40 on: y
thin 2: gone, with 100 mapped blocks
  lost: all virtual blocks: its entry in the device tree cannot be read
thin 4: 5 of an unknown number of mapped blocks kept
  lost: virtual block 1: z
  a note
2 data blocks were claimed by several owners in contradiction: they stay with the newest claim, or are treated as shared
the metadata snapshot is dropped
there may have been other devices, of which nothing is known
transaction id 9 (the least that it can be), time 3, 1000 data blocks of 65536 bytes
4 devices: 1 whole, 2 damaged, 1 gone; 110 mapped blocks are lost
`
	if got := text(t, r); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	var js strings.Builder
	if err := r.WriteJSON(&js); err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{`"from": "search"`, `"begin": 10`, `"end": 20`, `"gone": true`, `"complete": false`, `"metadata_snapshot_dropped": true`, `"mapped_blocks": 100`} {
		if !strings.Contains(js.String(), w) {
			t.Errorf("JSON lacks %s:\n%s", w, js.String())
		}
	}
}

// TestManyDevices: the trees of devices have several leaves; a broken one of either costs what no
// other place tells, and the report names the range.
func TestManyDevices(t *testing.T) {
	p := newPool(t, 15, 2048, 40000)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 300, 1)
	for id := thin.DevID(2); id < 600; id++ {
		p.must(p.m.CreateSnap(id, 1))
		if id%50 == 0 {
			p.write(id, 1000, int(id)/10, 1)
			p.commit()
		}
	}
	p.commit()
	sb := super(t, p.mem)
	for _, c := range []struct {
		name string
		root block.Loc
		want string
	}{{"device tree", sb.MappingRoot, "device tree: devices "}, {"details tree", sb.DetailsRoot, "details tree: devices "}} {
		mem := p.mem.Clone()
		size := 8
		if c.name == "details tree" {
			size = thin.DetailsSize
		}
		n, err := readNode(newForest(mem).cache, c.root, size)
		p.must(err)
		if n.Leaf() {
			t.Fatalf("the %s has one leaf", c.name)
		}
		smash(t, mem, n.Child(1))
		r, out := repaired(t, mem, Options{})
		want := fmt.Sprintf("%s: devices %d to %d: metadata block %d: ", c.name, n.Key(1), n.Key(2)-1, n.Child(1))
		if n.Len() == 2 {
			want = fmt.Sprintf("%s: devices from %d on: metadata block %d: ", c.name, n.Key(1), n.Child(1))
		}
		if len(r.Trees) != 1 || !strings.HasPrefix(r.Trees[0], want) || r.UnknownDevices || len(r.Devices) != 599 {
			t.Errorf("%d devices, %q, want %q", len(r.Devices), r.Trees, want)
		}
		_, gone, _ := r.totals()
		t.Logf("%s: %d of %d devices gone", c.name, gone, len(r.Devices))
		if c.name == "details tree" && (gone > 0 || !r.Complete) {
			t.Errorf("%s", text(t, r))
		}
		oneWriter(t, out)

		// Both at once: of these devices nobody knows.
		o, err := readNode(newForest(mem).cache, sb.MappingRoot+sb.DetailsRoot-c.root, 8+thin.DetailsSize-size)
		p.must(err)
		i := 0
		for i+1 < o.Len() && o.Key(i+1) <= n.Key(1) {
			i++
		}
		smash(t, mem, o.Child(i))
		if r, _ := repaired(t, mem, Options{}); !r.UnknownDevices || r.Complete {
			t.Errorf("%s", text(t, r))
		}
	}
}

// TestBadSectors: blocks that the device cannot read are as good as broken ones.
func TestBadSectors(t *testing.T) {
	p := newPool(t, 16, 2048, 40000)
	p.fill(4)
	leaf, lost := childOf(t, p.mem, rootOf(t, p.mem, 1), 2)
	f := dev.NewFault(p.mem)
	f.Add(dev.Rule{Ops: dev.OpRead, Off: int64(leaf) * block.Size, Len: block.Size})
	f.Add(dev.Rule{Ops: dev.OpRead, Off: int64(super(t, p.mem).MappingRoot) * block.Size, Len: block.Size})
	out := dev.NewMem(p.mem.Size())
	r, err := Repair(f, out, Options{})
	p.must(err)
	sound(t, out)
	if d := device(t, r, 1); d.Gone || len(d.Lost) != 1 || d.Lost[0].Range != lost || !strings.Contains(d.Lost[0].Why, "injected") {
		// Its tree has a hole, so that it is not found by its number of mappings.
		if !d.Gone {
			t.Errorf("%+v", d)
		}
	}
	if d := device(t, r, 500); !d.whole() {
		t.Errorf("%+v", d)
	}
	f.Clear()
	f.Add(dev.Rule{Ops: dev.OpRead, Off: 0, Len: block.Size})
	if r, err := Repair(f, nil, Options{DataBlockSize: blockSize, DataBytes: 40000 * blockSize}); err != nil || r.From != FromSearch || !strings.Contains(r.Superblock, "cannot be read") {
		t.Errorf("%+v %v", r, err)
	}
	stop := errors.New("enough")
	if _, err := Repair(f, nil, Options{DataBlockSize: blockSize, DataBytes: 40000 * blockSize,
		Progress: func(string, uint64, uint64) error { return stop }}); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
}

// TestOutputFails: whatever cannot be written, no pool is there afterwards.
func TestOutputFails(t *testing.T) {
	p := newPool(t, 17, 1024, 20000)
	p.fill(2)
	leaf, _ := childOf(t, p.mem, rootOf(t, p.mem, 1), 2)
	smash(t, p.mem, leaf)
	for skip := 0; ; skip++ {
		mem := dev.NewMem(p.mem.Size())
		f := dev.NewFault(mem)
		f.Add(dev.Rule{Ops: dev.OpWrite | dev.OpFlush, Skip: skip, Times: 1})
		_, err := Repair(p.mem, f, Options{})
		if err == nil {
			if skip < 5 {
				t.Errorf("only %d writes", skip)
			}
			break
		}
		if _, err := thin.OpenView(mem); !errors.Is(err, thin.ErrNoPool) {
			t.Fatalf("write %d failed, and yet: %v", skip, err)
		}
	}
}
