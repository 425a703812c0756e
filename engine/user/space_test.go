package user

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

const block = 64 << 10

// fullPool makes a pool of n blocks of which device 1 uses all.
func fullPool(t *testing.T, n int64, o Options) (*testPool, *Thin) {
	t.Helper()
	tp := newPool(t, poolSize{dataBlocks: uint64(n)}, o)
	tp.create(1)
	tp.create(2)
	h := tp.thin(1, n*block)
	write(t, h, fill(1, n*block), 0)
	return tp, h
}

// waitingWrite starts a write of one block that has to wait.
func (tp *testPool) waitingWrite(h *Thin, off int64) <-chan error {
	tp.t.Helper()
	before := tp.status().WaitingForSpace
	done := make(chan error, 1)
	go func() {
		_, err := h.WriteAt(fill(7, 4096), off)
		done <- err
	}()
	eventually(tp.t, "the write waits", func() bool { return tp.status().WaitingForSpace > before })
	return done
}

func TestFullPoolErrors(t *testing.T) {
	tp, h := fullPool(t, 32, Options{ErrorIfNoSpace: true, CommitInterval: time.Hour})
	g := tp.thin(2, 1<<20)
	_, err := g.WriteAt(fill(2, 4096), 0)
	if !errors.Is(err, dev.ErrNoSpace) || !strings.Contains(err.Error(), "0 of 32 data blocks") {
		t.Errorf("write to a full pool: %v, want ErrNoSpace with the numbers", err)
	}
	if s := tp.status(); s.Mode != "out_of_data_space" || !s.ErrorIfNoSpace {
		t.Errorf("status of a full pool: %+v", s)
	}
	// Reads and overwrites go on.
	wantBytes(t, h, 1, 32*block, 0)
	write(t, h, fill(3, 4096), 4096)
	must(t, h.Flush())
	// A snapshot needs no data block; breaking sharing does.
	tp.snap(3, 1)
	if _, err := h.WriteAt(fill(4, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("breaking sharing in a full pool: %v", err)
	}
	wantBytes(t, h, 3, 4096, 4096)
	must(t, tp.p.Delete(ctx, 3))
	must(t, h.Discard(0, 2*block))
	write(t, g, fill(2, 4096), 0)
	write(t, g, fill(2, 4096), block)
	if s := tp.status(); s.Mode != "rw" || s.DataUsed+s.DataReserved+s.DataFreeing != 32 {
		t.Errorf("status after a discard: %+v", s)
	}
}

func TestFullPoolWaits(t *testing.T) {
	for _, c := range []struct {
		name string
		free func(t *testing.T, tp *testPool, h *Thin)
	}{
		{"discard", func(t *testing.T, tp *testPool, h *Thin) {
			must(t, h.Discard(0, block))
			must(t, h.Flush())
		}},
		{"write zeroes", func(t *testing.T, tp *testPool, h *Thin) {
			must(t, h.WriteZeroes(0, block, false))
			must(t, h.Flush())
		}},
		{"delete", func(t *testing.T, tp *testPool, h *Thin) {
			h.Close()
			must(t, tp.p.Delete(ctx, 1))
		}},
		{"growth", func(t *testing.T, tp *testPool, h *Thin) { must(t, tp.p.GrowData(ctx, 40*block)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			tp, h := fullPool(t, 32, still)
			events, cancel := tp.p.Events()
			defer cancel()
			g := tp.thin(2, 1<<20)
			done := tp.waitingWrite(g, 0)
			if s := tp.status(); s.Mode != "out_of_data_space" {
				t.Errorf("mode %q while a write waits", s.Mode)
			}
			// A snapshot of the device whose write waits does not wait for it.
			tp.snap(9, 2)
			select {
			case err := <-done:
				t.Fatalf("the write returned early: %v", err)
			default:
			}
			c.free(t, tp, h)
			must(t, <-done)
			wantBytes(t, g, 7, 4096, 0)
			wantBytes(t, tp.thin(9, 1<<20), 0, 1<<20, 0)
			for _, want := range []engine.EventKind{engine.EventNoSpace, engine.EventSpaceAgain} {
				if e := <-events; e.Kind != want {
					t.Errorf("event %+v, want %s", e, want)
				}
			}
			if s := tp.status(); s.Mode != "rw" || s.WaitingForSpace != 0 {
				t.Errorf("status afterwards: %+v", s)
			}
		})
	}
}

func TestFullPoolTimesOut(t *testing.T) {
	tp, h := fullPool(t, 8, Options{NoSpaceTimeout: 30 * time.Millisecond, CommitInterval: time.Hour})
	g := tp.thin(2, 1<<20)
	if err := <-tp.waitingWrite(g, 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write that waited in vain: %v", err)
	}
	d, _ := tp.counting(func() {
		if _, err := g.WriteAt(fill(1, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
			t.Errorf("write after the timeout: %v", err)
		}
	})
	if d.Writes != 0 {
		t.Error("a refused write wrote")
	}
	must(t, h.Discard(0, block))
	must(t, tp.p.Commit(ctx))
	write(t, g, fill(1, 4096), 0) // and waiting is possible again
	if err := <-tp.waitingWrite(g, block); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write that waited in vain: %v", err)
	}
}

// TestSpaceWait: a handle may wait for a shorter time than the pool, counted from its first write that
// has to, and ends nobody else's wait.
func TestSpaceWait(t *testing.T) {
	tp, h := fullPool(t, 8, still)
	g := tp.thinWith(2, engine.OpenOptions{SizeBytes: 1 << 20, SpaceWait: 50 * time.Millisecond})
	tp.create(5)
	other := tp.waitingWrite(tp.thin(5, 1<<20), 0)
	begin := time.Now()
	if _, err := g.WriteAt(fill(1, 4096), 0); !errors.Is(err, dev.ErrNoSpace) || !strings.Contains(err.Error(), "waited 50ms") {
		t.Errorf("write: %v, want ErrNoSpace after 50 ms", err)
	}
	if d := time.Since(begin); d < 50*time.Millisecond {
		t.Errorf("the write failed after %v", d)
	}
	if _, err := g.WriteAt(fill(1, 4096), block); !errors.Is(err, dev.ErrNoSpace) || !strings.Contains(err.Error(), "since 50ms") {
		t.Errorf("the next write: %v, want ErrNoSpace at once", err)
	}
	select {
	case err := <-other:
		t.Fatalf("another device's write: %v", err)
	default:
	}
	must(t, h.Discard(0, 2*block))
	must(t, h.Flush())
	must(t, <-other)
	write(t, g, fill(1, 4096), 0)
	if _, err := g.WriteAt(fill(1, 4096), block); !errors.Is(err, dev.ErrNoSpace) || !strings.Contains(err.Error(), "waited 50ms") {
		t.Errorf("write in the next state: %v, want ErrNoSpace after 50 ms again", err)
	}
}

func TestWaitersAreBounded(t *testing.T) {
	tp, h := fullPool(t, 8, Options{MaxWaiters: 3, CommitInterval: time.Hour})
	g := tp.thin(2, 1<<20)
	var waits []<-chan error
	for i := range int64(3) {
		waits = append(waits, tp.waitingWrite(g, i*block))
	}
	if _, err := g.WriteAt(fill(1, 4096), 5*block); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("the fourth waiting write: %v, want ErrNoSpace at once", err)
	}
	// Another device may wait too; closing it ends that.
	tp.create(5)
	k := tp.thin(5, 1<<20)
	other := tp.waitingWrite(k, 0)
	must(t, k.Close())
	if err := <-other; !errors.Is(err, dev.ErrClosed) {
		t.Errorf("write of a device that was closed: %v, want ErrClosed", err)
	}
	// Reads, discards and flushes of the waiting device go on.
	wantBytes(t, g, 0, 1<<20, 0)
	must(t, g.Discard(0, 1<<20))
	must(t, g.Flush())
	must(t, h.Discard(0, 3*block))
	must(t, h.Flush())
	for _, w := range waits {
		must(t, <-w)
	}
}

// TestWriteAtNoWait: where WriteAt waits for space it fails at once, and only there.
func TestWriteAtNoWait(t *testing.T) {
	tp, h := fullPool(t, 8, Options{CommitInterval: time.Hour})
	g := tp.thin(2, 1<<20)
	if _, err := g.WriteAtNoWait(fill(1, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write without waiting to a full pool: %v, want ErrNoSpace", err)
	}
	if n, err := h.WriteAtNoWait(fill(2, 4096), 4096); n != 4096 || err != nil {
		t.Errorf("overwrite in a full pool: %d, %v", n, err)
	}
	must(t, h.Discard(0, block))
	if n, err := g.WriteAtNoWait(fill(1, 4096), 0); n != 4096 || err != nil {
		t.Errorf("write after a discard: %d, %v", n, err)
	}
}

// TestExtentsAreTakenBack: what one device has set aside serves another before the pool is full.
func TestExtentsAreTakenBack(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 64}, Options{ErrorIfNoSpace: true, CommitInterval: time.Hour})
	var hs []*Thin
	for i := range thin.DevID(4) {
		tp.create(i)
		hs = append(hs, tp.thin(i, 64*block))
		write(t, hs[i], fill(byte(i+1), 512), 0)
	}
	for b := int64(1); b <= 60; b++ {
		write(t, hs[0], fill(1, 512), b*block)
	}
	if _, err := hs[0].WriteAt(fill(1, 512), 61*block); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write beyond the last block: %v", err)
	}
	if s := tp.status(); s.DataUsed != 64 || s.DataReserved != 0 {
		t.Errorf("used %d, reserved %d, want 64 and 0", s.DataUsed, s.DataReserved)
	}
}

func TestLowWaterEvent(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 64}, Options{LowWaterMark: 10, CommitInterval: time.Hour})
	events, cancel := tp.p.Events()
	defer cancel()
	tp.create(1)
	h := tp.thin(1, 64*block)
	for b := range int64(53) {
		write(t, h, fill(1, 512), b*block)
	}
	select {
	case e := <-events:
		t.Fatalf("event %+v with 11 blocks free", e)
	default:
	}
	write(t, h, fill(1, 512), 53*block)
	write(t, h, fill(1, 512), 54*block)
	if e := <-events; e.Kind != engine.EventLowWater || !strings.Contains(e.Detail, "10 of 64") {
		t.Errorf("event %+v", e)
	}
	if len(events) != 0 {
		t.Errorf("%d events too many", len(events))
	}
	must(t, h.Discard(0, 20*block))
	must(t, tp.p.Commit(ctx))
	for b := range int64(20) {
		write(t, h, fill(1, 512), b*block)
	}
	if e := <-events; e.Kind != engine.EventLowWater {
		t.Errorf("event %+v after the mark was crossed again", e)
	}
}

// TestMetadataRunsOut fills the metadata device. Writes fail with a clear error, deletes and
// discards work, no commit ever fails.
func TestMetadataRunsOut(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 30000, metaBlocks: 130}, Options{CommitInterval: time.Hour, MaxPending: 500, Logger: quiet})
	tp.create(1)
	h := tp.thin(1, 60000*block)
	var err error
	n := int64(0)
	for ; n < 29000 && err == nil; n++ {
		_, err = h.WriteAt(fill(1, 512), n*2*block)
	}
	if !errors.Is(err, thin.ErrNoMetaSpace) || !errors.Is(err, dev.ErrNoSpace) {
		t.Fatalf("write %d: %v, want ErrNoMetaSpace", n, err)
	}
	if s := tp.status(); s.Mode != "ro" || s.NeedsCheck || s.FailReason != "" {
		t.Errorf("status: %+v", s)
	}
	if n < 1000 {
		t.Errorf("only %d mappings fit into 130 metadata blocks", n)
	}
	must(t, h.Flush())
	write(t, h, fill(2, 512), 0)
	wantBytes(t, h, 2, 512, 0)
	if err := tp.p.CreateSnap(ctx, 2, 1); err != nil && !errors.Is(err, thin.ErrNoMetaSpace) {
		t.Errorf("snapshot: %v", err)
	} else if err == nil {
		must(t, tp.p.Delete(ctx, 2))
	}
	must(t, h.Discard(0, h.Size()/2/block*block))
	must(t, h.Flush())
	if s := tp.status(); s.Mode != "rw" {
		t.Errorf("mode %q after half was discarded", s.Mode)
	}
	write(t, h, fill(3, 512), 0)
	// Growth helps too.
	for err = nil; n < 29000 && err == nil; n++ {
		_, err = h.WriteAt(fill(1, 512), (n%29000)*2*block+block)
	}
	if !errors.Is(err, thin.ErrNoMetaSpace) {
		t.Fatalf("write %d: %v, want ErrNoMetaSpace", n, err)
	}
	must(t, tp.p.GrowMetadata(ctx, 400*4096))
	_, err = h.WriteAt(fill(1, 512), (n%29000)*2*block+block)
	must(t, err)
	h.Close()
	must(t, tp.p.Delete(ctx, 1))
}

// TestHostFull puts the data file on a file system that is smaller than the pool.
func TestHostFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: cannot mount a tmpfs: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	f, err := dev.CreateFile(filepath.Join(dir, "data"), 64<<20, dev.OpenOptions{})
	must(t, err)
	meta := dev.NewMem(4 << 20)
	must(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: block, DataBlocks: 1024}))
	p, err := New(meta, f, Options{CommitInterval: 10 * time.Millisecond, NoSpaceTimeout: 10 * time.Second, Logger: quiet})
	must(t, err)
	defer func() { must(t, p.Close()) }()
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 64 << 20})
	must(t, err)
	defer h.Close()
	write(t, h, fill(1, 3<<20), 0)
	done := make(chan error, 1)
	go func() {
		_, err := h.WriteAt(fill(2, 3<<20), 8<<20)
		done <- err
	}()
	status := func() engine.Status {
		s, err := p.Status(ctx)
		must(t, err)
		return s
	}
	eventually(t, "the write waits for the host", func() bool { return status().Mode == "out_of_data_space" })
	wantBytes(t, h, 1, 3<<20, 0)
	must(t, h.Flush())
	must(t, h.Discard(0, 3<<20))
	must(t, h.Flush())
	must(t, <-done)
	wantBytes(t, h, 2, 3<<20, 8<<20)
	eventually(t, "the pool is well again", func() bool { return status().Mode == "rw" })
}

// TestWaitersSeeTheEnd: closing a device while many of its writes wait ends them all.
func TestWaitersSeeTheEnd(t *testing.T) {
	tp, _ := fullPool(t, 8, still)
	g := tp.thin(2, 4<<20)
	var wg sync.WaitGroup
	for i := range int64(10) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := g.WriteAt(fill(1, 4096), i*block); !errors.Is(err, dev.ErrClosed) {
				t.Errorf("waiting write: %v, want ErrClosed", err)
			}
		}()
	}
	eventually(t, "ten writes wait", func() bool { return tp.status().WaitingForSpace == 10 })
	must(t, g.Close())
	wg.Wait()
}

// TestDiscardedBlocksServeTheNextWrite: what a discard has just freed is found by a write that
// would otherwise fail at once.
func TestDiscardedBlocksServeTheNextWrite(t *testing.T) {
	tp, h := fullPool(t, 8, Options{ErrorIfNoSpace: true, CommitInterval: time.Hour})
	g := tp.thin(2, 8*block)
	from, to := h, g
	for i := range 600 {
		must(t, from.Discard(0, 8*block))
		for b := range int64(8) {
			if _, err := to.WriteAt(fill(byte(i), 512), b*block); err != nil {
				t.Fatalf("round %d, block %d: %v", i, b, err)
			}
		}
		from, to = to, from
	}
}

// TestShortMetadataManyWriters: writes that find too few metadata blocks only because others have
// changes pending wait for a commit; what is refused could not have been done alone either.
func TestShortMetadataManyWriters(t *testing.T) {
	const blocks, writers = 512, 16
	pools := 0
	for meta := int64(48); meta < 88; meta += 2 {
		tp := newPool(t, poolSize{dataBlocks: 4 * blocks, metaBlocks: meta}, Options{CommitInterval: time.Hour, Logger: quiet})
		tp.ownCheckOnly = true
		full := func(err error) bool { return errors.Is(err, thin.ErrNoMetaSpace) }
		if err := tp.p.CreateThin(ctx, 1); full(err) {
			continue // nothing to measure in a pool as small as that
		} else if err != nil {
			t.Fatal(err)
		}
		h, err := tp.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: blocks * tp.bs})
		if err != nil {
			t.Fatal(err)
		}
		_, err = h.WriteAt(make([]byte, blocks*tp.bs), 0)
		h.Close()
		if err == nil {
			err = tp.p.CreateSnap(ctx, 2, 1)
		}
		if full(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if h, err = tp.p.Open(ctx, 2, engine.OpenOptions{SizeBytes: blocks * tp.bs}); err != nil {
			t.Fatal(err)
		}
		pools++
		var wg sync.WaitGroup
		var refused atomic.Bool
		for w := range writers {
			wg.Go(func() {
				for b := int64(w); b < blocks && !refused.Load(); b += writers {
					// Far apart, so that each changes a leaf of its own.
					_, err := h.WriteAtNoWait(make([]byte, 4096), b*37%blocks*tp.bs)
					if err == nil {
						continue
					}
					if !full(err) {
						t.Error(err)
					}
					refused.Store(true)
				}
			})
		}
		wg.Wait()
		if refused.Load() {
			if err := tp.p.commitNow(); err != nil {
				t.Fatal(err)
			}
			if sp := tp.p.meta.Space(); tp.p.meta.CanAdmit(1, false) {
				t.Errorf("%d metadata blocks: a write was refused with %d free, %d of them kept, which are enough for one", meta, sp.MetaFree, sp.MetaReserve)
			}
		}
		h.Close()
		tp.close()
	}
	if pools < 5 {
		t.Errorf("%d pools had room for a snapshot, want 5 at least", pools)
	}
}

// TestDeleteGivesWay: a delete rests where others flush, but not while writes wait for its space.
func TestDeleteGivesWay(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{})
	tp.create(1)
	h, err := tp.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: block})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	flushes := tp.p.flushes.Load()
	if tp.p.giveWay(&flushes) {
		t.Error("it rests for nobody")
	}
	for range 2 {
		if err := h.Flush(); err != nil {
			t.Fatal(err)
		}
		if !tp.p.giveWay(&flushes) {
			t.Error("it does not rest though others flush")
		}
	}
	if err := h.Flush(); err != nil {
		t.Fatal(err)
	}
	tp.p.outOfSpace.Store(true)
	if tp.p.giveWay(&flushes) {
		t.Error("it rests while writes wait for space")
	}
	tp.p.outOfSpace.Store(false)
}
