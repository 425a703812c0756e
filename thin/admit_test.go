package thin

import (
	"errors"
	"flag"
	"fmt"
	"sync/atomic"
	"testing"
)

var admitRounds = flag.Int("admit.rounds", 400, "rounds of each admission test")

// TestAdmittedChangesAlwaysFit applies exactly what CanAdmit has said yes to, on metadata
// devices that are nearly full, with many snapshots so that leaves are shared and counts go
// over 3. No change and no commit may run out of metadata blocks or need more of them than the
// bound, and deleting always works.
func TestAdmittedChangesAlwaysFit(t *testing.T) {
	var full, deletes atomic.Int64
	t.Run("pools", func(t *testing.T) {
		for seed := int64(1); seed <= 8; seed++ {
			t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
				t.Parallel()
				p := newTestPool(t, seed, 150+60*seed, 20000*uint64(seed))
				p.create(1)
				a := admitTest{testPool: p, fill: seed%2 == 0}
				for range *admitRounds {
					a.round()
				}
				p.compare()
				p.check()
				p.thinCheck()
				full.Add(int64(a.full))
				deletes.Add(int64(a.deletes))
				t.Logf("%d changes admitted, %d rounds without room, %d deletes, at least %d metadata blocks free, at most %d%% of a bound needed",
					a.changes, a.full, a.deletes, a.least, int(100*a.worst))
			})
		}
	})
	if full.Load() == 0 || deletes.Load() == 0 {
		t.Errorf("%d rounds without room, %d deletes: the test did not get to the limit", full.Load(), deletes.Load())
	}
}

type admitTest struct {
	*testPool
	fill    bool // seldom delete
	changes int
	full    int
	deletes int
	least   uint64
	worst   float64 // needed / bound
}

func (a *admitTest) round() {
	n := 1 + a.rng.Intn(400)
	for n > 0 && !a.m.CanAdmit(n, false) {
		n /= 2
	}
	if n == 0 {
		a.full++
		a.makeRoom()
	} else {
		a.m.mu.Lock()
		bound, free := a.m.changesCostLocked(uint64(n), a.m.meta.Shared() > 0), a.m.meta.Free()
		a.m.mu.Unlock()
		a.apply(n)
		a.needed(bound, free, fmt.Sprintf("%d changes", n))
	}
	// Sharing grows: snapshots are taken as long as they are admitted.
	if id := DevID(a.rng.Intn(60)); a.now.devs[id] == nil && a.rng.Intn(2) == 0 {
		origin, _ := a.pick()
		before := a.m.Space()
		if err := a.m.CreateSnap(id, origin); err == nil {
			// Adopt it in the model: the operation itself is tested elsewhere.
			o := a.now.devs[origin]
			c := (&testState{devs: map[DevID]*testDev{id: o}}).clone()
			a.now.devs[id] = c.devs[id]
			a.now.time = a.m.Time()
			o.info.SnapshottedTime = a.now.time
			a.now.devs[id].info = Details{o.info.MappedBlocks, a.now.txID, a.now.time, a.now.time}
		} else if !errors.Is(err, ErrNoMetaSpace) || a.m.Failed() != nil {
			a.t.Fatalf("create snapshot with %+v: %v, pool %v", before, err, a.m.Failed())
		}
	}
	if a.rng.Intn(3) > 0 {
		a.commit()
	}
	if f := a.m.Space().MetaFree; a.least == 0 || f < a.least {
		a.least = f
	}
}

// needed commits and holds the blocks that it took against the bound.
func (a *admitTest) needed(bound, free uint64, what string) {
	c, err := a.m.Prepare()
	a.must(err)
	a.m.mu.Lock()
	took := free - min(free, a.m.meta.Free())
	a.m.mu.Unlock()
	if took > bound {
		a.t.Fatalf("%s: %d metadata blocks needed, bound %d", what, took, bound)
	}
	a.worst = max(a.worst, float64(took)/float64(bound))
	a.must(c.WriteBlocks())
	a.must(c.WriteSuperblock())
	for _, r := range RunsOf(c.Freed()) {
		a.m.ReleaseData(r)
	}
	a.committed = a.now.clone()
}

// apply makes exactly n changes, each anywhere in any device.
func (a *admitTest) apply(n int) {
	for range n {
		id, _ := a.pick()
		vb := VBlock(a.rng.Intn(80000))
		if a.rng.Intn(5) > 0 {
			a.insert(id, vb, 1, 1)
		} else {
			a.remove(id, vb, vb+200, 1)
		}
		a.changes++
	}
}

// makeRoom deletes, or discards within the reserve, or grows, as an operator would.
func (a *admitTest) makeRoom() {
	a.commit()
	if a.m.CanAdmit(20, true) {
		for range 20 {
			id, _ := a.pick()
			a.remove(id, VBlock(a.rng.Intn(80000)), 1<<40, 1)
		}
	}
	if a.fill && a.rng.Intn(8) > 0 {
		return
	}
	for range 1 + a.rng.Intn(10) {
		if id, _ := a.pick(); len(a.now.devs) > 1 {
			a.commit()
			a.m.CanAdmit(0, true)
			a.m.mu.Lock()
			bound, free := a.m.deleteCostLocked(deleteLeaves), a.m.meta.Free()
			a.m.mu.Unlock()
			a.deleteStep(id)
			a.deletes++
			a.needed(bound, free, "delete step")
		}
	}
	a.commit()
}
