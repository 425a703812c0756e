package user

import (
	"context"
	"math/rand/v2"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// The count kept by changes is the count by a walk, and what a model says, through snapshots,
// overwrites, discards and reopening.
func TestOwnBlocks(t *testing.T) {
	const bs, blocks = 64 << 10, 64
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	ctx := context.Background()
	meta, data := dev.NewMem(4<<20), dev.NewMem(512*bs)
	if err := thin.Format(meta, thin.FormatOptions{DataBlockSize: bs, DataBlocks: 512}); err != nil {
		t.Fatal(err)
	}
	p, err := New(meta, data, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	own := map[thin.VBlock]bool{} // of the device under test
	id, kept := thin.DevID(1), int64(0)
	open := func() engine.Thin {
		d, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: blocks * bs})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	next := thin.DevID(2)
	for i := range 2000 {
		vb := int64(rng.IntN(blocks))
		switch rng.IntN(20) {
		default:
			if _, err := d.WriteAt(make([]byte, 4096), vb*bs+4096); err != nil {
				t.Fatal(err)
			}
			own[thin.VBlock(vb)] = true
		case 0, 1, 2, 3:
			if err := d.(dev.Discarder).Discard(vb*bs, bs); err != nil {
				t.Fatal(err)
			}
			delete(own, thin.VBlock(vb))
		case 4: // a snapshot of it: its own blocks stay its own
			if next > 6 {
				continue
			}
			if err := p.CreateSnap(ctx, next, id); err != nil {
				t.Fatal(err)
			}
			next++
		case 5: // go on in a snapshot of it
			if next > 6 || i < 200 {
				continue
			}
			kept += d.(*Thin).OwnChange()
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := p.CreateSnap(ctx, next, id); err != nil {
				t.Fatal(err)
			}
			id, next = next, next+1
			clear(own)
			kept = 0
			d = open()
		case 6:
			kept += d.(*Thin).OwnChange()
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			d = open()
		}
		if got := kept + d.(*Thin).OwnChange(); got != int64(len(own)) {
			t.Fatalf("operation %d: %d own blocks by changes, want %d", i, got, len(own))
		}
		if i%50 == 0 {
			n, err := p.OwnBlocks(ctx, id)
			if err != nil || n != uint64(len(own)) {
				t.Fatalf("operation %d: %d own blocks by a walk (%v), want %d", i, n, err, len(own))
			}
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// Snapshots and transaction id come together or not at all.
func TestCreateSnapsAt(t *testing.T) {
	ctx := context.Background()
	meta, data := dev.NewMem(4<<20), dev.NewMem(64<<16)
	if err := thin.Format(meta, thin.FormatOptions{DataBlockSize: 64 << 10, DataBlocks: 64}); err != nil {
		t.Fatal(err)
	}
	p, err := New(meta, data, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	before, _ := p.Status(ctx)
	if err := p.CreateSnapsAt(ctx, []engine.SnapPair{{ID: 2, Origin: 1}, {ID: 3, Origin: 1}}, 0, 7); err != nil {
		t.Fatal(err)
	}
	after, _ := p.Status(ctx)
	if after.TransactionID != 7 || after.Devices != 3 || after.Commits != before.Commits+1 {
		t.Errorf("status %+v", after)
	}
	for _, pairs := range [][]engine.SnapPair{{{ID: 4, Origin: 1}, {ID: 5, Origin: 2}}, {{ID: 4, Origin: 1}, {ID: 3, Origin: 1}}} {
		old := uint64(7)
		if pairs[1].ID == 5 {
			old = 6 // wrong
		}
		if err := p.CreateSnapsAt(ctx, pairs, old, 8); err == nil {
			t.Errorf("%v at %d was accepted", pairs, old)
		}
		if st, _ := p.Status(ctx); st.TransactionID != 7 || st.Devices != 3 {
			t.Errorf("status %+v after a refusal", st)
		}
	}
}
