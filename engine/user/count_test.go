package user

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// still is for tests that count requests: nothing happens unless asked for.
var still = Options{CommitInterval: time.Hour}

// counting returns what do costs on the data and on the metadata device.
func (tp *testPool) counting(do func()) (data, meta dev.OpCounts) {
	tp.t.Helper()
	d, m := tp.data.Counts(), tp.meta.Counts()
	do()
	return tp.data.Counts().Sub(d), tp.meta.Counts().Sub(m)
}

func TestCostOfBreakingSharing(t *testing.T) {
	for _, c := range []struct {
		name   string
		off, n int64
		want   dev.OpCounts
	}{
		{"inside", 5000, 1000, dev.OpCounts{Reads: 1, Writes: 1}},
		{"beginning", 0, 4096, dev.OpCounts{Reads: 1, Writes: 1}},
		{"end", 60 << 10, 4096, dev.OpCounts{Reads: 1, Writes: 1}},
		{"whole block", 0, 64 << 10, dev.OpCounts{Writes: 1}},
		{"four whole blocks", 0, 256 << 10, dev.OpCounts{Writes: 1}},
		{"one and two halves", 32 << 10, 128 << 10, dev.OpCounts{Reads: 2, Writes: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			tp := newPool(t, poolSize{}, still)
			tp.create(1)
			h := tp.thin(1, 1<<20)
			write(t, h, fill('o', 1<<20), 0)
			tp.snap(2, 1)
			got, _ := tp.counting(func() { write(t, h, fill('n', c.n), c.off) })
			if got != c.want {
				t.Errorf("write of %d bytes at %d cost %+v, want %+v", c.n, c.off, got, c.want)
			}
			got, _ = tp.counting(func() { write(t, h, fill('m', c.n), c.off) })
			if got.Reads != 0 {
				t.Errorf("second write cost %+v: no read", got)
			}
			wantBytes(t, h, 'm', c.n, c.off)
			if c.off > 0 {
				wantBytes(t, h, 'o', c.off, 0)
			}
			wantBytes(t, h, 'o', 1<<20-c.off-c.n, c.off+c.n)
			s := tp.thin(2, 1<<20)
			wantBytes(t, s, 'o', 1<<20, 0)
		})
	}
}

func TestCostOfProvisioning(t *testing.T) {
	for _, c := range []struct {
		name   string
		dirty  bool // the data device is not known to be zero
		opts   Options
		off, n int64
		want   dev.OpCounts
	}{
		{"known zero, part", false, still, 5000, 1000, dev.OpCounts{Writes: 1}},
		{"known zero, run", false, still, 5000, 500 << 10, dev.OpCounts{Writes: 1}},
		{"old data, part", true, still, 5000, 1000, dev.OpCounts{Writes: 1}},
		{"old data, whole", true, still, 64 << 10, 256 << 10, dev.OpCounts{Writes: 1}},
		{"old data, head and tail", true, still, 32 << 10, 256 << 10, dev.OpCounts{Writes: 3}},
		{"old data, not zeroed", true, Options{CommitInterval: time.Hour, SkipBlockZeroing: true}, 32 << 10, 256 << 10, dev.OpCounts{Writes: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			tp := newPool(t, poolSize{}, c.opts)
			if c.dirty {
				tp.close()
				old := dev.NewMem(tp.dataMem.Size())
				write(t, old, fill('x', 2<<20), 0)
				tp.dataMem = old
				tp.open()
			}
			tp.create(1)
			h := tp.thin(1, 1<<20)
			got, m := tp.counting(func() { write(t, h, fill('n', c.n), c.off) })
			if got != c.want || m != (dev.OpCounts{}) {
				t.Errorf("cost %+v on data, %+v on metadata, want %+v and nothing", got, m, c.want)
			}
			wantBytes(t, h, 'n', c.n, c.off)
			if !c.opts.SkipBlockZeroing {
				wantBytes(t, h, 0, c.off, 0)
				wantBytes(t, h, 0, 1<<20-c.off-c.n, c.off+c.n)
			}
		})
	}
}

// TestContiguousRuns writes in sequence to several devices at once, in small requests; what is
// read back afterwards must lie in long runs.
func TestContiguousRuns(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 4096}, still)
	const devs, size = 4, 16 << 20
	var hs []*Thin
	for i := range thin.DevID(devs) {
		tp.create(i)
		hs = append(hs, tp.thin(i, size))
	}
	for off := int64(0); off < size; off += 64 << 10 {
		for _, h := range hs {
			write(t, h, fill(byte(off>>16), 64<<10), off)
		}
	}
	for i, h := range hs {
		got, _ := tp.counting(func() {
			for off := int64(0); off < size; off += 1 << 20 {
				read(t, h, 1<<20, off)
			}
		})
		if got.Reads > 16+6 { // one a request, and the seams of the extents
			t.Errorf("thin %d: 16 reads of 1 MiB cost %d reads", i, got.Reads)
		}
		got, _ = tp.counting(func() { write(t, h, fill(9, 1<<20), 2<<20) })
		if got.Writes > 2 || got.Reads > 0 {
			t.Errorf("thin %d: an overwrite of 1 MiB cost %+v", i, got)
		}
	}
	// Requests that arrive out of order within a window.
	tp.create(9)
	h := tp.thin(9, size)
	for off := int64(0); off < size; off += 512 << 10 {
		for _, k := range []int64{3, 1, 0, 2} {
			write(t, h, fill(1, 128<<10), off+k*128<<10)
		}
	}
	got, _ := tp.counting(func() {
		for off := int64(0); off < size; off += 1 << 20 {
			read(t, h, 1<<20, off)
		}
	})
	if got.Reads > 16*3 {
		t.Errorf("written out of order: 16 reads of 1 MiB cost %d reads", got.Reads)
	}
}

func TestCostOfFlush(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	tp.create(2)
	a, b := tp.thin(1, 1<<20), tp.thin(2, 1<<20)
	flush := func(h *Thin) func() { return func() { must(t, h.Flush()) } }
	expect := func(what string, do func(), syncs, metaFlushes, commits int64) {
		t.Helper()
		before := tp.status()
		d, m := tp.counting(do)
		after := tp.status()
		if d.Flushes != syncs || m.Flushes != metaFlushes || int64(after.Commits-before.Commits) != commits {
			t.Errorf("%s: %d data syncs, %d metadata flushes, %d commits, want %d, %d, %d", what,
				d.Flushes, m.Flushes, after.Commits-before.Commits, syncs, metaFlushes, commits)
		}
		if metaFlushes == 0 && m.Writes != 0 {
			t.Errorf("%s: %d metadata writes, want none", what, m.Writes)
		}
		if got := int64(after.DataFlushes - before.DataFlushes); got != syncs {
			t.Errorf("%s: status counts %d data syncs, want %d", what, got, syncs)
		}
	}
	expect("flush of an untouched device", flush(a), 0, 0, 0)
	write(t, a, fill(1, 4096), 0)
	expect("flush of another device", flush(b), 1, 0, 0)
	expect("flush after provisioning, and another's flush", flush(a), 0, 2, 1)
	write(t, a, fill(2, 4096), 128<<10)
	expect("flush after provisioning", flush(a), 1, 2, 1)
	expect("flush again", flush(a), 0, 0, 0)
	write(t, a, fill(2, 4096), 0)
	expect("flush after an overwrite", flush(a), 1, 0, 0)
	expect("snapshot", func() { tp.snap(3, 1) }, 0, 2, 1)
	expect("second snapshot", func() { tp.snap(4, 1) }, 0, 2, 1)
	write(t, a, fill(2, 4096), 64<<10)
	expect("snapshot with pending writes", func() { tp.snap(5, 1) }, 1, 2, 1)
	expect("flush after the snapshot", flush(a), 0, 0, 0)
	expect("ten forks", func() {
		var pairs []engine.SnapPair
		for i := range thin.DevID(10) {
			pairs = append(pairs, engine.SnapPair{ID: 10 + i, Origin: 1})
		}
		must(t, tp.p.CreateSnaps(ctx, pairs))
	}, 0, 2, 1)
	expect("delete", func() { must(t, tp.p.Delete(ctx, 10)) }, 0, 2, 1)
	expect("transaction id", func() { must(t, tp.p.SetTransactionID(ctx, 0, 5)) }, 0, 2, 1)
	must(t, a.Discard(0, 1<<20))
	expect("flush after a discard", flush(a), 0, 2, 1)
}

// TestTimeRisesOnlyWhenNeeded: snapshots of an idle origin cost no step of the pool's clock.
func TestTimeRisesOnlyWhenNeeded(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 4096), 0)
	tp.snap(2, 1)
	base := tp.status().Time
	for i := range thin.DevID(20) {
		tp.snap(10+i, 1)
	}
	if now := tp.status().Time; now != base {
		t.Errorf("20 snapshots of an idle device raised the time from %d to %d", base, now)
	}
	write(t, h, fill(2, 4096), 0) // breaks sharing at the present time
	tp.snap(50, 1)
	if now := tp.status().Time; now != base+1 {
		t.Errorf("a snapshot after a write raised the time from %d to %d, want one step", base, now)
	}
	write(t, h, fill(3, 4096), 0)
	wantBytes(t, tp.thin(50, 1<<20), 2, 4096, 0)
	wantBytes(t, tp.thin(29, 1<<20), 1, 4096, 0)
}

// TestFlushesShareCommits holds one commit up; all flushes that arrive meanwhile share the next.
func TestFlushesShareCommits(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	const devs = 16
	var hs []*Thin
	for i := range thin.DevID(devs) {
		tp.create(i)
		hs = append(hs, tp.thin(i, 1<<20))
	}
	for _, h := range hs {
		write(t, h, fill(1, 4096), 0)
	}
	held, release := make(chan struct{}), make(chan struct{})
	tp.data.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { close(held); <-release }})
	before := tp.p.commits.writes.Load()
	var wg sync.WaitGroup
	errs := make([]error, devs)
	flush := func(i int) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = hs[i].Flush()
		}()
	}
	flush(0)
	<-held
	for i := range devs { // changes that the commit under way does not hold
		write(t, hs[i], fill(2, 4096), 512<<10)
	}
	for i := 1; i < devs; i++ {
		flush(i)
	}
	eventually(t, "flushes wait for the commit under way", func() bool {
		tp.p.commits.mu.Lock()
		defer tp.p.commits.mu.Unlock()
		return tp.p.commits.running
	})
	time.Sleep(20 * time.Millisecond) // lets them arrive; late ones would only cost a commit more
	close(release)
	wg.Wait()
	must(t, errors.Join(errs...))
	if n := tp.p.commits.writes.Load() - before; n != 2 {
		t.Errorf("%d flushes during a commit cost %d commits, want 2 with the first", devs, n)
	}
}

// TestFlushWaitsForCommitUnderWay: a flush without newer changes must not return before the
// commit that holds its device's mappings.
func TestFlushWaitsForCommitUnderWay(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	for id := range thin.DevID(3) {
		tp.create(id)
	}
	a, b, c := tp.thin(0, 1<<20), tp.thin(1, 1<<20), tp.thin(2, 1<<20)
	write(t, a, fill(1, 4096), 0)
	write(t, b, fill(1, 4096), 0)
	held, release := make(chan struct{}), make(chan struct{})
	tp.meta.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { close(held); <-release }})
	aDone, bDone := make(chan error, 1), make(chan error, 1)
	before := tp.data.Counts().Flushes
	go func() { aDone <- a.Flush() }()
	<-held
	// The commit's data sync is over; the flush of a device that was written since needs another.
	eventually(t, "the commit's data sync is done", func() bool {
		tp.p.data.syncs.mu.Lock()
		defer tp.p.data.syncs.mu.Unlock()
		return !tp.p.data.syncs.running && tp.data.Counts().Flushes > before
	})
	write(t, b, fill(3, 4096), 0)
	syncs := tp.data.Counts().Flushes
	go func() { bDone <- b.Flush() }()
	eventually(t, "the flush has synced the data", func() bool { return tp.data.Counts().Flushes > syncs })
	must(t, c.Flush()) // a third device without changes is not concerned
	select {
	case err := <-bDone:
		t.Fatalf("flush returned (%v) while the commit that holds its mapping is under way", err)
	case <-time.After(30 * time.Millisecond):
	}
	// New writes do not wait for the commit.
	write(t, a, fill(2, 4096), 512<<10)
	close(release)
	must(t, <-aDone)
	must(t, <-bDone)
}

func TestCommitTriggers(t *testing.T) {
	t.Run("after a while", func(t *testing.T) {
		tp := newPool(t, poolSize{}, Options{CommitInterval: 2 * time.Millisecond})
		tp.create(1)
		h := tp.thin(1, 1<<20)
		before := tp.p.commits.writes.Load()
		write(t, h, fill(1, 4096), 0)
		eventually(t, "commit after the interval", func() bool { return tp.p.commits.writes.Load() > before && tp.p.pending.Load() == 0 })
	})
	t.Run("many pending", func(t *testing.T) {
		tp := newPool(t, poolSize{}, Options{CommitInterval: time.Hour, MaxPending: 10})
		tp.create(1)
		h := tp.thin(1, 64<<20)
		before := tp.p.commits.writes.Load()
		for i := range int64(200) {
			write(t, h, fill(1, 512), i*64<<10)
			if n := tp.p.pending.Load(); n > 2*10+maxRun {
				t.Fatalf("%d mappings are pending", n)
			}
		}
		eventually(t, "commit at the bound", func() bool { return tp.p.commits.writes.Load() > before })
	})
}

// TestSnapshotCostIsFlat: however much is mapped and however many snapshots there are.
func TestSnapshotCostIsFlat(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 8192}, still)
	var written atomic.Int64
	tp.meta.Add(dev.Rule{Ops: dev.OpWrite, Pass: true, Before: func(_ dev.Op, _, n int64) { written.Add(n / 4096) }})
	snap := func(id, origin thin.DevID) string {
		t.Helper()
		before := written.Load()
		d, m := tp.counting(func() { tp.snap(id, origin) })
		blocks := written.Load() - before
		if d != (dev.OpCounts{}) || m.Reads != 0 || m.Flushes != 2 || blocks > 12 {
			t.Errorf("a snapshot cost %+v on data, %+v on metadata and %d of its blocks; want nothing, no read, 2 flushes, 12 at most", d, m, blocks)
		}
		return fmt.Sprintf("%d metadata blocks", blocks)
	}
	var costs []string
	for i, blocks := range []int64{1, 500, 7000} {
		id := thin.DevID(10000 * (i + 1))
		tp.create(id)
		h := tp.thin(id, 8192*64<<10)
		for b := range blocks {
			write(t, h, fill(1, 512), b*64<<10)
		}
		must(t, tp.p.Commit(ctx))
		costs = append(costs, snap(id+1, id))
		if blocks > 500 { // and many snapshots, until the tree of devices is deeper
			for k := range thin.DevID(500) {
				last := snap(id+2+k, id)
				if k == 499 {
					t.Logf("the 500th snapshot: %s, the first ones %q", last, costs)
				}
			}
		}
		h.Close()
		if blocks <= 500 {
			must(t, tp.p.Delete(ctx, id))
			must(t, tp.p.Delete(ctx, id+1))
		}
		must(t, tp.p.Commit(ctx))
	}
	for _, c := range costs[1:] {
		if c != costs[0] {
			t.Errorf("first snapshots of 1, 500 and 7,000 blocks cost %q", costs)
		}
	}
}
