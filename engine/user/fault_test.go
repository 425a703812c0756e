package user

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var errIO = errors.New("input/output error of the test")

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
