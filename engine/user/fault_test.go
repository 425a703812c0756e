package user

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var errIO = errors.New("input/output error of the test")

// A faultModel keeps, for each device, what reads must return, and what a reopened pool must hold.
// Ranges of failed requests are unknown.
type faultModel struct {
	img     map[thin.DevID]*image
	durable map[thin.DevID]*image
	unknown map[thin.DevID]map[int64]bool // blocks that a failed request touched
	touched map[thin.DevID]map[int64]bool // blocks changed since durable
}

// TestEveryRequestFails fails the n-th read, write, flush or discard of the data and of the
// metadata device, once or for ever, under a fixed load, for every n.
func TestEveryRequestFails(t *testing.T) {
	seed := testSeed(t)
	for _, c := range []struct {
		name string
		meta bool
		ops  dev.Op
	}{
		{"data reads", false, dev.OpRead},
		{"data writes", false, dev.OpWrite},
		{"data flushes", false, dev.OpFlush},
		{"data discards", false, dev.OpDiscard},
		{"metadata reads", true, dev.OpRead},
		{"metadata writes", true, dev.OpWrite},
		{"metadata flushes", true, dev.OpFlush},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, times := range []int{1, 0} {
				hit := true
				n := 0
				for ; hit && n < 400; n += slow {
					hit = faultRun(t, c.meta, dev.Rule{Ops: c.ops, Skip: n, Times: times, Err: errIO}, seed)
					if t.Failed() {
						t.Fatalf("seed %d, %s: request %d, times %d", seed, c.name, n, times)
					}
				}
				t.Logf("%s, times %d: up to request %d", c.name, times, n)
			}
		})
	}
}

// faultRun runs the load with one rule and reports whether a request failed.
func faultRun(t *testing.T, onMeta bool, r dev.Rule, seed uint64) bool {
	var hit atomic.Bool
	const size = 10*block + 4096
	tp := newPool(t, poolSize{dataBlocks: 320, metaBlocks: 512}, Options{CommitInterval: time.Hour, ErrorIfNoSpace: true,
		Logger: quiet, TableCacheBytes: 1, MetaCacheBytes: 1})
	tp.dirty, tp.ownCheckOnly = true, true
	m := faultModel{map[thin.DevID]*image{}, map[thin.DevID]*image{}, map[thin.DevID]map[int64]bool{}, map[thin.DevID]map[int64]bool{}}
	open := map[thin.DevID]engine.Thin{}
	target := tp.data
	if onMeta {
		target = tp.meta
	}
	rng := rand.New(rand.NewPCG(seed, 7))
	r.Before = func(dev.Op, int64, int64) { hit.Store(true) }
	target.Add(r)

	failed := func() bool { return tp.p.failed() != nil }
	known := func(id thin.DevID, off, n int64) bool {
		for b := off / block; b*block < off+n; b++ {
			if m.unknown[id][b] {
				return false
			}
		}
		return true
	}
	spoil := func(id thin.DevID, off, n int64) {
		for b := off / block; b*block < off+n; b++ {
			m.unknown[id][b] = true
		}
	}
	durable := func(ids ...thin.DevID) {
		for _, id := range ids {
			m.durable[id] = m.img[id].clone()
			m.touched[id] = map[int64]bool{}
		}
	}
	verify := func(p *Pool, id thin.DevID, img *image, untouched bool) {
		t.Helper()
		h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
		if err != nil {
			t.Errorf("open thin %d afterwards: %v", id, err)
			return
		}
		defer h.Close()
		got, want := make([]byte, block), make([]byte, block)
		for off := int64(0); off < size; off += block {
			n := min(block, size-off)
			if !known(id, off, n) || untouched && m.touched[id][off/block] {
				continue
			}
			if _, err := h.ReadAt(got[:n], off); err != nil {
				t.Errorf("read afterwards: %v", err)
				return
			}
			img.read(want[:n], off)
			if string(got[:n]) != string(want[:n]) {
				t.Errorf("thin %d, block %d differs", id, off/block)
				return
			}
		}
	}

	ids := []thin.DevID{1, 2}
	maybe := map[thin.DevID]bool{} // devices whose creation failed: they may be there
	for _, id := range ids {
		m.img[id], m.unknown[id] = newImage(size), map[int64]bool{}
		if err := tp.p.CreateThin(ctx, id); err != nil {
			maybe[id] = true
			continue
		}
		durable(id)
		if h, err := tp.p.Open(ctx, id, engine.OpenOptions{SizeBytes: size}); err == nil {
			open[id] = h
		}
	}
	next := thin.DevID(3)
	buf := make([]byte, size)
	for i := range 150 {
		id := ids[rng.IntN(2)]
		h := open[id]
		off := rng.Int64N(size/512) * 512
		n := min(size-off, 512*(1+rng.Int64N(200)))
		k, c := rng.IntN(10), byte(rng.IntN(255)+1)
		if h == nil {
			continue
		}
		wasFailed := failed()
		var err error
		if k == 1 || k > 3 {
			for b := off / block; b*block < off+n; b++ {
				m.touched[id][b] = true
			}
		}
		switch k {
		case 0:
			err = h.Flush()
			if err == nil {
				durable(id)
			}
			if err == nil && wasFailed {
				t.Errorf("operation %d: a flush succeeded after the pool had failed", i)
			}
			if err != nil && !errors.Is(err, engine.ErrFailed) {
				t.Errorf("operation %d: flush: %v, want ErrFailed", i, err)
			}
		case 1:
			if err = h.WriteZeroes(off, n, false); err == nil {
				m.img[id].zero(off, n)
			} else {
				spoil(id, off, n)
			}
		case 2:
			s := next
			next++
			if err = tp.p.CreateSnap(ctx, s, id); err != nil {
				maybe[s] = true
			} else {
				m.img[s], m.unknown[s] = m.img[id].clone(), map[int64]bool{}
				for b := range m.unknown[id] {
					m.unknown[s][b] = true
				}
				durable(s, id)
			}
			if err == nil && wasFailed {
				t.Errorf("operation %d: a snapshot succeeded after the pool had failed", i)
			}
		case 3:
			if _, err = h.ReadAt(buf[:n], off); err == nil && known(id, off, n) {
				want := make([]byte, n)
				m.img[id].read(want, off)
				if string(want) != string(buf[:n]) {
					t.Errorf("operation %d: read %d +%d of thin %d differs", i, off, n, id)
				}
			}
		case 4:
			begin, end := (off+block-1)/block*block, (off+n)/block*block
			if err = h.Discard(off, n); err == nil && begin < end {
				m.img[id].zero(begin, end-begin)
			} else if begin < end {
				spoil(id, begin, end-begin)
			}
		default:
			p := fill(c, n)
			if _, err = h.WriteAt(p, off); err == nil {
				m.img[id].write(p, off)
			} else {
				spoil(id, off, n)
			}
			if err == nil && wasFailed {
				t.Errorf("operation %d: a write succeeded after the pool had failed", i)
			}
		}
		if err != nil && !hit.Load() {
			t.Errorf("operation %d failed before the fault: %v", i, err)
		}
	}
	// Reads go on as if nothing had happened, once the device reads again.
	target.Clear()
	for _, h := range open {
		must(t, h.Close())
	}
	if !failed() {
		for id := range m.img {
			if !maybe[id] {
				verify(tp.p, id, m.img[id], false)
			}
		}
	}
	status := tp.status()
	wasFailed := failed()
	if wasFailed && (status.Mode != "ro" || status.FailReason == "") {
		t.Errorf("status of a failed pool: %+v", status)
	}
	err := tp.p.Close()
	tp.p = nil
	if wasFailed && !errors.Is(err, engine.ErrFailed) {
		t.Errorf("close of a failed pool: %v, want ErrFailed", err)
	}
	if !wasFailed {
		must(t, err)
		for id := range m.img {
			durable(id)
		}
	}
	// What was durable is there, and says that it needs a check if that could be written.
	tp.check()
	tp.opts.ReadOnly = true
	tp.open()
	if wasFailed && !tp.p.meta.NeedsCheck() && !(onMeta && r.Times == 0) {
		t.Errorf("a failed pool is not marked needs_check")
	}
	for id, img := range m.durable {
		if !maybe[id] {
			verify(tp.p, id, img, wasFailed)
		}
	}
	tp.close()
	return hit.Load()
}

// TestFailureIsFinal: after one failed sync, no flush of any device succeeds, though the device
// works again; reads do; a reopened pool is read-only until it has been checked.
func TestFailureIsFinal(t *testing.T) {
	for _, c := range []struct {
		name string
		meta bool
		ops  dev.Op
	}{{"data sync", false, dev.OpFlush}, {"metadata write", true, dev.OpWrite}, {"metadata flush", true, dev.OpFlush}} {
		t.Run(c.name, func(t *testing.T) {
			tp := newPool(t, poolSize{}, Options{CommitInterval: time.Hour, Logger: quiet})
			tp.dirty = true
			tp.create(1)
			tp.create(2)
			a, b := tp.thin(1, 1<<20), tp.thin(2, 1<<20)
			write(t, a, fill(1, 8192), 0)
			write(t, b, fill(2, 8192), 0)
			must(t, a.Flush())
			must(t, b.Flush())
			write(t, a, fill(3, 8192), 512<<10)
			events, cancel := tp.p.Events()
			defer cancel()
			target := tp.data
			if c.meta {
				target = tp.meta
			}
			target.Add(dev.Rule{Ops: c.ops, Times: 1, Err: errIO})
			if err := a.Flush(); !errors.Is(err, engine.ErrFailed) || !errors.Is(err, errIO) {
				t.Fatalf("flush: %v, want ErrFailed and the cause", err)
			}
			if e := <-events; e.Kind != engine.EventMode {
				t.Errorf("event %+v", e)
			}
			for i := range 3 {
				for _, h := range []*Thin{a, b} {
					if err := h.Flush(); !errors.Is(err, engine.ErrFailed) {
						t.Fatalf("flush %d after the failure: %v", i, err)
					}
				}
			}
			if err := tp.p.Commit(ctx); !errors.Is(err, engine.ErrFailed) {
				t.Errorf("commit: %v", err)
			}
			for what, err := range map[string]error{
				"create":   tp.p.CreateThin(ctx, 9),
				"snapshot": tp.p.CreateSnap(ctx, 9, 1),
				"delete":   tp.p.Delete(ctx, 9),
				"grow":     tp.p.GrowData(ctx, 1<<30),
			} {
				if !errors.Is(err, engine.ErrFailed) || !errors.Is(err, dev.ErrReadOnly) {
					t.Errorf("%s: %v, want ErrFailed and ErrReadOnly", what, err)
				}
			}
			if _, err := a.WriteAt([]byte{1}, 0); !errors.Is(err, engine.ErrFailed) {
				t.Errorf("write: %v", err)
			}
			wantBytes(t, a, 1, 8192, 0)
			wantBytes(t, a, 3, 8192, 512<<10)
			wantBytes(t, b, 2, 8192, 0)
			a.Close()
			b.Close()
			tp.close()
			tp.open() // marked needs_check: read-only
			if s := tp.status(); s.Mode != "ro" || !s.NeedsCheck {
				t.Errorf("after reopening: %+v", s)
			}
			a = tp.thin(1, 1<<20)
			wantBytes(t, a, 1, 8192, 0)
			if _, err := a.WriteAt([]byte{1}, 700<<10); !errors.Is(err, thin.ErrNeedsCheck) {
				t.Errorf("provisioning in a pool that needs a check: %v", err)
			}
			if err := tp.p.CreateThin(ctx, 9); !errors.Is(err, thin.ErrNeedsCheck) {
				t.Errorf("create in a pool that needs a check: %v", err)
			}
			a.Close()
			tp.close()
			if _, err := thin.Check(tp.metaMem.Clone(), thin.CheckOptions{}); err != nil {
				t.Error(err)
			}
			tp.metaMem = tp.metaMem.Clone()
			rep, err := thin.Check(tp.metaMem, thin.CheckOptions{ClearNeedsCheck: true})
			must(t, err)
			if !rep.NeedsCheckCleared {
				t.Fatalf("needs_check was not cleared: %+v", rep)
			}
			tp.metaMem = reopenable(tp.metaMem)
			tp.open()
			tp.create(9)
		})
	}
}

// reopenable returns a device with the same contents that is not closed.
func reopenable(m *dev.Mem) *dev.Mem { return m.Clone() }

// TestFailedWriteLeavesNoTrace: a write whose block could not be prepared is not seen by readers,
// and its block is not lost.
func TestFailedWriteLeavesNoTrace(t *testing.T) {
	for i, r := range []dev.Rule{
		{Ops: dev.OpWrite, Times: 1, Err: errIO},
		{Ops: dev.OpRead, Times: 1, Err: errIO},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			tp := newPool(t, poolSize{dataBlocks: 40}, Options{CommitInterval: time.Hour, ErrorIfNoSpace: true})
			tp.create(1)
			h := tp.thin(1, 4<<20)
			write(t, h, fill(1, 16*block), 0)
			tp.snap(2, 1)
			tp.data.Add(r)
			if _, err := h.WriteAt(fill(2, 4096), 4096); !errors.Is(err, errIO) {
				t.Fatalf("write: %v, want the fault", err)
			}
			wantBytes(t, h, 1, 16*block, 0)
			for b := range int64(16) { // all blocks are still there to be used
				write(t, h, fill(3, 4096), b*block)
			}
			for b := int64(20); b < 28; b++ {
				write(t, h, fill(4, 4096), b*block)
			}
			if _, err := h.WriteAt(fill(5, 4096), 30*block); !errors.Is(err, dev.ErrNoSpace) {
				t.Errorf("write to block 41 of 40: %v", err)
			}
			if p := tp.p.pending.Load(); p != 0 { // the write that found no block has committed
				t.Errorf("%d changes are still admitted", p)
			}
		})
	}
}

// TestMetadataReadFails: a lookup that cannot read the tree fails its request and nothing else.
func TestMetadataReadFails(t *testing.T) {
	tp := newPool(t, poolSize{dataBlocks: 4096}, Options{CommitInterval: time.Hour, TableCacheBytes: 1, MetaCacheBytes: 1})
	tp.create(1)
	h := tp.thin(1, 4096*block)
	for b := int64(0); b < 4096; b += 3 {
		write(t, h, fill(byte(b/3), 512), b*block)
	}
	h.Close()
	tp.reopen()
	h = tp.thin(1, 4096*block)
	tp.meta.Add(dev.Rule{Ops: dev.OpRead, Err: errIO})
	p := make([]byte, 512)
	if _, err := h.ReadAt(p, 3000*block); !errors.Is(err, errIO) {
		t.Errorf("read: %v, want the fault", err)
	}
	if _, err := h.WriteAt(p, 3000*block); !errors.Is(err, errIO) {
		t.Errorf("write: %v, want the fault", err)
	}
	if err := h.Discard(0, h.Size()); !errors.Is(err, errIO) {
		t.Errorf("discard: %v, want the fault", err)
	}
	tp.meta.Clear()
	for b := int64(0); b < 4096; b += 3 {
		wantBytes(t, h, byte(b/3), 512, b*block)
	}
	write(t, h, p, 3000*block)
	must(t, h.Flush())
}
