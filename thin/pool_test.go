package thin

import (
	"fmt"
	"maps"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"mica/dev"
)

// A testDev is what a testPool expects of one device.
type testDev struct {
	maps map[VBlock]Mapping
	info Details
}

// A testState is a whole pool as plain maps.
type testState struct {
	devs map[DevID]*testDev
	time uint32
	txID uint64
	data uint64 // data blocks
}

func (s *testState) clone() *testState {
	c := &testState{devs: map[DevID]*testDev{}, time: s.time, txID: s.txID, data: s.data}
	for id, d := range s.devs {
		c.devs[id] = &testDev{maps.Clone(d.maps), d.info}
	}
	return c
}

func (s *testState) ids() []DevID { return slices.Sorted(maps.Keys(s.devs)) }

// A testPool is a pool in memory beside a model of it. Every step changes both.
type testPool struct {
	t         testing.TB
	rng       *rand.Rand
	d         dev.Device // what Metadata works on
	mem       *dev.Mem   // what lies below
	m         *Metadata
	now       *testState // open transaction
	committed *testState
	held      *testState // metadata snapshot
	retimed   bool       // times of mappings change by themselves: a compaction is under way
}

const testBlockSize = 64 << 10

func newTestPool(t testing.TB, seed int64, metaBlocks int64, dataBlocks uint64) *testPool {
	t.Helper()
	mem := dev.NewMem(metaBlocks * 4096)
	return newTestPoolOn(t, seed, mem, mem, dataBlocks)
}

func newTestPoolOn(t testing.TB, seed int64, d dev.Device, mem *dev.Mem, dataBlocks uint64) *testPool {
	t.Helper()
	p := &testPool{t: t, rng: rand.New(rand.NewSource(seed)), d: d, mem: mem}
	p.must(Format(d, FormatOptions{DataBlockSize: testBlockSize, DataBlocks: dataBlocks}))
	p.now = &testState{devs: map[DevID]*testDev{}, data: dataBlocks}
	p.committed = p.now.clone()
	p.reopen()
	return p
}

func (p *testPool) must(err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatal(err)
	}
}

// reopen drops what is not committed, as a crash does.
func (p *testPool) reopen() {
	p.t.Helper()
	m, err := Open(p.d, OpenOptions{CacheBytes: 1 << 20})
	p.must(err)
	p.m = m
	p.now = p.committed.clone()
}

func (p *testPool) create(id DevID) {
	p.t.Helper()
	p.must(p.m.CreateThin(id))
	p.now.devs[id] = &testDev{map[VBlock]Mapping{}, Details{TransactionID: p.now.txID, CreationTime: p.now.time, SnapshottedTime: p.now.time}}
}

func (p *testPool) snap(id, origin DevID) {
	p.t.Helper()
	p.must(p.m.CreateSnap(id, origin))
	o := p.now.devs[origin]
	t := p.m.Time()
	if t != p.now.time && t != p.now.time+1 {
		p.t.Fatalf("snapshot moved the time from %d to %d", p.now.time, t)
	}
	for vb, e := range o.maps {
		if e.Time >= t {
			p.t.Fatalf("after a snapshot at time %d, block %d of the origin has time %d: it would pass as not shared", t, vb, e.Time)
		}
	}
	p.now.time = t
	o.info.SnapshottedTime = t
	p.now.devs[id] = &testDev{maps.Clone(o.maps), Details{o.info.MappedBlocks, p.now.txID, t, t}}
}

func (p *testPool) deleteStep(id DevID) bool {
	p.t.Helper()
	done, err := p.m.DeleteStep(id)
	p.must(err)
	d := p.now.devs[id]
	if done {
		delete(p.now.devs, id)
		return true
	}
	// What is left is a prefix of the mappings.
	n := 0
	p.must(p.m.LookupRange(id, 0, 1<<63, func(e Entry) bool {
		if was := d.maps[e.VBlock]; was.Block != e.Block || was.Time != e.Time && !p.retimed {
			p.t.Fatalf("thin %d is being deleted: block %d became %v, was %v", id, e.VBlock, e.Mapping, d.maps[e.VBlock])
		}
		n++
		return true
	}))
	keys := slices.Sorted(maps.Keys(d.maps))
	for _, k := range keys[n:] {
		delete(d.maps, k)
	}
	d.info.MappedBlocks = uint64(n)
	return false
}

func (p *testPool) delete(id DevID) {
	p.t.Helper()
	for !p.deleteStep(id) {
	}
}

// insert maps n blocks from vb on, with gaps below gap, as far as there are data blocks.
func (p *testPool) insert(id DevID, vb VBlock, n, gap int) {
	p.t.Helper()
	var es []Entry
	for range n {
		r, ok := p.m.AllocData(DataBlock(p.rng.Intn(int(p.now.data))), 1)
		if !ok {
			break
		}
		es = append(es, Entry{vb, Mapping{r.Begin, p.now.time}})
		vb += VBlock(1 + p.rng.Intn(gap))
	}
	p.must(p.m.Insert(id, es))
	d := p.now.devs[id]
	for _, e := range es {
		d.maps[e.VBlock] = e.Mapping
	}
	d.info.MappedBlocks = uint64(len(d.maps))
}

func (p *testPool) remove(id DevID, begin, end VBlock, limit int) {
	p.t.Helper()
	removed, next, done, err := p.m.Remove(id, begin, end, limit)
	p.must(err)
	if done != (next >= end) {
		p.t.Fatalf("remove [%d, %d) limit %d: next %d, done %v", begin, end, limit, next, done)
	}
	d := p.now.devs[id]
	was := len(d.maps)
	for k := range d.maps {
		if k >= begin && k < min(next, end) {
			delete(d.maps, k)
		}
	}
	if was-len(d.maps) != removed {
		p.t.Fatalf("remove [%d, %d) limit %d: says %d removed, want %d", begin, end, limit, removed, was-len(d.maps))
	}
	if limit > 0 && (removed > limit || !done && removed != limit) {
		p.t.Fatalf("remove [%d, %d): %d removed with limit %d, done %v", begin, end, removed, limit, done)
	}
	d.info.MappedBlocks = uint64(len(d.maps))
}

func (p *testPool) commit() {
	p.t.Helper()
	freed, err := p.m.Commit(nil)
	p.must(err)
	for _, r := range freed {
		p.m.ReleaseData(r)
	}
	p.committed = p.now.clone()
}

// compare holds the open transaction against the model.
func (p *testPool) compare() {
	p.t.Helper()
	p.compareTo(p.m, p.now)
}

func (p *testPool) compareTo(m *Metadata, s *testState) {
	p.t.Helper()
	devs, err := m.Devices()
	p.must(err)
	if len(devs) != len(s.devs) {
		p.t.Fatalf("%d devices, want %d", len(devs), len(s.devs))
	}
	if m.Time() != s.time || m.TransactionID() != s.txID || m.DataBlocks() != s.data {
		p.t.Fatalf("time %d transaction id %d data blocks %d, want %d %d %d", m.Time(), m.TransactionID(), m.DataBlocks(), s.time, s.txID, s.data)
	}
	used := map[DataBlock]bool{}
	for _, i := range devs {
		d := s.devs[i.ID]
		if d == nil || i.Details != d.info {
			p.t.Fatalf("thin %d: %+v, want %+v", i.ID, i.Details, d)
		}
		n := 0
		p.must(m.LookupRange(i.ID, 0, 1<<63, func(e Entry) bool {
			if d.maps[e.VBlock] != e.Mapping {
				p.t.Fatalf("thin %d block %d: %v, want %v", i.ID, e.VBlock, e.Mapping, d.maps[e.VBlock])
			}
			used[e.Block] = true
			n++
			return true
		}))
		if n != len(d.maps) {
			p.t.Fatalf("thin %d: %d mappings, want %d", i.ID, n, len(d.maps))
		}
		if len(d.maps) > 0 {
			top := slices.Max(slices.Collect(maps.Keys(d.maps)))
			if h, ok, err := m.HighestMapped(i.ID); err != nil || !ok || h != top {
				p.t.Fatalf("thin %d: highest block %d %v %v, want %d", i.ID, h, ok, err, top)
			}
		}
	}
	if p.held == nil {
		if sp := m.Space(); sp.DataUsed != uint64(len(used)) {
			p.t.Fatalf("%d data blocks used, want %d", sp.DataUsed, len(used))
		}
	}
}

// file writes the metadata device to a file for the field's tools.
func (p *testPool) file() string {
	p.t.Helper()
	return devFile(p.t, p.mem)
}

func devFile(t testing.TB, d dev.Device) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meta")
	buf := make([]byte, d.Size())
	if _, err := d.ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, buf, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tool runs one of thin-provisioning-tools and returns its output; ok is false if there is none.
func tool(t testing.TB, name string, args ...string) (out []byte, ok bool) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Logf("%s is not installed (package thin-provisioning-tools): its verdict is left out", name)
		return nil, false
	}
	out, err = exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out, true
}

// thinCheck asks Debian's thin_check about the committed state.
func (p *testPool) thinCheck() {
	p.t.Helper()
	path := p.file()
	tool(p.t, "thin_check", path)
	os.Remove(path)
}

// pick returns one of the devices, or false if there is none.
func (p *testPool) pick() (DevID, bool) {
	ids := p.now.ids()
	if len(ids) == 0 {
		return 0, false
	}
	return ids[p.rng.Intn(len(ids))], true
}

// step makes one random change.
func (p *testPool) step() string {
	p.t.Helper()
	id, ok := p.pick()
	if !ok {
		p.create(7)
		return "create 7"
	}
	vb := VBlock(p.rng.Intn(6000))
	switch n := p.rng.Intn(100); {
	case n < 40:
		p.insert(id, vb, 1+p.rng.Intn(300), 1+p.rng.Intn(20))
		return fmt.Sprintf("insert %d %d", id, vb)
	case n < 50:
		p.insert(id, vb, 1+p.rng.Intn(1500), 1)
		return fmt.Sprintf("insert run %d %d", id, vb)
	case n < 65:
		end := vb + VBlock(p.rng.Intn(3000))
		limit := 0
		if p.rng.Intn(2) == 0 {
			limit = 1 + p.rng.Intn(400)
		}
		p.remove(id, vb, end, limit)
		return fmt.Sprintf("remove %d [%d, %d) limit %d", id, vb, end, limit)
	case n < 67:
		p.remove(id, 0, 1<<62, 0)
		return fmt.Sprintf("remove all of %d", id)
	case n < 80 || len(p.now.devs) < 2:
		nid := DevID(p.rng.Intn(40))
		if p.now.devs[nid] != nil {
			return "nothing"
		}
		if p.rng.Intn(6) == 0 {
			p.create(nid)
			return fmt.Sprintf("create %d", nid)
		}
		p.snap(nid, id)
		return fmt.Sprintf("snap %d %d", nid, id)
	case n < 88:
		p.delete(id)
		return fmt.Sprintf("delete %d", id)
	case n < 94:
		p.deleteStep(id)
		return fmt.Sprintf("delete step %d", id)
	default:
		old := p.now.txID
		p.now.txID = uint64(p.rng.Intn(100))
		p.must(p.m.SetTransactionID(old, p.now.txID))
		return "set_transaction_id"
	}
}
