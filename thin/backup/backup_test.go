package backup

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"mica/dev"
	"mica/thin"
	"mica/thin/repair"
)

const blockSize = 64 << 10

type pool struct {
	t   testing.TB
	mem *dev.Mem
	m   *thin.Metadata
}

func newPool(t testing.TB) *pool {
	t.Helper()
	p := &pool{t: t, mem: dev.NewMem(4 << 20)}
	p.must(thin.Format(p.mem, thin.FormatOptions{DataBlockSize: blockSize, DataBlocks: 10000}))
	var err error
	p.m, err = thin.Open(p.mem, thin.OpenOptions{})
	p.must(err)
	return p
}

func (p *pool) must(err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatal(err)
	}
}

func (p *pool) write(id thin.DevID, vb thin.VBlock, n uint64) {
	p.t.Helper()
	p.writeAt(id, vb, n, 0)
}

// writeAt maps data blocks from near hint on.
func (p *pool) writeAt(id thin.DevID, vb thin.VBlock, n uint64, hint thin.DataBlock) {
	p.t.Helper()
	r, ok := p.m.AllocData(hint, n)
	if !ok || r.Len != n {
		p.t.Fatalf("%d data blocks at once: %v %v", n, r, ok)
	}
	var es []thin.Entry
	for i := range n {
		es = append(es, thin.Entry{VBlock: vb + thin.VBlock(i), Mapping: thin.Mapping{Block: r.Begin + thin.DataBlock(i), Time: p.m.Time()}})
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

func (p *pool) delete(id thin.DevID) {
	p.t.Helper()
	for done := false; !done; {
		var err error
		done, err = p.m.DeleteStep(id)
		p.must(err)
	}
}

func (p *pool) dump() string {
	p.t.Helper()
	var b bytes.Buffer
	p.must(thin.Dump(p.mem, &b, thin.DumpOptions{}))
	return b.String()
}

func (p *pool) backup(dir string, at time.Time) Info {
	p.t.Helper()
	v := p.m.Pin()
	defer v.Unpin()
	i, err := Write(context.Background(), v, Options{Dir: dir, Now: at})
	p.must(err)
	return i
}

var noon = time.Date(2031, 5, 6, 12, 0, 0, 0, time.UTC)

// TestWriteListPrune: the file has its name, mode and contents; the newest ones stay.
func TestWriteListPrune(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "backups")
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 500)
	p.must(p.m.SetTransactionID(0, 7))
	p.commit()
	want := p.dump()
	i := p.backup(dir, noon)
	if filepath.Base(i.Path) != "metadata-7-20310506T120000.000Z.img.zst" || i.TransactionID != 7 || !i.Time.Equal(noon) {
		t.Errorf("%+v", i)
	}
	for path, mode := range map[string]os.FileMode{dir: os.ModeDir | 0o700, i.Path: 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: mode %v, %v", path, st.Mode(), err)
		}
	}
	if got := contents(t, i.Path); got != want {
		t.Error("the backup is not the pool")
	}
	// Other programs read it.
	img := filepath.Join(t.TempDir(), "img")
	for _, c := range []struct {
		tool string
		args []string
		out  string
	}{
		{"zstd", []string{"-q", "-d", i.Path, "-o", img}, ""}, {"thin_check", []string{"-q", img}, ""}, {"thin_dump", []string{img}, want},
	} {
		tool, err := exec.LookPath(c.tool)
		if err != nil {
			t.Logf("%s is not installed", c.tool)
			break
		}
		if out, err := exec.Command(tool, c.args...).CombinedOutput(); err != nil || string(out) != c.out {
			t.Errorf("%s: %v, %d bytes", c.tool, err, len(out))
		}
	}

	for n := range 5 {
		p.must(p.m.SetTransactionID(uint64(7+n), uint64(8+n)))
		p.commit()
		p.backup(dir, noon.Add(time.Duration(n+1)*time.Hour))
	}
	for _, other := range []string{"metadata-1-x.img.zst", "notes", "metadata-1-20310506T120000.000Z.img"} {
		p.must(os.WriteFile(filepath.Join(dir, other), nil, 0o600))
	}
	removed, err := Prune(dir, 4)
	p.must(err)
	list, err := List(dir)
	p.must(err)
	if len(removed) != 2 || len(list) != 4 || list[0].TransactionID != 12 || list[3].TransactionID != 9 || removed[1].TransactionID != 7 {
		t.Errorf("removed %v, left %v", removed, list)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 7 {
		t.Errorf("%d files, %v: what is no backup was touched", len(all), err)
	}
	if list, err := List(filepath.Join(dir, "none")); err != nil || len(list) != 0 {
		t.Errorf("%v %v", list, err)
	}
}

// TestWriteWhileChanging: the backup is of the pinned state, whatever is committed meanwhile.
func TestWriteWhileChanging(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 3000)
	p.commit()
	want := p.dump()
	v := p.m.Pin()
	for n := range 20 {
		p.write(1, thin.VBlock(100*n), 100)
		p.commit()
	}
	i, err := Write(context.Background(), v, Options{Dir: t.TempDir()})
	p.must(err)
	v.Unpin()
	if contents(t, i.Path) != want {
		t.Error("the backup is of another state")
	}
}

// unpacked makes a metadata device of a backup.
func unpacked(t testing.TB, path string) dev.Device {
	t.Helper()
	d, err := Unpack(path, filepath.Join(t.TempDir(), "img"), 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// contents is the dump of a backup, which is clean.
func contents(t testing.TB, path string) string {
	t.Helper()
	d := unpacked(t, path)
	r, err := thin.Check(d, thin.CheckOptions{})
	if err != nil || !r.Clean() {
		t.Fatalf("%v %v", r.Err(), err)
	}
	var b bytes.Buffer
	if err := thin.Dump(d, &b, thin.DumpOptions{}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestWriteSnapshots: a backup shares what the pool shares, and holds its metadata snapshot; a
// damaged block ends it. A metadata snapshot by itself has no space maps, and is as good to restore.
func TestWriteSnapshots(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 3000)
	p.commit()
	for id := thin.DevID(2); id < 150; id++ {
		p.must(p.m.CreateSnap(id, 1))
	}
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.write(1, 5000, 10)
	p.commit()
	was, err := thin.Check(p.mem, thin.CheckOptions{})
	p.must(err)
	i := p.backup(t.TempDir(), noon)
	img := unpacked(t, i.Path)
	got, err := thin.Check(img, thin.CheckOptions{})
	p.must(err)
	if !got.Clean() || got.MetaUsed != was.MetaUsed || got.HeldRoot != was.HeldRoot || i.Bytes > 64<<10 {
		t.Errorf("%v: %d metadata blocks, were %d, held root %d, %d bytes", got.Err(), got.MetaUsed, was.MetaUsed, got.HeldRoot, i.Bytes)
	}
	out := dev.NewMem(p.mem.Size())
	r, err := Restore(img, nil, out, RestoreOptions{})
	p.must(err)
	if got, err = thin.Check(out, thin.CheckOptions{}); err != nil || !got.Clean() || got.MetaUsed > was.MetaUsed || !r.Backup.Complete {
		t.Errorf("%v %v: %d metadata blocks, were %d", got.Err(), err, got.MetaUsed, was.MetaUsed)
	}

	view, err := thin.OpenView(p.mem)
	p.must(err)
	held, err := view.MetadataSnap()
	p.must(err)
	if i, err = Write(context.Background(), held, Options{Dir: t.TempDir(), DataBlocks: 10000}); err != nil {
		t.Fatal(err)
	}
	out = dev.NewMem(p.mem.Size())
	if r, err = Restore(unpacked(t, i.Path), nil, out, RestoreOptions{}); err != nil || !r.Backup.Complete || r.Backup.DataBlocks != 10000 || len(r.Backup.Devices) != 149 {
		t.Fatalf("%+v %v", r, err)
	}
	var a, b bytes.Buffer
	p.must(held.Dump(&a, thin.DumpOptions{DataBlocks: 10000}))
	p.must(thin.Dump(out, &b, thin.DumpOptions{}))
	if a.String() != b.String() {
		t.Error("the metadata snapshot differs from what its backup was restored to")
	}

	sb := make([]byte, 4096)
	_, err = p.mem.ReadAt(sb, int64(view.Superblock().DetailsRoot)*4096)
	p.must(err)
	sb[50] ^= 1
	_, err = p.mem.WriteAt(sb, int64(view.Superblock().DetailsRoot)*4096)
	p.must(err)
	view, err = thin.OpenView(p.mem)
	p.must(err)
	dir := t.TempDir()
	if _, err := Write(context.Background(), view, Options{Dir: dir}); !errors.Is(err, thin.ErrCorrupt) {
		t.Errorf("backup of damaged metadata: %v", err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 0 {
		t.Errorf("%v is left", list)
	}
}

// TestWriteFails: what was not finished is not there.
func TestWriteFails(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 3000)
	p.commit()
	dir := t.TempDir()
	stale := filepath.Join(dir, ".metadata-1.tmp")
	p.must(os.WriteFile(stale, nil, 0o600))
	p.must(os.Chtimes(stale, noon.Add(-2*time.Hour), noon.Add(-2*time.Hour)))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	v := p.m.Pin()
	defer v.Unpin()
	if _, err := Write(ctx, v, Options{Dir: dir, Now: noon}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if all, _ := os.ReadDir(dir); len(all) != 0 {
		t.Errorf("%v is left", all)
	}
	if _, err := Write(context.Background(), v, Options{Dir: filepath.Join(p.file(), "sub")}); err == nil {
		t.Error("written below a file")
	}
}

func (p *pool) file() string {
	path := filepath.Join(p.t.TempDir(), "file")
	p.must(os.WriteFile(path, nil, 0o600))
	return path
}

// TestRestore: a pool is put back to a backup. What was made since is lost; blocks that somebody
// else has now, or that are free, are left out; the others come back.
func TestRestore(t *testing.T) {
	for _, c := range []struct {
		name   string
		opts   RestoreOptions
		freed  uint64 // kept of device 3, of 50 that are free now
		damage bool   // the present metadata cannot be read
	}{
		{name: "compared", freed: 0},
		{name: "freed blocks kept", opts: RestoreOptions{KeepFreed: true}, freed: 50},
		{name: "present metadata unreadable", damage: true, freed: 50},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool(t)
			p.must(p.m.CreateThin(1))
			p.write(1, 0, 200)
			p.must(p.m.CreateSnap(2, 1))
			p.must(p.m.CreateThin(3))
			p.write(3, 0, 100)
			p.must(p.m.SetTransactionID(0, 5))
			p.commit()
			b := p.backup(t.TempDir(), noon)

			// Since then: 3 is deleted, half of its blocks are another device's; 1 has own blocks.
			old := devBlocks(t, p.mem, 3)
			p.delete(3)
			p.commit()
			p.must(p.m.CreateSnap(8, 2))
			p.writeAt(2, 0, 10, 5000)
			p.commit()
			p.must(p.m.CreateThin(9))
			var es []thin.Entry
			for i, blk := range old[:50] {
				if !p.m.TakeData(blk) {
					t.Fatalf("data block %d is not free", blk)
				}
				es = append(es, thin.Entry{VBlock: thin.VBlock(i), Mapping: thin.Mapping{Block: blk, Time: p.m.Time()}})
			}
			p.must(p.m.Insert(9, es))
			p.must(p.m.SetTransactionID(5, 6))
			p.must(p.m.GrowData(12000))
			p.commit()

			var present *thin.View
			if !c.damage {
				var err error
				present, err = thin.OpenView(p.mem)
				p.must(err)
			}
			out := dev.NewMem(4 << 20)
			r, err := Restore(unpacked(t, b.Path), present, out, c.opts)
			p.must(err)
			chk, err := thin.Check(out, thin.CheckOptions{})
			p.must(err)
			if !chk.Clean() {
				t.Fatal(chk.Err())
			}
			devs := r.Backup.Devices
			if r.Compared == c.damage || r.TransactionID != 5 || len(devs) != 3 {
				t.Fatalf("%+v", r)
			}
			want := uint64(100)
			if !c.damage {
				want = c.freed
				if len(r.Newer) != 2 || r.Newer[0] != 8 || r.Newer[1] != 9 || r.Present != 6 || chk.DataBlocks != 12000 {
					t.Errorf("newer %v, present %d, %d data blocks", r.Newer, r.Present, chk.DataBlocks)
				}
				lost := devs[2].Lost
				if len(lost) == 0 || lost[0] != (repair.LostRange{Range: repair.Range{Begin: 0, End: 50}, Why: othersNow}) ||
					c.freed == 0 && (len(lost) != 2 || lost[1] != (repair.LostRange{Range: repair.Range{Begin: 50, End: 100}, Why: freeNow})) {
					t.Errorf("lost: %v", lost)
				}
			}
			if devs[2].ID != 3 || devs[2].Kept != want {
				t.Errorf("%+v, want %d kept", devs[2], want)
			}
			for _, d := range devs[:2] {
				if d.Kept != 200 || *d.Mapped != 200 {
					t.Errorf("%+v", d)
				}
			}
		})
	}
}

func devBlocks(t testing.TB, d dev.Device, id thin.DevID) (list []thin.DataBlock) {
	t.Helper()
	v, err := thin.OpenView(d)
	if err == nil {
		err = v.Walk(id, 0, func(e thin.Entry) bool { list = append(list, e.Block); return true })
	}
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestUnpack: dumps and metadata devices are taken too, compressed or not; what is cut, or wants too
// much memory, is an error and leaves no file.
func TestUnpack(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 500)
	p.commit()
	b := p.backup(t.TempDir(), noon)
	whole, err := os.ReadFile(b.Path)
	p.must(err)
	device := make([]byte, p.mem.Size())
	_, err = p.mem.ReadAt(device, 0)
	p.must(err)
	z, err := zstd.NewWriter(nil)
	p.must(err)
	defer z.Close()
	put := func(text []byte) string {
		path := filepath.Join(t.TempDir(), "b")
		p.must(os.WriteFile(path, text, 0o600))
		return path
	}
	xml := []byte(p.dump())
	for name, text := range map[string][]byte{"image": device, "compressed image": z.EncodeAll(device, nil), "XML": xml, "compressed XML": z.EncodeAll(xml, nil)} {
		if got := contents(t, put(text)); got != p.dump() {
			t.Errorf("%s: not the pool", name)
		}
	}
	for name, text := range map[string][]byte{
		"too much": []byte(`<superblock uuid="" time="0" transaction="0" flags="0" version="2" data_block_size="128" nr_data_blocks="99999999999"></superblock>`),
		"cut":      whole[:len(whole)/2], "empty": nil, "cut XML": xml[:len(xml)/2], "no whole blocks": device[:len(device)-1], "text": []byte("hello"),
		"a window of 2 GiB": {0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA8, 0x01, 0x00, 0x00},
	} {
		to := filepath.Join(t.TempDir(), "img")
		if d, err := Unpack(put(text), to, 64<<20); err == nil {
			d.Close()
			t.Errorf("%s: unpacked", name)
		}
		if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file is left (%v)", name, err)
		}
	}
}

// TestRestoreDamaged: of a damaged backup the rest is restored, and what is missing reported.
func TestRestoreDamaged(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 3000)
	p.commit()
	b := p.backup(t.TempDir(), noon)
	img := unpacked(t, b.Path)
	sb := p.m.Pin().Superblock()
	buf := make([]byte, 4096)
	for _, loc := range []int64{0, int64(sb.DetailsRoot)} {
		_, err := img.ReadAt(buf, loc*4096)
		p.must(err)
		buf[3000] ^= 1
		_, err = img.WriteAt(buf, loc*4096)
		p.must(err)
	}
	present, err := thin.OpenView(p.mem)
	p.must(err)
	out := dev.NewMem(p.mem.Size())
	r, err := Restore(img, present, out, RestoreOptions{})
	p.must(err)
	if r.Compared || !strings.Contains(r.Why, "the backup is damaged") || r.Backup.Superblock == "" || r.Backup.Devices[0].Kept != 3000 {
		t.Errorf("%+v", r)
	}
}
