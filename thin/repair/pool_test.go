package repair

import (
	"bytes"
	"encoding/binary"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/thin"
)

const blockSize = 64 << 10

// A pool is a pool in memory that tests make and damage.
type pool struct {
	t   testing.TB
	rng *rand.Rand
	mem *dev.Mem
	m   *thin.Metadata
}

func newPool(t testing.TB, seed, metaBlocks int64, dataBlocks uint64) *pool {
	t.Helper()
	t.Logf("seed %d", seed)
	p := &pool{t: t, rng: rand.New(rand.NewSource(seed)), mem: dev.NewMem(metaBlocks * block.Size)}
	p.must(thin.Format(p.mem, thin.FormatOptions{DataBlockSize: blockSize, DataBlocks: dataBlocks}))
	m, err := thin.Open(p.mem, thin.OpenOptions{})
	p.must(err)
	p.m = m
	return p
}

func (p *pool) must(err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatal(err)
	}
}

// write maps n blocks of a device from vb on, each gap blocks behind the one before.
func (p *pool) write(id thin.DevID, vb thin.VBlock, n, gap int) {
	p.t.Helper()
	var es []thin.Entry
	for range n {
		r, ok := p.m.AllocData(thin.DataBlock(p.rng.Intn(int(p.m.DataBlocks()))), 1)
		if !ok {
			p.t.Fatal("the pool is full")
		}
		es = append(es, thin.Entry{VBlock: vb, Mapping: thin.Mapping{Block: r.Begin, Time: p.m.Time()}})
		vb += thin.VBlock(gap)
	}
	p.must(p.m.Insert(id, es))
}

func (p *pool) commit() {
	p.t.Helper()
	freed, err := p.m.Commit(nil)
	p.must(err)
	for _, r := range freed {
		p.m.ReleaseData(r)
	}
}

// fill makes a pool with an image, snapshots that diverge from it, and a device by itself.
func (p *pool) fill(snaps int) {
	p.t.Helper()
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 3000, 3)
	p.commit()
	for i := range snaps {
		id := thin.DevID(10 + i)
		p.must(p.m.CreateSnap(id, 1))
		p.write(id, thin.VBlock(p.rng.Intn(8000)), 50, 2)
		p.must(p.m.SetTransactionID(p.m.TransactionID(), p.m.TransactionID()+1))
		p.commit()
	}
	p.must(p.m.CreateThin(500))
	p.write(500, 7, 400, 1)
	p.commit()
}

func dump(t testing.TB, d dev.Device) string {
	t.Helper()
	var b bytes.Buffer
	if err := thin.Dump(d, &b, thin.DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// repaired repairs a device in memory and checks the result in every way.
func repaired(t testing.TB, src *dev.Mem, o Options) (*Report, *dev.Mem) {
	t.Helper()
	before := src.Clone()
	out := dev.NewMem(src.Size())
	r, err := Repair(src, out, o)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, before), content(t, src)) {
		t.Fatal("the repair has written to what it repairs")
	}
	dry, err := Repair(src, nil, o)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := text(t, r), text(t, dry); a != b {
		t.Errorf("without output the report is\n%s\nwith\n%s", b, a)
	}
	sound(t, out)
	return r, out
}

// sound checks a pool with both checkers, opens it and changes it.
func sound(t testing.TB, d *dev.Mem) {
	t.Helper()
	c, err := thin.Check(d, thin.CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Clean() || c.Warnings > 0 {
		t.Fatalf("not clean: %d fatal, %d leaks, %d warnings, first %v: %v", c.Fatals, c.Leaks, c.Warnings, c.Err(), c.Findings[0].String())
	}
	thinCheck(t, d)
	w := d.Clone()
	m, err := thin.Open(w, thin.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	devs, err := m.Devices()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range devs {
		if r, ok := m.AllocData(0, 2); ok {
			if err := m.Insert(v.ID, []thin.Entry{{VBlock: 5, Mapping: thin.Mapping{Block: r.Begin, Time: m.Time()}}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := m.Commit(nil); err != nil {
		t.Fatal(err)
	}
	if c, err := thin.Check(w, thin.CheckOptions{}); err != nil || !c.Clean() {
		t.Fatalf("not clean after changes: %v %v", c.Err(), err)
	}
}

func content(t testing.TB, d dev.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func thinCheck(t testing.TB, d dev.Device) {
	t.Helper()
	tool, err := exec.LookPath("thin_check")
	if err != nil {
		t.Log("thin_check is not installed")
		return
	}
	path := filepath.Join(t.TempDir(), "meta")
	if err := os.WriteFile(path, content(t, d), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, path).CombinedOutput(); err != nil {
		t.Fatalf("thin_check: %v\n%s", err, out)
	}
	os.Remove(path)
}

func text(t testing.TB, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// smash makes a block unreadable as what it is.
func smash(t testing.TB, d dev.Device, loc block.Loc) {
	t.Helper()
	b := readBlock(t, d, loc)
	b[100] ^= 0x40
	writeBlock(t, d, loc, b)
}

func readBlock(t testing.TB, d dev.Device, loc block.Loc) []byte {
	t.Helper()
	b := make([]byte, block.Size)
	if _, err := d.ReadAt(b, int64(loc)*block.Size); err != nil {
		t.Fatal(err)
	}
	return b
}

func writeBlock(t testing.TB, d dev.Device, loc block.Loc, b []byte) {
	t.Helper()
	if _, err := d.WriteAt(b, int64(loc)*block.Size); err != nil {
		t.Fatal(err)
	}
}

// change changes a node and seals it again.
func change(t testing.TB, d dev.Device, loc block.Loc, fn func(b []byte)) {
	t.Helper()
	b := readBlock(t, d, loc)
	fn(b)
	block.Seal(b, loc, block.Node)
	writeBlock(t, d, loc, b)
}

func super(t testing.TB, d dev.Device) thin.Superblock {
	t.Helper()
	return thin.DecodeSuperblock(readBlock(t, d, 0))
}

// rootOf is the root of a device's mapping tree.
func rootOf(t testing.TB, d dev.Device, id thin.DevID) block.Loc {
	t.Helper()
	root, ok := readDeviceTree(newForest(d).cache, super(t, d).MappingRoot).roots[id]
	if !ok {
		t.Fatalf("thin %d has no root", id)
	}
	return root
}

// childOf is child i of an internal node, with the keys that belong to it.
func childOf(t testing.TB, d dev.Device, loc block.Loc, i int) (block.Loc, Range) {
	t.Helper()
	n, err := newForest(d).read(loc)
	if err != nil || n.Leaf() {
		t.Fatalf("metadata block %d: no internal node (%v)", loc, err)
	}
	return n.Child(i), childRange(n, i, Range{})
}

// mappings are those of one device.
func mappings(t testing.TB, d dev.Device, id thin.DevID) map[thin.VBlock]thin.Mapping {
	t.Helper()
	v, err := thin.OpenView(d)
	if err != nil {
		t.Fatal(err)
	}
	all := map[thin.VBlock]thin.Mapping{}
	if err := v.Walk(id, 0, func(e thin.Entry) bool { all[e.VBlock] = e.Mapping; return true }); err != nil {
		t.Fatal(err)
	}
	return all
}

func device(t testing.TB, r *Report, id thin.DevID) Device {
	t.Helper()
	for _, d := range r.Devices {
		if d.ID == id {
			return d
		}
	}
	t.Fatalf("thin %d is not in the report:\n%s", id, text(t, r))
	return Device{}
}

func putU64(b []byte, off int, v uint64) { binary.LittleEndian.PutUint64(b[off:], v) }
