package backup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/thin"
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
	if filepath.Base(i.Path) != "metadata-7-20310506T120000.000Z.xml.zst" || i.TransactionID != 7 || !i.Time.Equal(noon) {
		t.Errorf("%+v", i)
	}
	for path, mode := range map[string]os.FileMode{dir: os.ModeDir | 0o700, i.Path: 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: mode %v, %v", path, st.Mode(), err)
		}
	}
	r, err := Open(i.Path)
	p.must(err)
	got, err := io.ReadAll(r)
	p.must(errors.Join(err, r.Close()))
	if string(got) != want {
		t.Error("the backup is not the pool's dump")
	}
	if tool, err := exec.LookPath("zstd"); err == nil {
		out, err := exec.Command(tool, "-dc", i.Path).Output()
		if err != nil || string(out) != want {
			t.Errorf("zstd -dc: %v", err)
		}
	}

	for n := range 5 {
		p.must(p.m.SetTransactionID(uint64(7+n), uint64(8+n)))
		p.commit()
		p.backup(dir, noon.Add(time.Duration(n+1)*time.Hour))
	}
	for _, other := range []string{"metadata-1-x.xml.zst", "notes", "metadata-1-20310506T120000.000Z.xml"} {
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
	r, err := Open(i.Path)
	p.must(err)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != want {
		t.Errorf("the backup is of another state (%v)", err)
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
			in, err := Open(b.Path)
			p.must(err)
			defer in.Close()
			out := dev.NewMem(4 << 20)
			r, err := Restore(in, present, out, c.opts)
			p.must(err)
			chk, err := thin.Check(out, thin.CheckOptions{})
			p.must(err)
			if !chk.Clean() {
				t.Fatal(chk.Err())
			}
			if r.Compared == c.damage || r.TransactionID != 5 || len(r.Devices) != 3 {
				t.Fatalf("%+v", r)
			}
			want := Device{ID: 3, Mapped: 100, Reused: 50, Freed: 50, Kept: c.freed}
			if c.damage {
				want = Device{ID: 3, Mapped: 100, Kept: 100}
			} else if len(r.Newer) != 2 || r.Newer[0] != 8 || r.Newer[1] != 9 || r.Present != 6 || chk.DataBlocks != 12000 {
				t.Errorf("newer %v, present %d, %d data blocks", r.Newer, r.Present, chk.DataBlocks)
			}
			if r.Devices[2] != want {
				t.Errorf("%+v, want %+v", r.Devices[2], want)
			}
			for _, d := range r.Devices[:2] {
				if d.Kept != 200 || d.Mapped != 200 {
					t.Errorf("%+v", d)
				}
			}
			if r.Lost() != want.Mapped-want.Kept {
				t.Errorf("%d lost", r.Lost())
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

// TestOpenHostile: a file that is cut, or that wants too much memory, is an error.
func TestOpenHostile(t *testing.T) {
	p := newPool(t)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 500)
	p.commit()
	b := p.backup(t.TempDir(), noon)
	whole, err := os.ReadFile(b.Path)
	p.must(err)
	// A frame that asks for a window of 2 GiB.
	huge := []byte{0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA8, 0x01, 0x00, 0x00}
	for name, text := range map[string][]byte{"cut": whole[:len(whole)/2], "huge window": huge, "empty": nil} {
		path := filepath.Join(t.TempDir(), "b")
		p.must(os.WriteFile(path, text, 0o600))
		r, err := Open(path)
		if err != nil {
			continue
		}
		out := dev.NewMem(4 << 20)
		if _, err := Restore(r, nil, out, RestoreOptions{}); err == nil {
			t.Errorf("%s: restored", name)
		}
		r.Close()
		if _, err := thin.OpenView(out); !errors.Is(err, thin.ErrNoPool) {
			t.Errorf("%s: a pool is there: %v", name, err)
		}
	}
	plain := filepath.Join(t.TempDir(), "plain.xml")
	p.must(os.WriteFile(plain, []byte(p.dump()), 0o600))
	r, err := Open(plain)
	p.must(err)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !strings.HasPrefix(string(got), "<superblock") {
		t.Errorf("plain: %v", err)
	}
}
