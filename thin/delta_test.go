package thin

import (
	"fmt"
	"maps"
	"slices"
	"testing"
)

// wantDelta is Delta by the model, in runs of one block.
func wantDelta(l, r *testDev) []DeltaRange {
	keys := map[VBlock]bool{}
	for k := range l.maps {
		keys[k] = true
	}
	for k := range r.maps {
		keys[k] = true
	}
	var out []DeltaRange
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		a, la := l.maps[k]
		b, lb := r.maps[k]
		d := DeltaRange{Begin: k, Len: 1, Left: a.Block, Right: b.Block}
		switch {
		case !lb:
			d.Kind = DeltaLeftOnly
		case !la:
			d.Kind = DeltaRightOnly
		case a.Block == b.Block:
			d.Kind = DeltaSame
		default:
			d.Kind = DeltaDifferent
		}
		out = append(out, d)
	}
	return out
}

func oneByOne(t *testing.T, get func(func(DeltaRange) error) error) []DeltaRange {
	t.Helper()
	var out []DeltaRange
	var last DeltaRange
	if err := get(func(d DeltaRange) error {
		if last.extend(DeltaRange{d.Kind, d.Begin, 1, d.Left, d.Right}) {
			t.Fatalf("run %+v should have been part of %+v", d, last)
		}
		last = d
		for i := range d.Len {
			o := DeltaRange{Kind: d.Kind, Begin: d.Begin + VBlock(i), Len: 1}
			if d.Kind != DeltaRightOnly {
				o.Left = d.Left + DataBlock(i)
			}
			if d.Kind != DeltaLeftOnly {
				o.Right = d.Right + DataBlock(i)
			}
			out = append(out, o)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestDeltaAndUsageAgainstModel(t *testing.T) {
	for seed := int64(1); seed <= 6; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			p := newTestPool(t, seed, 8192, 60000)
			for range 6 {
				for range 12 {
					p.step()
				}
				p.commit()
				v := p.m.Pin()
				for range 5 {
					p.step() // the view must stand still
				}
				compareDeltas(t, p, v)
				compareUsage(t, p, v)
				v.Unpin()
				p.reopen()
			}
		})
	}
}

func compareDeltas(t *testing.T, p *testPool, v *View) {
	t.Helper()
	ids := p.committed.ids()
	for range 10 {
		l, r := ids[p.rng.Intn(len(ids))], ids[p.rng.Intn(len(ids))]
		want := wantDelta(p.committed.devs[l], p.committed.devs[r])
		got := oneByOne(t, func(fn func(DeltaRange) error) error { return v.Delta(l, r, fn) })
		if !slices.Equal(got, want) {
			t.Fatalf("delta %d %d: %d blocks, want %d", l, r, len(got), len(want))
		}
		want = slices.DeleteFunc(want, func(d DeltaRange) bool { return d.Kind == DeltaSame })
		got = oneByOne(t, func(fn func(DeltaRange) error) error { return v.Changes(l, r, fn) })
		if !slices.Equal(got, want) {
			t.Fatalf("changes %d %d: %d blocks, want %d", l, r, len(got), len(want))
		}
	}
}

func compareUsage(t *testing.T, p *testPool, v *View) {
	t.Helper()
	refs := map[DataBlock]int{}
	for _, d := range p.committed.devs {
		for _, m := range d.maps {
			refs[m.Block]++
		}
	}
	want := map[DevID]Usage{}
	for id, d := range p.committed.devs {
		u := Usage{Mapped: uint64(len(d.maps))}
		for _, m := range d.maps {
			if refs[m.Block] == 1 {
				u.Exclusive++
			}
		}
		want[id] = u
	}
	got, err := v.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Fatalf("usage %v, want %v", got, want)
	}
}

// TestChangesReadsLittle: what two devices share is not read.
func TestChangesReadsLittle(t *testing.T) {
	p := newTestPool(t, 1, 8192, 300000)
	p.create(1)
	for vb := VBlock(0); vb < 200000; vb += 20000 {
		p.insert(1, vb, 20000, 1)
	}
	p.snap(2, 1)
	for range 3 {
		p.insert(2, VBlock(p.rng.Intn(200000)), 10, 1)
		p.remove(1, VBlock(p.rng.Intn(200000)), 200000, 5)
	}
	p.commit()
	p.reopen()
	v := p.m.Pin()
	defer v.Unpin()
	reads := &countBlocks{Blocks: p.m.cache}
	n := 0
	r := v.reader(8)
	r.Blocks = reads
	l, err := v.root(1)
	p.must(err)
	s, err := v.root(2)
	p.must(err)
	p.must(r.Merge(l, s, true, func(uint64, []byte, []byte) error { n++; return nil }))
	if reads.n > 60 {
		t.Errorf("%d nodes read to compare two trees of about 1200 leaves that differ in 6 places", reads.n)
	}
	if n < 30 {
		t.Errorf("only %d keys seen", n)
	}
}
