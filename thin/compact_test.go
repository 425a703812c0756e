package thin

import (
	"errors"
	"fmt"
	"maps"
	"testing"

	"mica/dev"
)

// aged makes a random pool whose times are spread over all that 24 bits hold.
func aged(t testing.TB, seed, metaBlocks int64, steps int) *testPool {
	t.Helper()
	p := newTestPool(t, seed, metaBlocks, 40000)
	const last = MaxTime - 2
	for i := range steps {
		p.step()
		if i%5 == 4 { // as if many others had been snapshotted
			p.now.time += uint32(p.rng.Intn(int(last-p.now.time)/4 + 1))
			p.m.sb.Time = p.now.time
		}
		if i%7 == 0 {
			p.commit()
		}
	}
	p.m.sb.Time, p.now.time, p.m.changed = last, last, true
	p.commit()
	return p
}

// A timing is what the times of a pool say: which mappings are shared, which are a device's own
// since it was made, and the order of the times of devices.
type timing struct {
	shared, own map[DevID]map[VBlock]bool
	blocks      map[DevID]map[VBlock]DataBlock
	order       map[[2]DevID]int
}

func timingOf(t testing.TB, v *View) timing {
	t.Helper()
	devs, err := v.Devices()
	if err != nil {
		t.Fatal(err)
	}
	x := timing{map[DevID]map[VBlock]bool{}, map[DevID]map[VBlock]bool{}, map[DevID]map[VBlock]DataBlock{}, map[[2]DevID]int{}}
	for _, d := range devs {
		x.shared[d.ID], x.own[d.ID], x.blocks[d.ID] = map[VBlock]bool{}, map[VBlock]bool{}, map[VBlock]DataBlock{}
		if err := v.Walk(d.ID, 0, func(e Entry) bool {
			x.shared[d.ID][e.VBlock] = d.SnapshottedTime > e.Time
			x.own[d.ID][e.VBlock] = e.Time >= d.CreationTime
			x.blocks[d.ID][e.VBlock] = e.Block
			return true
		}); err != nil {
			t.Fatal(err)
		}
		for _, o := range devs {
			order := 0
			for i, pair := range [][2]uint32{{d.CreationTime, o.CreationTime}, {d.CreationTime, o.SnapshottedTime}, {d.SnapshottedTime, o.SnapshottedTime}} {
				switch {
				case pair[0] < pair[1]:
					order |= 1 << (2 * i)
				case pair[0] > pair[1]:
					order |= 2 << (2 * i)
				}
			}
			x.order[[2]DevID{d.ID, o.ID}] = order
		}
	}
	return x
}

func (x timing) sameMappings(was timing) bool {
	return maps.EqualFunc(x.blocks, was.blocks, func(a, b map[VBlock]DataBlock) bool { return maps.Equal(a, b) })
}

// compare reports differences. With partly, blocks may be taken for shared that were not.
func (x timing) compare(t testing.TB, was timing, partly bool) {
	t.Helper()
	if !x.sameMappings(was) {
		t.Fatal("the mappings have changed")
	}
	for id, m := range was.shared {
		for vb, shared := range m {
			if got := x.shared[id][vb]; got != shared && !(partly && got) {
				t.Fatalf("thin %d block %d: shared %v, was %v", id, vb, got, shared)
			}
			if !partly && x.own[id][vb] != was.own[id][vb] {
				t.Fatalf("thin %d block %d: own %v, was %v", id, vb, x.own[id][vb], was.own[id][vb])
			}
		}
	}
	if !maps.Equal(x.order, was.order) {
		t.Fatal("the order of the devices' times has changed")
	}
}

// TestCompact: on random old pools every comparison of times stays, what is shared stays shared,
// and the pool's time is as small as the times of its devices allow.
func TestCompact(t *testing.T) {
	for seed := int64(1); seed <= 6; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			p := aged(t, seed, 8192, 150)
			v := p.m.Pin()
			was := timingOf(t, v)
			v.Unpin()
			before, err := Check(p.mem, CheckOptions{})
			p.must(err)
			mustClean(t, before)
			p.must(p.m.CompactAll(nil))
			v = p.m.Pin()
			timingOf(t, v).compare(t, was, false)
			v.Unpin()
			after, err := Check(p.mem, CheckOptions{})
			p.must(err)
			mustClean(t, after)
			p.thinCheck()
			if after.Time > uint32(2*after.Devices+1) || p.m.Time() != after.Time {
				t.Errorf("time %d with %d devices", after.Time, after.Devices)
			}
			if after.MetaUsed > before.MetaUsed+4 {
				t.Errorf("%d metadata blocks, were %d", after.MetaUsed, before.MetaUsed)
			}
			// It goes on as if nothing had been.
			p.adopt()
			for range 60 {
				p.step()
				p.commit()
			}
			p.check()
			p.thinCheck()
		})
	}
}

// adopt takes the times of the pool over into the model.
func (p *testPool) adopt() {
	p.t.Helper()
	p.now.time = p.m.Time()
	for id, d := range p.now.devs {
		det, err := p.m.Details(id)
		p.must(err)
		d.info = det
		p.must(p.m.LookupRange(id, 0, 1<<63, func(e Entry) bool { d.maps[e.VBlock] = e.Mapping; return true }))
	}
	p.committed = p.now.clone()
}

// TestCompactCrash: cut after every commit of a compaction in small steps, the pool is clean and no
// shared block is taken for a device's own; a second compaction then goes through.
func TestCompactCrash(t *testing.T) {
	p := aged(t, 22, 4096, 60)
	p.m.sb.Time, p.now.time = MaxTime/2, MaxTime/2 // room for more
	p.create(900)
	p.insert(900, 0, 6000, 2)
	for id := DevID(901); id < 909; id++ {
		p.snap(id, 900)
		p.insert(id, VBlock(p.rng.Intn(9000)), 300, 5)
	}
	p.m.sb.Time, p.now.time = MaxTime-2, MaxTime-2
	p.commit()
	v := p.m.Pin()
	was := timingOf(t, v)
	v.Unpin()
	cuts := 0
	for leaves := 1; leaves <= 27; leaves *= 3 {
		for cut := 1; ; cut += 1 + cut/5 {
			mem := p.mem.Clone()
			m, err := Open(mem, OpenOptions{})
			p.must(err)
			c, err := m.Compact()
			p.must(err)
			done := false
			for n := 0; n < cut && !done; n++ {
				done, err = c.Step(leaves)
				p.must(err)
				_, err = m.Commit(nil)
				p.must(err)
			}
			r, err := Check(mem, CheckOptions{})
			p.must(err)
			mustClean(t, r)
			view, err := OpenView(mem)
			p.must(err)
			timingOf(t, view).compare(t, was, true)
			cuts++
			if done {
				break
			}
			if cuts%9 != 0 {
				continue
			}
			again, err := Open(mem, OpenOptions{})
			p.must(err)
			p.must(again.CompactAll(nil))
			r, err = Check(mem, CheckOptions{})
			p.must(err)
			mustClean(t, r)
			if view, err = OpenView(mem); err != nil || r.Time > uint32(2*r.Devices+1) {
				t.Fatalf("time %d, %v", r.Time, err)
			}
			timingOf(t, view).compare(t, was, true)
		}
	}
	t.Logf("%d cuts", cuts)
	if cuts < 40 {
		t.Errorf("only %d cuts", cuts)
	}
}

// TestCompactBesideOthers: devices are made, snapshotted and deleted between the steps.
func TestCompactBesideOthers(t *testing.T) {
	for seed := int64(31); seed <= 34; seed++ {
		p := aged(t, seed, 8192, 120)
		v := p.m.Pin()
		first := timingOf(t, v)
		v.Unpin()
		snapped := map[DevID]bool{}
		c, err := p.m.Compact()
		p.must(err)
		p.retimed = true
		var was timing
		for n, done := 0, false; !done; n++ {
			done, err = c.Step(3)
			p.must(err)
			if ids := p.now.ids(); n%3 == 0 && n < 60 && len(ids) > 0 {
				id := ids[p.rng.Intn(len(ids))]
				switch p.rng.Intn(3) {
				case 0:
					p.create(DevID(1000 + n))
				case 1:
					if p.m.Time() < MaxTime-1 {
						p.snap(DevID(1000+n), id)
						snapped[id] = true
					}
				case 2:
					p.delete(id)
				}
				done = false
			}
			_, err = p.m.Commit(nil)
			p.must(err)
			v := p.m.Pin()
			now := timingOf(t, v)
			v.Unpin()
			if n > 0 && now.sameMappings(was) {
				now.compare(t, was, true)
			}
			was = now
		}
		p.must(c.Finish())
		_, err = p.m.Commit(nil)
		p.must(err)
		v = p.m.Pin()
		now := timingOf(t, v)
		v.Unpin()
		left := 0
		for id, m := range first.shared {
			if now.shared[id] == nil {
				continue // deleted
			}
			left++
			for vb, shared := range m {
				if got := now.shared[id][vb]; shared && !got || !snapped[id] && got != shared {
					t.Fatalf("seed %d: thin %d block %d: shared %v, was %v", seed, id, vb, got, shared)
				}
			}
		}
		t.Logf("seed %d: %d of %d devices left, %d snapshotted", seed, left, len(first.shared), len(snapped))
		r, err := Check(p.mem, CheckOptions{})
		p.must(err)
		mustClean(t, r)
	}
}

// TestCompactRefuses: what a compaction does not do, and what ends it.
func TestCompactRefuses(t *testing.T) {
	p := newTestPool(t, 3, 2048, 10000)
	p.create(1)
	p.insert(1, 0, 500, 1)
	p.commit()
	if _, err := p.m.Compact(); !errors.Is(err, ErrTime) {
		t.Errorf("nothing to gain: %v", err)
	}
	p.m.sb.Time, p.m.changed = MaxTime-1, true
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	if _, err := p.m.Compact(); !errors.Is(err, ErrExists) {
		t.Errorf("with a metadata snapshot: %v", err)
	}
	p.must(p.m.ReleaseMetadataSnap())
	p.commit()
	c, err := p.m.Compact()
	p.must(err)
	if _, err := p.m.Compact(); err == nil {
		t.Error("two at the same time")
	}
	if err := c.Finish(); err == nil {
		t.Error("finished without a step")
	}
	r, _ := p.m.AllocData(0, 1)
	p.must(p.m.Insert(1, []Entry{{VBlock: 9000, Mapping: Mapping{r.Begin, p.m.Time()}}}))
	for done := false; !done; {
		done, err = c.Step(100)
		p.must(err)
	}
	if err := c.Finish(); err == nil {
		t.Error("finished although a mapping was inserted")
	}
	c.End()
	if _, err := c.Step(1); err == nil {
		t.Error("a step after the end")
	}
	p.must(p.m.CompactAll(nil))
	if p.m.Time() != 1 {
		t.Errorf("time %d", p.m.Time())
	}
}

// TestCompactFull: with hardly a metadata block free a compaction says so, before anything is lost.
func TestCompactFull(t *testing.T) {
	mem := dev.NewMem(128 * 4096)
	p := newTestPoolOn(t, 4, mem, mem, 16000)
	p.create(1)
	p.insert(1, 0, 6000, 1)
	p.snap(2, 1)
	p.commit()
	for vb := VBlock(10000); p.m.CanAdmit(3, false); vb += 3 {
		p.insert(1, vb, 3, 1)
		p.commit()
	}
	p.m.sb.Time, p.m.changed, p.now.time = MaxTime-1, true, MaxTime-1
	p.commit()
	if err := p.m.CompactAll(nil); !errors.Is(err, ErrNoMetaSpace) {
		t.Fatalf("%v", err)
	}
	if p.m.Failed() != nil {
		t.Fatal(p.m.Failed())
	}
	r, err := Check(p.mem, CheckOptions{})
	p.must(err)
	mustClean(t, r)
	p.remove(2, 0, 100, 0)
	p.commit()
}
