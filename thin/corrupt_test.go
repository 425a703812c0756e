package thin

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

var pokeEvery = flag.Int("poke.every", 4, "open and use the pool after every so many of the changed fields")

// patch changes bytes of a block and seals it again, so that only the meaning is wrong.
func patch(t testing.TB, mem *dev.Mem, loc block.Loc, k block.Kind, fn func(b []byte)) {
	t.Helper()
	b := make([]byte, block.Size)
	if _, err := mem.ReadAt(b, int64(loc)*block.Size); err != nil {
		t.Fatal(err)
	}
	nr := binary.LittleEndian.Uint64(b[8:])
	fn(b)
	if binary.LittleEndian.Uint64(b[8:]) == nr {
		block.Seal(b, loc, k)
	} else {
		binary.LittleEndian.PutUint32(b, block.Checksum(b, k))
	}
	if _, err := mem.WriteAt(b, int64(loc)*block.Size); err != nil {
		t.Fatal(err)
	}
}

func le32(off int, v uint32) func([]byte) {
	return func(b []byte) { binary.LittleEndian.PutUint32(b[off:], v) }
}
func le64(off int, v uint64) func([]byte) {
	return func(b []byte) { binary.LittleEndian.PutUint64(b[off:], v) }
}

// TestCheckFinds damages the worked example in one place each.
func TestCheckFinds(t *testing.T) {
	const (
		super   = block.Superblock
		node    = block.Node
		bitmap  = block.Bitmap
		idx     = block.Index
		keys    = 32
		vals    = 2048
		details = 1040
	)
	for _, c := range []struct {
		name string
		loc  block.Loc
		kind block.Kind
		fn   func([]byte)
		sev  Severity
		want string
	}{
		{"superblock blocknr", 0, super, le64(8, 1), Fatal, "superblock says it is block 1"},
		{"magic", 0, super, le64(32, 1), Fatal, "magic 1, want 27022010"},
		{"version", 0, super, le32(40, 1), Warning, "version 1, want 2"},
		{"unknown flag", 0, super, le32(4, 2), Warning, "flags 0x2"},
		{"time over 24 bits", 0, super, le32(44, 1<<24), Fatal, "time 16777216 does not fit"},
		{"time behind", 0, super, le32(44, 1), Fatal, "mapped at time 2, the pool's is 1"},
		{"time behind a snapshot", 0, super, le32(44, 1), Fatal, "thin 2: created at time 2, last in a snapshot at time 2, the pool's time is 1"},
		{"block size", 0, super, le32(336, 100), Fatal, "data block size 51200 bytes"},
		{"metadata block size", 0, super, le32(340, 16), Fatal, "metadata block size 16 sectors"},
		{"formatted larger", 0, super, le64(344, 1025), Warning, "was formatted with 1025"},
		{"compat flag", 0, super, le32(352, 1), Warning, "features"},
		{"read-only compat flag", 0, super, le32(356, 1), Fatal, "features"},
		{"incompat flag", 0, super, le32(360, 1), Fatal, "features"},
		{"tail", 0, super, le32(4092, 1), Warning, "bytes after the fields"},
		{"data root slot", 0, super, le32(96, 1), Warning, "bytes after the data space map root"},
		{"metadata root slot", 0, super, le32(316, 1), Warning, "bytes after the metadata space map root"},
		{"metadata larger than the device", 0, super, le64(192, 1025), Fatal, "counts 1025 metadata blocks, the device has 1024"},
		{"data nr_allocated", 0, super, le64(72, 7), Warning, "data space map: nr_allocated 7, want 6"},
		{"metadata nr_allocated", 0, super, le64(200, 11), Warning, "metadata space map: nr_allocated 11, want 12"},
		{"data smaller", 0, super, le64(64, 5), Fatal, "mapped to data block 5 of 5"},
		{"data larger than its bitmaps", 0, super, le64(64, 16321), Fatal, "1 bitmaps, want 2 for 16321 blocks"},
		{"device tree beyond the end", 0, super, le64(320, 2000), Fatal, "used as node of the device tree, there are 1024 blocks"},
		{"details root is a bitmap", 0, super, le64(328, 60), Fatal, "is a bitmap, want a b-tree node"},
		{"details root is the superblock", 0, super, le64(328, 0), Fatal, "used as superblock and as node of the details tree"},
		{"held root is a node", 0, super, le64(56, 63), Fatal, "used as node of a mapping tree and as metadata snapshot"},
		{"held root is free", 0, super, le64(56, 500), Fatal, "superblock checksum"},

		{"node checksum", 63, node, func(b []byte) { b[5] = 1; b[8] = 62 }, Fatal, "says it is block 62"},
		{"node kind", 63, node, le32(4, 0), Fatal, "node flags 0x0"},
		{"node of both kinds", 63, node, le32(4, 3), Fatal, "node flags 0x3"},
		{"leaf as internal", 63, node, le32(4, 1), Fatal, "thin 0"},
		{"too many entries", 63, node, le32(16, 253), Fatal, "253 entries, more than the 252 places"},
		{"max_entries too large", 63, node, le32(20, 255), Fatal, "max_entries 255, want 252"},
		{"max_entries no multiple of 3", 63, node, le32(20, 251), Fatal, "max_entries 251, want 252"},
		{"value size", 63, node, le32(24, 16), Fatal, "values of 16 bytes, want 8"},
		{"keys twice", 63, node, le64(keys+8, 0), Fatal, "key 0 at 1 is not above key 0"},
		{"one entry less", 63, node, le32(16, 4), Fatal, "says 5 mapped blocks, the mapping tree has 4"},
		{"data block beyond the end", 63, node, le64(vals, 25<<24), Fatal, "of thin 0: virtual block 0: mapped to data block 25 of 25"},
		{"mapping of the future", 63, node, le64(vals, 3), Fatal, "virtual block 0: mapped at time 3"},
		{"data block mapped once more", 63, node, le64(vals, 5<<24), Fatal, "data block 5: count 1, 2 references"},
		{"data block mapped once less", 63, node, le64(vals, 6<<24), Leak, "data block 0: count 3, 2 references"},
		{"free data block mapped", 63, node, le64(vals, 6<<24), Fatal, "data block 6: count 0, 1 references"},
		{"own block that is shared", 63, node, le64(vals+8, 4<<24|2), Fatal, "data block 4: mapped more than once, but a device's times"},
		{"unknown device id", 62, node, le64(keys+16, 9), Fatal, "thin 9: the device has a mapping tree but no details"},
		{"device without a tree", 62, node, le64(keys+16, 9), Fatal, "thin 2: the device has details but no mapping tree"},
		{"device id over 24 bits", 62, node, le64(keys+16, 1<<24), Fatal, "device 16777216: device id does not fit 24 bits"},
		{"two devices, one tree", 62, node, le64(vals+8, 63), Fatal, "is shared, but holds a mapping of time 2"},
		{"mapping tree is a details node", 62, node, le64(vals, 65), Fatal, "used as node of the details tree and as node of a mapping tree"},
		{"mapped blocks", 65, node, le64(details, 6), Fatal, "says 6 mapped blocks, the mapping tree has 5"},
		{"snapshot of the future", 65, node, le32(details+20, 3), Fatal, "last in a snapshot at time 3"},
		{"created after its snapshot", 65, node, le32(details+16, 3), Fatal, "created at time 3"},
		{"snapshot time too early", 65, node, le64(details+24+16, 0), Fatal, "data block 0: mapped more than once"},

		{"count too low", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 4, 1) }, Fatal, "data block 4: count 1, 2 references"},
		{"count too high", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 5, 2) }, Leak, "data block 5: count 2, 1 references"},
		{"leaked blocks", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 10, 1); spacemap.SetBitmapEntry(b, 11, 1) }, Leak, "data block [10, 12): count 1, 0 references"},
		{"no overflow entry", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 5, 3) }, Fatal, "data block 5: the bitmap says 3 or more, there is no overflow entry"},
		{"overflow entry too many", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 0, 2) }, Fatal, "data block 0: count 3, the bitmap says 2"},
		{"bits beyond the last block", 60, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 25, 1) }, Warning, "entry 25 is not zero, the last block is entry 24"},
		{"bitmap header", 60, bitmap, le32(4, 1), Warning, "bytes 4 to 7"},
		{"overflow count too small", 64, node, le32(2720, 2), Fatal, "count 2, an overflow count is at least 3"},
		{"overflow count wrong", 64, node, le32(2720, 4), Leak, "data block 0: count 4, 3 references"},
		{"overflow entry beyond the end", 64, node, le64(keys+16, 25), Fatal, "data block 25: count of a block that does not exist"},
		{"nr_free", 66, node, le32(1376+8, 16313), Warning, "nr_free 16313, want 16314"},
		{"none_free_before", 66, node, le32(1376+12, 7), Warning, "none_free_before 7, but entry 6 is free"},
		{"bitmap place", 66, node, le64(1376, 61), Fatal, "used as data bitmap and as metadata bitmap"},
		{"bitmap number", 66, node, le64(keys, 1), Fatal, "follows bitmap -1"},

		{"index header", 67, idx, le32(4, 1), Warning, "bytes 4 to 7"},
		{"bitmap of nothing", 67, idx, le64(16, 0), Fatal, "bitmap 0 has no block"},
		{"index entry too many", 67, idx, le64(32, 5), Fatal, "bitmap 1 of 1 has an index entry"},
		{"metadata block not counted", 61, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 63, 0) }, Fatal, "metadata block 63: count 0, 1 references"},
		{"metadata block leaked", 61, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 100, 1) }, Leak, "metadata block 100: count 1, 0 references"},
		{"metadata overflow missing", 61, bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 63, 3) }, Fatal, "metadata block 63: the bitmap says 3 or more"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := goldenPool(t)
			patch(t, mem, c.loc, c.kind, c.fn)
			r, err := Check(mem, CheckOptions{})
			if err != nil {
				t.Fatal(err)
			}
			found := false
			var all []string
			for i := range r.Findings {
				f := &r.Findings[i]
				all = append(all, fmt.Sprintf("%s: %v", f.Severity, f))
				found = found || f.Severity == c.sev && strings.Contains(f.String(), c.want)
			}
			if !found {
				t.Errorf("want %s %q, found\n%s", c.sev, c.want, strings.Join(all, "\n"))
			}
			if r.Clean() != (c.sev == Warning) {
				t.Errorf("clean %v with a %s finding", r.Clean(), c.sev)
			}
			poke(t, mem)
		})
	}
}

// poke opens a damaged pool and does everything to it. It may fail; it must not panic.
func poke(t testing.TB, mem *dev.Mem) {
	t.Helper()
	mem = mem.Clone()
	Dump(mem, new(strings.Builder), DumpOptions{})
	Dump(mem, new(strings.Builder), DumpOptions{MetadataSnap: true})
	if v, err := OpenView(mem); err == nil {
		v.Ls()
		v.Delta(0, 1, func(DeltaRange) error { return nil })
		v.Changes(0, 1, func(DeltaRange) error { return nil })
		v.WriteImage(io.Discard, 0)
		v.WriteRmap(io.Discard, []DataRun{{0, 20}}, RmapOptions{})
		v.EachMapping(func(DevID, Entry) bool { return true })
	}
	m, err := Open(mem, OpenOptions{CacheBytes: 1 << 20})
	if err != nil {
		return
	}
	devs, _ := m.Devices()
	for _, d := range devs {
		m.LookupRange(d.ID, 0, 1<<63, func(Entry) bool { return true })
		m.HighestMapped(d.ID)
		if r, ok := m.AllocData(0, 3); ok {
			m.Insert(d.ID, []Entry{{VBlock: 3, Mapping: Mapping{r.Begin, m.Time()}}})
		}
		m.Remove(d.ID, 4, 100, 0)
	}
	m.Commit(nil)
	m.CreateThin(100)
	m.CreateSnap(101, 0)
	m.ReleaseMetadataSnap()
	m.ReserveMetadataSnap()
	m.Commit(nil)
	for _, d := range devs {
		for range 100 {
			if done, err := m.DeleteStep(d.ID); done || err != nil {
				break
			}
		}
	}
	m.Commit(nil)
	m.GrowData(40000)
	m.Commit(nil)
}

// legalFields may be changed to some other values that are legal too, so that nothing need be
// found. What is not legal in them is in TestCheckFinds.
var legalFields = map[string]bool{
	"superblock.uuid": true, "superblock.trans_id": true, "superblock.time": true, "superblock.flags": true,
	"superblock.metadata_nr_blocks": true, "superblock.data_nr": true,
	"held.uuid": true, "held.trans_id": true, "held.time": true, "held.flags": true, "held.metadata_nr_blocks": true,
	"node.padding": true, "node.unused": true,
	"details.transaction_id": true, "details.creation_time": true, "details.snapshotted_time": true,
	"mapping.key": true, "mapping.time": true, "internal.key": true,
	"index.none_free_before": true, "index.nr_free": true,
}

// TestFlipEveryField changes every field of every block of a pool: Check finds it, and whatever
// is opened does not panic.
func TestFlipEveryField(t *testing.T) {
	p := newTestPool(t, 5, 512, 20000)
	p.create(0)
	p.insert(0, 0, 600, 3)
	p.snap(1, 0)
	p.insert(1, 300, 40, 1)
	p.snap(2, 1)
	p.insert(2, 300, 100, 1)
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.insert(0, 500, 10, 1)
	p.delete(2)
	p.snap(3, 0)
	p.insert(0, 500, 10, 1)
	p.commit()
	c := newChecker(p.mem, readBlock(t, p.mem, 0), CheckOptions{})
	p.must(c.run())
	mustClean(t, c.rep)

	kinds, flips, quiet := map[string]int{}, 0, map[string]int{}
	for loc, u := range c.use {
		if u == useNone {
			continue
		}
		b := readBlock(t, p.mem, block.Loc(loc))
		for _, f := range fieldsOf(u, b) {
			for _, v := range f.values(b) {
				mem := p.mem.Clone()
				patch(t, mem, block.Loc(loc), u.kind(), func(b []byte) { copy(b[f.off:], v) })
				r, err := Check(mem, CheckOptions{})
				if err != nil {
					t.Fatal(err)
				}
				flips++
				kinds[f.name]++
				if len(r.Findings) == 0 {
					quiet[f.name]++
					if !legalFields[f.name] {
						t.Errorf("metadata block %d, %v: %s at byte %d set to % x: not found", loc, u, f.name, f.off, v)
					}
				}
				if flips%*pokeEvery == 0 {
					poke(t, mem)
				}
			}
		}
		// Without sealing: the checksum.
		mem := p.mem.Clone()
		b[1000] ^= 4
		if _, err := mem.WriteAt(b, int64(loc)*block.Size); err != nil {
			t.Fatal(err)
		}
		if r, err := Check(mem, CheckOptions{}); err != nil || r.Clean() {
			t.Errorf("metadata block %d, %v: wrong checksum not found (%v)", loc, u, err)
		}
		poke(t, mem)
	}
	t.Logf("%d changes of %d kinds of fields, nothing to find in %v", flips, len(kinds), quiet)
	for _, want := range []string{"superblock.magic", "held.magic", "internal.value", "mapping.block", "top.value", "details.mapped", "overflow.count", "bitmap.entry", "index.blocknr", "metaindex.blocknr"} {
		if kinds[want] == 0 {
			t.Errorf("no field %s in this pool", want)
		}
	}
}

func readBlock(t testing.TB, d dev.Device, loc block.Loc) []byte {
	t.Helper()
	b := make([]byte, block.Size)
	if _, err := d.ReadAt(b, int64(loc)*block.Size); err != nil {
		t.Fatal(err)
	}
	return b
}

func (u use) kind() block.Kind {
	switch u {
	case useSuper, useHeld:
		return block.Superblock
	case useMetaIndex:
		return block.Index
	case useMetaBitmap, useDataBitmap:
		return block.Bitmap
	}
	return block.Node
}

// A field is a place in a block.
type field struct {
	name      string
	off, size int
}

// values are what the field is set to: one bit changed, one more, all zeros, all ones.
func (f field) values(b []byte) [][]byte {
	old := b[f.off : f.off+f.size]
	change := func(fn func(v []byte)) []byte { v := append([]byte(nil), old...); fn(v); return v }
	all := [][]byte{
		change(func(v []byte) { v[0] ^= 1 }),
		change(func(v []byte) { v[0] ^= 2 }),
		change(func(v []byte) { v[len(v)-1] ^= 0x80 }),
		change(func(v []byte) {
			for i := range v {
				if v[i]++; v[i] != 0 {
					break
				}
			}
		}),
		change(func(v []byte) { clear(v) }),
		change(func(v []byte) {
			for i := range v {
				v[i] = 0xff
			}
		}),
	}
	var out [][]byte
	for _, v := range all {
		if string(v) != string(old) {
			out = append(out, v)
		}
	}
	return out
}

func fieldsOf(u use, b []byte) []field {
	switch u {
	case useSuper, useHeld:
		return superblockFieldList(map[use]string{useSuper: "superblock.", useHeld: "held."}[u])
	case useMetaIndex:
		return []field{{"header.unused", 4, 4}, {"header.blocknr", 8, 8}, {"metaindex.blocknr", 16, 8}, {"index.nr_free", 24, 4},
			{"index.none_free_before", 28, 4}, {"metaindex.unused", 32, 8}, {"metaindex.unused", 4088, 8}}
	case useMetaBitmap, useDataBitmap:
		fs := []field{{"header.unused", 4, 4}, {"header.blocknr", 8, 8}}
		for _, off := range []int{16, 17, 20, 30, 60, 100} {
			fs = append(fs, field{"bitmap.entry", off, 1})
		}
		return fs
	}
	return nodeFields(u, b)
}

func superblockFieldList(prefix string) []field {
	var fs []field
	for _, f := range []field{{"flags", 4, 4}, {"blocknr", 8, 8}, {"uuid", 16, 16}, {"magic", 32, 8}, {"version", 40, 4}, {"time", 44, 4},
		{"trans_id", 48, 8}, {"held_root", 56, 8}, {"data_nr", 64, 8}, {"data_allocated", 72, 8}, {"data_root", 80, 8}, {"data_over", 88, 8},
		{"data_slot", 96, 8}, {"meta_nr", 192, 8}, {"meta_allocated", 200, 8}, {"meta_root", 208, 8}, {"meta_over", 216, 8}, {"meta_slot", 312, 8},
		{"mapping_root", 320, 8}, {"details_root", 328, 8}, {"data_block_size", 336, 4}, {"metadata_block_size", 340, 4},
		{"metadata_nr_blocks", 344, 8}, {"compat", 352, 4}, {"compat_ro", 356, 4}, {"incompat", 360, 4}, {"tail", 364, 8}, {"tail", 4088, 8}} {
		f.name = prefix + f.name
		fs = append(fs, f)
	}
	return fs
}

func nodeFields(u use, b []byte) []field {
	fs := []field{{"node.flags", 4, 4}, {"header.blocknr", 8, 8}, {"node.nr_entries", 16, 4}, {"node.max_entries", 20, 4},
		{"node.value_size", 24, 4}, {"node.padding", 28, 4}, {"node.unused", 4072, 8}}
	nr, most, size := int(binary.LittleEndian.Uint32(b[16:])), int(binary.LittleEndian.Uint32(b[20:])), int(binary.LittleEndian.Uint32(b[24:]))
	vals := 32 + 8*most
	if nr < most {
		fs = append(fs, field{"node.unused", 32 + 8*nr, 8}, field{"node.unused", vals + size*nr, size})
	}
	name := map[use]string{useMetaOver: "overflow", useDataOver: "overflow", useDataIndex: "index", useTop: "top", useDetails: "details", useMapping: "mapping"}[u]
	if b[4] == 1 {
		name = "internal"
	}
	picked := map[int]bool{0: true, 1: true, nr / 2: true, nr - 1: true}
	for i := range picked {
		if i < 0 || i >= nr {
			continue
		}
		v := vals + size*i
		fs = append(fs, field{name + ".key", 32 + 8*i, 8})
		switch name {
		case "internal", "top":
			fs = append(fs, field{name + ".value", v, 8})
		case "mapping":
			fs = append(fs, field{"mapping.time", v, 3}, field{"mapping.block", v + 3, 5})
		case "details":
			fs = append(fs, field{"details.mapped", v, 8}, field{"details.transaction_id", v + 8, 8},
				field{"details.creation_time", v + 16, 4}, field{"details.snapshotted_time", v + 20, 4})
		case "overflow":
			fs = append(fs, field{"overflow.count", v, 4})
		case "index":
			fs = append(fs, field{"index.blocknr", v, 8}, field{"index.nr_free", v + 8, 4}, field{"index.none_free_before", v + 12, 4})
		}
	}
	return fs
}

// TestCheckOptions: what is left out is said, what is asked for is done.
func TestCheckOptions(t *testing.T) {
	mem := goldenPool(t)
	patch(t, mem, 63, block.Node, le64(2048, 25<<24))
	if r, err := Check(mem, CheckOptions{SuperblockOnly: true}); err != nil || !r.Clean() {
		t.Errorf("superblock only: %v %v", r.Err(), err)
	}
	if r, err := Check(mem, CheckOptions{SkipMappings: true}); err != nil || !r.Clean() || !r.Partial {
		t.Errorf("without mappings: %v %v", r.Err(), err)
	}
	stop := fmt.Errorf("enough")
	big := newTestPool(t, 1, 4096, 400000)
	big.create(1)
	big.insert(1, 0, 300000, 1)
	big.commit()
	calls := 0
	if _, err := Check(big.mem, CheckOptions{Progress: func(done, total uint64) error {
		if calls++; done > total {
			t.Errorf("progress %d of %d", done, total)
		}
		return stop
	}}); err != stop || calls != 1 {
		t.Errorf("check stopped by its progress: %v after %d calls", err, calls)
	}
	if r, err := Check(mem, CheckOptions{MaxFindings: 1}); err != nil || len(r.Findings) != 1 || r.Omitted == 0 || r.Fatals+r.Leaks < 2 {
		t.Errorf("one finding kept: %d kept, %d omitted, %d fatal, %d leaks, %v", len(r.Findings), r.Omitted, r.Fatals, r.Leaks, err)
	}
}

func TestClearNeedsCheck(t *testing.T) {
	mem := goldenPool(t)
	patch(t, mem, 0, block.Superblock, le32(4, 1))
	r, err := Check(mem, CheckOptions{})
	if err != nil || !r.NeedsCheck || !r.Clean() {
		t.Fatalf("%+v %v", r, err)
	}
	damaged := mem.Clone()
	patch(t, damaged, 60, block.Bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 4, 1) })
	if r, err := Check(damaged, CheckOptions{ClearNeedsCheck: true}); err != nil || r.NeedsCheckCleared || !r.NeedsCheck {
		t.Errorf("the mark of a damaged pool was cleared: %+v %v", r, err)
	}
	if r, err := Check(mem, CheckOptions{ClearNeedsCheck: true, SkipMappings: true}); err != nil || r.NeedsCheckCleared {
		t.Errorf("the mark was cleared by half a check: %+v %v", r, err)
	}
	if r, err := Check(mem, CheckOptions{ClearNeedsCheck: true}); err != nil || !r.NeedsCheckCleared || r.NeedsCheck {
		t.Errorf("%+v %v", r, err)
	}
	if r, err := Check(mem, CheckOptions{}); err != nil || r.NeedsCheck || !r.Clean() {
		t.Errorf("after clearing: %+v %v", r, err)
	}
	tool(t, "thin_check", devFile(t, mem))
}

// TestRepairLeaks lowers counts that are too high, of both maps, and nothing else.
func TestRepairLeaks(t *testing.T) {
	p := newTestPool(t, 9, 1024, 40000)
	for range 40 {
		p.step()
	}
	p.commit()
	var xml strings.Builder
	p.must(Dump(p.mem, &xml, DumpOptions{}))
	m, err := Open(p.mem, OpenOptions{})
	p.must(err)
	for range 30 { // blocks that are counted and not mapped
		r, ok := m.AllocData(DataBlock(p.rng.Intn(40000)), 5)
		for b := r.Begin; ok && b < r.Begin+DataBlock(r.Len); b++ {
			p.must(m.data.Refer(uint64(b)))
		}
	}
	for b := uint64(0); b < 40000; b++ { // counts that are too high
		if m.data.Count(b) > 0 && p.rng.Intn(50) == 0 {
			for range 1 + p.rng.Intn(4) {
				p.must(m.data.Inc(b))
			}
		}
	}
	lost, _, err := m.tm.Alloc(block.Node)
	p.must(err)
	p.must(m.tm.Inc(lost))
	m.tm.Alloc(block.Node)
	root := m.devs[p.now.ids()[0]].root
	p.must(m.tm.Inc(root))
	m.changed = true
	_, err = m.Commit(nil)
	p.must(err)

	r, err := Check(p.mem, CheckOptions{})
	p.must(err)
	if r.Fatals != 0 || r.LeakedData < 100 || r.LeakedMeta != 3 {
		t.Fatalf("%d fatal, %d data and %d metadata blocks leaked, first %v", r.Fatals, r.LeakedData, r.LeakedMeta, r.Err())
	}
	want := r.LeakedData + r.LeakedMeta
	r, err = Check(p.mem, CheckOptions{RepairLeaks: true})
	p.must(err)
	mustClean(t, r)
	if r.Repaired != want {
		t.Errorf("%d blocks repaired, want %d", r.Repaired, want)
	}
	p.check()
	p.thinCheck()
	sameDump(t, p.mem, []byte(xml.String()))
}

// TestCheckWhileInUse: a view is checked while commits go on.
func TestCheckWhileInUse(t *testing.T) {
	p := newTestPool(t, 3, 4096, 30000)
	for range 30 {
		p.step()
	}
	p.commit()
	v := p.m.Pin()
	for range 10 {
		p.step()
		p.commit()
	}
	r, err := v.Check(CheckOptions{})
	p.must(err)
	mustClean(t, r)
	v.Unpin()
	if _, err := p.m.Pin().Check(CheckOptions{RepairLeaks: true}); err == nil {
		t.Error("a pool in use was to be repaired")
	}
}

// TestReportForms holds text and JSON of a report, which people and programs read.
func TestReportForms(t *testing.T) {
	mem := goldenPool(t)
	patch(t, mem, 63, block.Node, le64(2048, 25<<24))
	patch(t, mem, 60, block.Bitmap, func(b []byte) { spacemap.SetBitmapEntry(b, 10, 1); spacemap.SetBitmapEntry(b, 11, 1) })
	patch(t, mem, 0, block.Superblock, le32(40, 1))
	r, err := Check(mem, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	want := `warning: metadata block 0: superblock: version 1, want 2
fatal: metadata block 63: mapping tree of thin 0: virtual block 0: mapped to data block 25 of 25
warning: metadata block 66: data space map index: bitmap 0: nr_free 16314, want 16312
warning: metadata block 0: superblock: data space map: nr_allocated 6, want 8
leak: data space map: data block 0: count 3, 2 references
leak: data space map: data block [10, 12): count 1, 0 references
transaction id 5, time 2, needs_check false, held root 0
metadata: 12 of 1024 blocks used
data: 6 of 25 blocks of 65536 bytes used by 13 mappings of 3 devices
1 fatal, 2 leaks (3 data and 0 metadata blocks), 3 warnings
`
	if text.String() != want {
		t.Errorf("text:\n%s\nwant:\n%s", text.String(), want)
	}
	var js strings.Builder
	if err := r.WriteJSON(&js); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"severity": "fatal"`, `"where": "mapping tree"`, `"device": 0`, `"block": 63`,
		`"begin": 10`, `"end": 12`, `"leaked_data_blocks": 3`, `"transaction_id": 5`,
	} {
		if !strings.Contains(js.String(), want) {
			t.Errorf("JSON lacks %s:\n%s", want, js.String())
		}
	}
	if err := r.Err(); !strings.Contains(err.Error(), "1 fatal findings, 2 leaks, first: metadata block 63: mapping tree of thin 0") {
		t.Errorf("error: %v", err)
	}
}

// TestNoPool: a device that was never formatted is said to be that, not to be damaged.
func TestNoPool(t *testing.T) {
	mem := dev.NewMem(1 << 20)
	if _, err := Open(mem, OpenOptions{}); !errors.Is(err, ErrNoPool) || errors.Is(err, ErrCorrupt) {
		t.Errorf("open: %v", err)
	}
	if _, err := OpenView(mem); !errors.Is(err, ErrNoPool) {
		t.Errorf("view: %v", err)
	}
	r, err := Check(mem, CheckOptions{})
	if err != nil || r.Clean() || !strings.Contains(r.Err().Error(), "superblock: all zeros; make a pool with 'mica pool create'") {
		t.Errorf("check: %v %v", r.Err(), err)
	}
	if _, err := Open(dev.NewMem(512), OpenOptions{}); err == nil || errors.Is(err, ErrNoPool) {
		t.Errorf("open of half a block: %v", err)
	}
}
