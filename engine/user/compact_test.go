package user

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	metablock "mica/pdata/block"
	"mica/thin"
)

// TestModelCompacting runs the model on a pool whose time is compacted as often as can be.
func TestModelCompacting(t *testing.T) {
	seed := testSeed(t)
	runModel(t, modelConfig{64 << 10, Options{CommitInterval: time.Millisecond, compactAt: 2}, 1, 24*64<<10 + 512}, 6000/slow, seed)
	runModel(t, modelConfig{64 << 10, Options{CommitInterval: time.Hour, TableCacheBytes: 1, compactAt: 2}, 1, 1100 * 64 << 10}, 3000/slow, seed+1)
}

// TestSnapshotsHoldPrefixesCompacting: snapshots are of a moment also when each compacts the time.
func TestSnapshotsHoldPrefixesCompacting(t *testing.T) {
	snapshotsHoldPrefixes(t, Options{CommitInterval: 3 * time.Millisecond, compactAt: 2})
}

// setTime sets the time of a closed pool.
func setTime(t *testing.T, d dev.Device, time uint32) {
	t.Helper()
	b := make([]byte, metablock.Size)
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	sb := thin.DecodeSuperblock(b)
	sb.Time = time
	sb.Encode(b)
	metablock.Seal(b, 0, metablock.Superblock)
	if _, err := d.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// TestTimeAtItsEnd: a pool whose time stands at 2^24 - 2 goes on taking snapshots. Afterwards a
// device's own blocks are written in place and shared ones are copied, exactly as before.
func TestTimeAtItsEnd(t *testing.T) {
	const bs, blocks = 64 << 10, 16
	tp := newPool(t, poolSize{}, Options{Logger: quiet})
	tp.create(1)
	h := tp.thin(1, blocks*bs)
	fill := func(h *Thin, vb int64, c byte) {
		t.Helper()
		_, err := h.WriteAt(bytes.Repeat([]byte{c}, bs), vb*bs)
		must(t, err)
	}
	used := func() uint64 { t.Helper(); return tp.status().DataUsed }
	for vb := range int64(8) {
		fill(h, vb, 'a')
	}
	must(t, tp.p.CreateSnap(ctx, 2, 1))
	for vb := range int64(4) { // its own since the snapshot
		fill(h, vb, 'b')
	}
	must(t, h.Close())
	tp.close()
	tp.metaMem = tp.metaMem.Clone()
	setTime(t, tp.metaMem, thin.MaxTime-2)
	tp.open()
	h = tp.thin(1, blocks*bs)
	other := tp.thin(2, blocks*bs)
	fill(h, 9, 'c') // at the last time but one

	// The time cannot reach its end: sixty snapshots, each with a write before it.
	for i := range 60 {
		must(t, tp.p.CreateSnap(ctx, thin.DevID(10+i), 1))
		fill(h, 9, byte('A'+i))
	}
	st := tp.status()
	if st.Time < 60 || st.Time > 300 {
		t.Errorf("time %d", st.Time)
	}
	// Thin 1 shares everything but block 9 with its last snapshot; thin 2 shares blocks 4 to 7, and
	// takes the others, which thin 1 has copied, for shared, as it did before.
	before := used()
	_, err := h.WriteAt([]byte("own"), 9*bs)
	must(t, err)
	if n := used(); n != before {
		t.Errorf("a write to an own block took %d blocks", n-before)
	}
	_, err = h.WriteAt([]byte("shared"), 4*bs)
	must(t, err)
	if n := used(); n != before+1 {
		t.Errorf("a write to a shared block took %d blocks", n-before)
	}
	_, err = other.WriteAt([]byte("other"), 5*bs)
	must(t, err)
	if n := used(); n != before+2 {
		t.Errorf("a write to a shared block of the other took %d blocks", n-before-1)
	}
	p := make([]byte, bs)
	for i, want := range map[thin.DevID]byte{10: 'c', 11: 'A', 40: 'A' + 29} {
		s, err := tp.p.Open(ctx, i, engine.OpenOptions{SizeBytes: blocks * bs, ReadOnly: true})
		must(t, err)
		for vb, c := range map[int64]byte{0: 'b', 4: 'a', 9: want} {
			_, err = s.ReadAt(p, vb*bs)
			must(t, err)
			if !bytes.Equal(p, bytes.Repeat([]byte{c}, bs)) {
				t.Errorf("thin %d block %d begins with %q, want %q", i, vb, p[:8], c)
			}
		}
		must(t, s.Close())
	}
	must(t, h.Close())
	must(t, other.Close())
	tp.reopen()
}

// TestTimeAtItsEndHeld: a metadata snapshot is in the way of a compaction; the error says so, and
// after its release everything goes on.
func TestTimeAtItsEndHeld(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{Logger: quiet})
	tp.create(1)
	h := tp.thin(1, 1<<20)
	_, err := h.WriteAt([]byte("x"), 0)
	must(t, err)
	must(t, tp.p.ReserveMetadataSnap(ctx))
	must(t, h.Close())
	tp.close()
	tp.metaMem = tp.metaMem.Clone()
	setTime(t, tp.metaMem, thin.MaxTime-1)
	tp.open()
	h = tp.thin(1, 1<<20)
	_, err = h.WriteAt([]byte("y"), 1<<19)
	must(t, err)
	err = tp.p.CreateSnap(ctx, 2, 1)
	if !errors.Is(err, thin.ErrTime) || !errors.Is(err, thin.ErrExists) {
		t.Errorf("%v", err)
	}
	must(t, tp.p.ReleaseMetadataSnap(ctx))
	must(t, tp.p.CreateSnap(ctx, 2, 1))
	if s := tp.status(); s.Time > 3 || s.Mode != "rw" {
		t.Errorf("%+v", s)
	}
	must(t, h.Close())
}

// TestCompactionFails: an I/O error in the middle fails the pool as any failed commit does, and
// what is on the medium is sound.
func TestCompactionFails(t *testing.T) {
	for skip := range 6 {
		tp := newPool(t, poolSize{}, Options{Logger: quiet, CommitInterval: time.Hour})
		tp.create(1)
		h := tp.thin(1, 4<<20)
		for vb := range int64(40) {
			_, err := h.WriteAt([]byte("x"), vb*64<<10)
			must(t, err)
		}
		must(t, h.Close())
		tp.close()
		tp.metaMem = tp.metaMem.Clone()
		setTime(t, tp.metaMem, thin.MaxTime-1)
		tp.open()
		tp.dirty = true
		h = tp.thin(1, 4<<20)
		_, err := h.WriteAt([]byte("y"), 3<<20)
		must(t, err)
		tp.meta.Add(dev.Rule{Ops: dev.OpWrite | dev.OpFlush, Skip: skip})
		err = tp.p.CreateSnap(ctx, 2, 1)
		if !errors.Is(err, engine.ErrFailed) {
			t.Errorf("skip %d: %v", skip, err)
		}
		if _, err := h.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("skip %d: read after the failure: %v", skip, err)
		}
		tp.meta.Clear()
		h.Close()
		tp.close()
	}
}

// TestDeletedDuringCompaction: a device that was open when a compaction began is closed and deleted
// while it is under way. That is no reason for the pool to fail.
func TestDeletedDuringCompaction(t *testing.T) {
	const bs = 64 << 10
	var tp *testPool
	var two *Thin
	var once sync.Once
	deleted := make(chan error, 1)
	step := func(name string) {
		if name != "committed" {
			return
		}
		if tp.p.compaction.mu.TryLock() { // none is under way
			tp.p.compaction.mu.Unlock()
			return
		}
		once.Do(func() {
			go func() { deleted <- errors.Join(two.Close(), tp.p.Delete(ctx, 2)) }()
			eventually(t, "thin 2 is gone", func() bool {
				_, err := tp.p.meta.Details(2)
				return errors.Is(err, thin.ErrNotFound)
			})
		})
	}
	tp = newPool(t, poolSize{}, Options{Logger: quiet, CommitInterval: time.Hour})
	for id := range thin.DevID(3) {
		tp.create(id + 1)
		h := tp.thin(id+1, 4<<20)
		write(t, h, fill('a', bs), 0)
		must(t, h.Close())
	}
	tp.close()
	tp.metaMem = tp.metaMem.Clone()
	setTime(t, tp.metaMem, thin.MaxTime-1)
	tp.open()
	one := tp.thin(1, 4<<20)
	two = tp.thin(2, 4<<20)
	write(t, one, fill('b', bs), bs)
	tp.p.opts.step = step
	must(t, tp.p.CreateSnap(ctx, 4, 1))
	must(t, <-deleted)
	must(t, tp.p.failed())
	tp.p.opts.step = nil
	if s := tp.status(); s.Time > 3 || s.Mode != "rw" {
		t.Errorf("%+v", s)
	}
	write(t, one, fill('c', bs), 2*bs)
	must(t, one.Close())
	tp.reopen()
}
