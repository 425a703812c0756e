package thin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"mica/dev"
	"mica/pdata/block"
)

// TestRefusals: what cannot be done is refused with the right error, changes nothing and does
// not fail the pool.
func TestRefusals(t *testing.T) {
	p := newTestPool(t, 1, 512, 1000)
	p.create(1)
	p.insert(1, 0, 10, 1)
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.held = p.now
	err2 := func(_ any, err error) error { return err }
	for _, c := range []struct {
		name string
		err  error
		is   error
		want string
	}{
		{"create an id that is there", p.m.CreateThin(1), ErrExists, "create thin 1: device id 1 exists already"},
		{"snapshot to an id that is there", p.m.CreateSnap(1, 1), ErrExists, "create snapshot 1 of thin 1: device id 1 exists already"},
		{"snapshot of nothing", p.m.CreateSnap(5, 9), ErrNotFound, "create snapshot 5: thin 9: no such thin device"},
		{"id over 24 bits", p.m.CreateThin(1 << 24), nil, "device id 16777216 does not fit 24 bits"},
		{"delete of nothing", err2(p.m.DeleteStep(9)), ErrNotFound, "delete: thin 9"},
		{"details of nothing", err2(p.m.Details(9)), ErrNotFound, "thin 9"},
		{"insert into nothing", p.m.Insert(9, []Entry{{1, Mapping{1, 0}}}), ErrNotFound, "thin 9"},
		{"insert out of order", p.m.Insert(1, []Entry{{5, Mapping{20, 0}}, {5, Mapping{21, 0}}}), nil, "virtual block 5 after 5"},
		{"insert of the future", p.m.Insert(1, []Entry{{5, Mapping{20, 7}}}), nil, "time 7 is in the future"},
		{"another transaction id", p.m.SetTransactionID(3, 4), nil, "it is 0, not 3"},
		{"second metadata snapshot", p.m.ReserveMetadataSnap(), ErrExists, "is held"},
		{"shrink the data device", p.m.GrowData(999), nil, "from 1000 to 999 blocks: pools only grow"},
		{"grow beyond the metadata", p.m.GrowData(1 << 30), ErrNoMetaSpace, "metadata blocks free"},
		{"format over a pool", Format(p.mem, FormatOptions{DataBlockSize: testBlockSize}), ErrExists, "not empty"},
		{"block size", Format(dev.NewMem(1<<20), FormatOptions{DataBlockSize: 100}), nil, "data block size 100 bytes"},
		{"tiny metadata", Format(dev.NewMem(1<<15), FormatOptions{DataBlockSize: testBlockSize}), nil, "too small"},
		{"too many data blocks", Format(dev.NewMem(1<<20), FormatOptions{DataBlockSize: testBlockSize, DataBlocks: 1 << 24}), ErrNoMetaSpace, "too few"},
	} {
		if c.err == nil || c.is != nil && !errors.Is(c.err, c.is) || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, c.err, c.want)
		}
	}
	if p.m.Failed() != nil {
		t.Fatalf("a refusal has failed the pool: %v", p.m.Failed())
	}
	p.compare()
	p.commit()
	p.check()

	p.must(p.m.SetNeedsCheck())
	if err := p.m.GrowData(2000); !errors.Is(err, ErrNeedsCheck) {
		t.Errorf("grow a pool that needs a check: %v", err)
	}
	if err := p.m.GrowMetadata(); !errors.Is(err, ErrNeedsCheck) {
		t.Errorf("grow the metadata of a pool that needs a check: %v", err)
	}
	p.must(p.m.ClearNeedsCheck())
	p.must(p.m.GrowData(2000))

	ro, err := Open(p.mem, OpenOptions{ReadOnly: true})
	p.must(err)
	if err := ro.CreateThin(7); !errors.Is(err, ErrReadOnly) {
		t.Errorf("create in a pool opened read-only: %v, want ErrReadOnly", err)
	}
	if err := ro.SetNeedsCheck(); !errors.Is(err, ErrReadOnly) {
		t.Errorf("mark a pool opened read-only: %v, want ErrReadOnly", err)
	}
}

// TestTimeRunsOut: the snapshot counter stops before it no longer fits.
func TestTimeRunsOut(t *testing.T) {
	p := newTestPool(t, 1, 512, 1000)
	p.create(1)
	p.commit()
	patch(t, p.mem, 0, block.Superblock, le32(44, MaxTime-2))
	p.committed.time = MaxTime - 2
	p.reopen()
	p.insert(1, 0, 5, 1)
	p.snap(2, 1)
	p.insert(1, 0, 5, 1)
	if err := p.m.CreateSnap(3, 1); err == nil || !strings.Contains(err.Error(), "the pool's time is at its end: 16777215") {
		t.Errorf("snapshot at the last time: %v", err)
	}
	p.commit()
	p.check()
	p.thinCheck()
}

// TestIdleSnapshotsCostNoTime: only a mapping of the present time makes a snapshot raise it.
func TestIdleSnapshotsCostNoTime(t *testing.T) {
	p := newTestPool(t, 1, 2048, 10000)
	p.create(1)
	p.snap(2, 1)
	if p.now.time != 0 {
		t.Errorf("snapshot of an empty device: time %d, want 0", p.now.time)
	}
	p.insert(1, 0, 100, 1)
	for id := DevID(3); id < 60; id++ {
		p.snap(id, 1)
	}
	if p.now.time != 1 {
		t.Errorf("57 snapshots of an idle device: time %d, want 1", p.now.time)
	}
	p.snap(60, 5)
	if p.now.time != 1 {
		t.Errorf("snapshot of a snapshot: time %d, want 1", p.now.time)
	}
	p.insert(5, 0, 1, 1)
	p.snap(61, 5)
	if p.now.time != 2 {
		t.Errorf("snapshot after a write: time %d, want 2", p.now.time)
	}
	p.commit()
	p.check()
	p.thinCheck()
}

// TestLargestMetadata: 255 bitmaps, on a device that is larger still.
func TestLargestMetadata(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meta")
	d, err := dev.CreateFile(path, MaxMetadataBytes+100<<20, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	defer d.Close()
	if err := Format(d, FormatOptions{DataBlockSize: testBlockSize, DataBlocks: 1000}); err != nil {
		t.Fatal(err)
	}
	m, err := Open(keepOpen{d}, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := m.Space().MetaTotal; n != 4161600 {
		t.Errorf("%d metadata blocks, want 4161600", n)
	}
	if err := m.CreateThin(1); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Commit(nil); err != nil {
		t.Fatal(err)
	}
	r, err := Check(d, CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mustClean(t, r)
	tool(t, "thin_check", path)
}

// TestManyDataBitmaps: a data device of 1 TiB needs more bitmaps than one index node holds.
func TestManyDataBitmaps(t *testing.T) {
	p := newTestPool(t, 1, 3000, 16<<20)
	p.create(1)
	for range 300 {
		r, ok := p.m.AllocData(DataBlock(p.rng.Intn(16<<20)), 1)
		if !ok {
			t.Fatal("no data block")
		}
		p.must(p.m.Insert(1, []Entry{{VBlock(r.Begin), Mapping{r.Begin, 0}}}))
		p.now.devs[1].maps[VBlock(r.Begin)] = Mapping{r.Begin, 0}
		p.now.devs[1].info.MappedBlocks++
	}
	p.snap(2, 1)
	p.insert(2, 100, 3, 1)
	p.snap(3, 2)
	p.insert(3, 100, 3, 1)
	p.commit()
	p.compare()
	p.check()
	p.thinCheck()
	p.reopen()
	p.delete(1)
	p.commit()
	p.compare()
	p.check()
	p.thinCheck()
}

// TestDeleteInSteps: a device with many blocks of its own goes in steps, each of which may be
// committed; a device that shares nearly everything goes at once, whatever its size.
func TestDeleteInSteps(t *testing.T) {
	p := newTestPool(t, 1, 16384, 700000)
	p.create(1)
	for vb := VBlock(0); vb < 100000; vb += 10000 {
		p.insert(1, vb, 10000, 1)
	}
	p.snap(2, 1)
	p.insert(2, 1000, 100, 1)
	p.commit()
	if !p.deleteStep(2) {
		t.Error("a snapshot that shares nearly everything did not go in one step")
	}
	p.commit()
	p.compare()
	p.check()
	steps, left := 0, uint64(100000)
	for done := false; !done; steps++ {
		done = p.deleteStep(1)
		if !done {
			d, err := p.m.Details(1)
			p.must(err)
			// A step holds up everybody else: full leaves have 252 entries.
			if gone := left - d.MappedBlocks; gone > deleteLeaves*252 {
				t.Errorf("a step removed %d mappings, at most %d", gone, deleteLeaves*252)
			}
			left = d.MappedBlocks
		}
		p.commit()
		if done || steps%16 == 0 {
			p.check()
		}
	}
	if want := 600 / deleteLeaves; steps < want/2 || steps > want+10 {
		t.Errorf("600 leaves went in %d steps, want about %d", steps, want)
	}
	p.thinCheck()
}

// TestCheckMetadataSnap: the snapshot alone, while the rest of the pool changes.
func TestCheckMetadataSnap(t *testing.T) {
	p := newTestPool(t, 2, 2048, 20000)
	for range 30 {
		p.step()
	}
	p.commit()
	if _, err := Check(p.mem, CheckOptions{MetadataSnap: true}); !errors.Is(err, ErrNotFound) {
		t.Errorf("without a metadata snapshot: %v, want ErrNotFound", err)
	}
	p.must(p.m.ReserveMetadataSnap())
	held := len(p.now.devs)
	p.commit()
	for range 20 {
		p.step()
	}
	p.commit()
	r, err := Check(p.mem, CheckOptions{MetadataSnap: true})
	p.must(err)
	mustClean(t, r)
	if r.Devices != held || !r.Partial {
		t.Errorf("%d devices, partial %v; want %d, true", r.Devices, r.Partial, held)
	}
	sb := DecodeSuperblock(readBlock(t, p.mem, block.Loc(r.HeldRoot)))
	patch(t, p.mem, sb.DetailsRoot, block.Node, le64(1040, 12345))
	r, err = Check(p.mem, CheckOptions{MetadataSnap: true})
	p.must(err)
	if r.Clean() {
		t.Error("a wrong count of mapped blocks in the metadata snapshot was not found")
	}
}

// TestConcurrentUse: readers, views and allocation go on beside changes and commits.
func TestConcurrentUse(t *testing.T) {
	p := newTestPool(t, 1, 8192, 200000)
	p.create(0)
	p.insert(0, 0, 3000, 1)
	p.commit()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	run := func(fn func(i int) error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := fn(i); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	run(func(i int) error {
		_, ok, err := p.m.Lookup(0, VBlock(i%3000))
		if err == nil && !ok {
			err = fmt.Errorf("block %d of thin 0 is gone", i%3000)
		}
		return err
	})
	run(func(int) error {
		v := p.m.Pin()
		defer v.Unpin()
		if r, err := v.Check(CheckOptions{}); err != nil || !r.Clean() {
			return fmt.Errorf("check of a view: %v %v", err, r.Err())
		}
		_, err := v.Usage()
		return err
	})
	run(func(i int) error {
		if r, ok := p.m.AllocData(DataBlock(i), 3); ok {
			p.m.UnreserveData(r)
		}
		p.m.CanAdmit(10, false)
		p.m.Space()
		return nil
	})
	for i := range 60 {
		id := DevID(1 + i%5)
		if p.now.devs[id] == nil {
			p.snap(id, 0)
			p.insert(id, VBlock(p.rng.Intn(3000)), 200, 3)
		} else {
			p.delete(id)
		}
		c, err := p.m.Prepare()
		p.must(err)
		p.insert(0, VBlock(p.rng.Intn(3000)), 20, 1)
		p.must(c.WriteBlocks())
		p.must(c.WriteSuperblock())
		for _, r := range RunsOf(c.Freed()) {
			p.m.ReleaseData(r)
		}
	}
	close(stop)
	wg.Wait()
	p.commit()
	p.compare()
	p.check()
}

// TestHighCounts: data blocks and nodes that hundreds of devices refer to.
func TestHighCounts(t *testing.T) {
	p := newTestPool(t, 1, 4096, 5000)
	p.create(0)
	p.insert(0, 0, 40, 1)
	for id := DevID(1); id <= 600; id++ {
		p.snap(id, 0)
		if id <= 300 {
			p.insert(id, 50, 1, 1) // its own leaf now
		}
	}
	p.commit()
	p.compare()
	p.check()
	p.thinCheck()
	if b := p.now.devs[0].maps[0].Block; p.m.data.Count(uint64(b)) != 301 {
		t.Errorf("data block %d: count %d, want 301 leaves", b, p.m.data.Count(uint64(b)))
	}
	p.reopen()
	for id := DevID(1); id <= 600; id += 2 {
		p.delete(id)
	}
	p.commit()
	p.compare()
	p.check()
	p.thinCheck()
}
