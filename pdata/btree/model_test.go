package btree

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand"
	"slices"
	"testing"

	"mica/pdata/block"
)

var modelSteps = flag.Int("model.steps", 150, "steps of each b-tree model test")

// TestTreesAgainstModel does random operations on trees that share nodes, for all value sizes,
// and verifies structure, contents and counts after each.
func TestTreesAgainstModel(t *testing.T) {
	for _, size := range []int{4, 8, 16, 24} {
		for seed := int64(1); seed <= 3; seed++ {
			t.Run(fmt.Sprintf("size=%d/seed=%d", size, seed), func(t *testing.T) {
				t.Parallel()
				f := newForest(t, size, 0)
				f.add()
				rng := rand.New(rand.NewSource(seed))
				for step := range *modelSteps {
					what := f.step(rng)
					if testing.Verbose() {
						t.Log(step, what)
					}
					f.verify()
					if rng.Intn(4) == 0 {
						f.commit()
					}
				}
			})
		}
	}
}

const keySpace = 20000

func (f *forest) step(rng *rand.Rand) string {
	i := rng.Intn(len(f.roots))
	var err error
	switch n := rng.Intn(100); {
	case n < 20: // single inserts and overwrites
		for range 1 + rng.Intn(100) {
			f.insert(rng, i, uint64(rng.Intn(keySpace)), uint64(rng.Intn(1<<30)))
		}
		return fmt.Sprint("insert into ", i)
	case n < 45:
		f.insertSorted(rng, i)
		return fmt.Sprint("insert sorted into ", i)
	case n < 55: // single removals, also of what is not there
		for range 1 + rng.Intn(100) {
			f.remove(i, uint64(rng.Intn(keySpace)))
		}
		return fmt.Sprint("remove from ", i)
	case n < 72:
		begin := uint64(rng.Intn(keySpace))
		end := begin + uint64(rng.Intn(keySpace/2))
		if rng.Intn(10) == 0 {
			begin, end = 0, math.MaxUint64
		}
		limit := 0
		if rng.Intn(2) == 0 {
			limit = 1 + rng.Intn(500)
		}
		f.removeRange(i, begin, end, limit)
		return fmt.Sprintf("remove [%d, %d) limit %d from %d", begin, end, limit, i)
	case n < 82:
		if len(f.roots) < 6 {
			f.snap(i)
			return fmt.Sprint("snap ", i)
		}
		fallthrough
	case n < 88:
		if len(f.roots) > 1 {
			f.must(f.tree.Release(f.roots[i]))
			f.forget(i)
			return fmt.Sprint("release ", i)
		}
		fallthrough
	case n < 94:
		if len(f.roots) > 1 {
			return f.releaseStep(i, 1+rng.Intn(40))
		}
		fallthrough
	default: // reads
		for range 50 {
			f.lookup(i, uint64(rng.Intn(keySpace)))
		}
		f.roots[i], err = f.tree.Touch(f.roots[i], uint64(rng.Intn(keySpace)))
		f.must(err)
		f.merge(i, rng.Intn(len(f.roots)))
		return fmt.Sprint("read ", i)
	}
}

func (f *forest) insert(rng *rand.Rand, i int, k, v uint64) {
	old, had := f.model[i][k]
	if had && rng.Intn(4) == 0 {
		v = old // overwriting a value by itself changes no count
	}
	val := f.encode(v)
	if !had || v != old {
		val = f.own(v)
	}
	root, isNew, err := f.tree.Insert(f.roots[i], k, val)
	f.must(err)
	if isNew == had {
		f.t.Fatalf("insert of key %d: new %v, want %v", k, isNew, !had)
	}
	f.roots[i] = root
	f.model[i][k] = v
}

func (f *forest) insertSorted(rng *rand.Rand, i int) {
	n, gap := 1+rng.Intn(1500), 1+rng.Intn(30)
	k := uint64(rng.Intn(keySpace))
	if rng.Intn(3) == 0 {
		gap = 1
	}
	var keys, vals []uint64
	fresh := 0
	for range n {
		v := uint64(rng.Intn(1 << 30))
		if _, had := f.model[i][k]; !had {
			fresh++
		}
		keys, vals = append(keys, k), append(vals, v)
		k += 1 + uint64(rng.Intn(gap))
	}
	for j, k := range keys {
		if old, had := f.model[i][k]; had && old == vals[j] {
			vals[j]++
		}
		f.own(vals[j])
	}
	root, inserted, err := f.tree.InsertSorted(f.roots[i], keys, func(j int) []byte { return f.encode(vals[j]) })
	f.must(err)
	if inserted != fresh {
		f.t.Fatalf("sorted insert: %d new, want %d", inserted, fresh)
	}
	f.roots[i] = root
	for j, k := range keys {
		f.model[i][k] = vals[j]
	}
}

func (f *forest) remove(i int, k uint64) {
	_, had := f.model[i][k]
	root, removed, err := f.tree.Remove(f.roots[i], k)
	f.must(err)
	if removed != had {
		f.t.Fatalf("remove of key %d: %v, want %v", k, removed, had)
	}
	f.roots[i] = root
	delete(f.model[i], k)
}

func (f *forest) removeRange(i int, begin, end uint64, limit int) {
	var in []uint64
	for k := range f.model[i] {
		if k >= begin && k < end {
			in = append(in, k)
		}
	}
	slices.Sort(in)
	want := len(in)
	if limit > 0 {
		want = min(want, limit)
	}
	root, removed, next, done, err := f.tree.RemoveRange(f.roots[i], begin, end, limit)
	f.must(err)
	if removed != want || done != (want == len(in)) || !done && next != in[want] {
		f.t.Fatalf("remove range: %d removed, next %d, done %v; want %d of %d", removed, next, done, want, len(in))
	}
	f.roots[i] = root
	for _, k := range in[:want] {
		delete(f.model[i], k)
	}
}

func (f *forest) releaseStep(i, budget int) string {
	root, entries, done, err := f.tree.ReleaseStep(f.roots[i], budget)
	f.must(err)
	if done {
		f.forget(i)
		return fmt.Sprintf("release step of %d, budget %d: gone", i, budget)
	}
	keys := slices.Sorted(maps.Keys(f.model[i]))
	if entries == 0 || entries > uint64(len(keys)) {
		f.t.Fatalf("release step: %d of %d entries", entries, len(keys))
	}
	for _, k := range keys[uint64(len(keys))-entries:] {
		delete(f.model[i], k)
	}
	f.roots[i] = root
	return fmt.Sprintf("release step of %d, budget %d: %d entries", i, budget, entries)
}

func (f *forest) lookup(i int, k uint64) {
	v, ok, err := f.tree.Lookup(f.roots[i], k)
	f.must(err)
	want, had := f.model[i][k]
	if ok != had || ok && f.decode(v) != want {
		f.t.Fatalf("lookup of %d: %v, want %d %v", k, ok, want, had)
	}
	// The next entry from k on.
	got, found := uint64(0), false
	f.must(f.tree.Walk(f.roots[i], k, func(n uint64, _ []byte) bool { got, found = n, true; return false }))
	next, exists := uint64(math.MaxUint64), false
	for m := range f.model[i] {
		if m >= k && m < next {
			next, exists = m, true
		}
	}
	if found != exists || found && got != next {
		f.t.Fatalf("next from %d: %d %v, want %d %v", k, got, found, next, exists)
	}
}

func (f *forest) merge(i, j int) {
	keys := map[uint64]bool{}
	for k := range f.model[i] {
		keys[k] = true
	}
	for k := range f.model[j] {
		keys[k] = true
	}
	want := slices.Sorted(maps.Keys(keys))
	n := 0
	f.must(f.tree.r.Merge(f.roots[i], f.roots[j], false, func(k uint64, l, r []byte) error {
		if n >= len(want) || want[n] != k {
			return fmt.Errorf("merge: key %d is out of place", k)
		}
		lv, lok := f.model[i][k]
		rv, rok := f.model[j][k]
		if lok != (l != nil) || rok != (r != nil) || lok && f.decode(l) != lv || rok && f.decode(r) != rv {
			return fmt.Errorf("merge: key %d has the wrong values", k)
		}
		n++
		return nil
	}))
	if n != len(want) {
		f.t.Fatalf("merge: %d keys, want %d", n, len(want))
	}
}

// TestOutOfSpaceIsAnError: with few blocks every change ends in errFull, never in a panic, and
// what was committed is still there.
func TestOutOfSpaceIsAnError(t *testing.T) {
	for limit := 5; limit < 60; limit += 5 {
		f := newForest(t, 8, 0)
		f.add()
		rng := rand.New(rand.NewSource(int64(limit)))
		f.insertSorted(rng, 0)
		f.insertSorted(rng, 0)
		f.snap(0)
		f.commit()
		committed := maps.Clone(f.model[1])
		root := f.roots[1]
		f.space.limit = len(f.space.counts) + limit/5
		var err error
		for r := f.roots[0]; err == nil; {
			k := uint64(rng.Intn(1 << 28))
			if rng.Intn(3) == 0 {
				r, _, _, _, err = f.tree.RemoveRange(r, k, k+500, 0)
			} else {
				r, _, err = f.tree.Insert(r, k, f.own(k))
			}
		}
		if !errors.Is(err, errFull) {
			t.Fatalf("%v, want the space map's error", err)
		}
		// The committed tree, from the medium.
		n := 0
		r := Reader{Blocks: block.NewCache(f.d, 1<<20), ValueSize: 8}
		f.must(r.Walk(root, 0, func(k uint64, v []byte) bool {
			if committed[k] != f.decode(v) {
				t.Fatalf("committed key %d changed", k)
			}
			n++
			return true
		}))
		if n != len(committed) {
			t.Fatalf("%d committed entries, want %d", n, len(committed))
		}
	}
}

// TestAscendingFillIsDense: keys that arrive in order leave nodes two thirds full.
func TestAscendingFillIsDense(t *testing.T) {
	f := newForest(t, 8, 0)
	i := f.add()
	var err error
	const n = 50000
	for k := uint64(0); k < n; k += 500 {
		keys := make([]uint64, 500)
		for j := range keys {
			keys[j] = k + uint64(j)
			f.own(keys[j])
			f.model[i][keys[j]] = keys[j]
		}
		f.roots[i], _, err = f.tree.InsertSorted(f.roots[i], keys, func(j int) []byte { return f.encode(keys[j]) })
		f.must(err)
	}
	f.verify()
	if most := n/168 + 10; len(f.space.counts) > most {
		t.Errorf("%d nodes for %d ascending keys, want at most %d", len(f.space.counts), n, most)
	}
}

// TestMaxNewIsABound: MaxNew holds for what random changes really allocate.
func TestMaxNewIsABound(t *testing.T) {
	for _, size := range []int{4, 8, 16, 24} {
		f := newForest(t, size, 0)
		f.add()
		rng := rand.New(rand.NewSource(int64(size)))
		for round := range 40 {
			f.insertSorted(rng, 0)
			if round%3 == 0 {
				f.removeRange(0, uint64(rng.Intn(keySpace)), uint64(rng.Intn(keySpace)), 0)
			}
			f.commit()
			was := len(f.space.counts)
			old := maps.Clone(f.space.committed)
			n := 1 + rng.Intn(60)
			most := uint64(len(f.model[0]) + n)
			for range n {
				if k := uint64(rng.Intn(keySpace)); rng.Intn(2) == 0 {
					f.insert(rng, 0, k, uint64(rng.Intn(1<<30)))
				} else {
					f.remove(0, k)
				}
				fresh := 0
				for b := range f.space.counts {
					if !old[b] {
						fresh++
					}
				}
				if b := MaxNew(most, uint64(n), size); uint64(fresh) > b {
					t.Fatalf("size %d: %d new nodes after %d changes of a tree of %d entries and %d nodes, bound %d", size, fresh, n, most, was, b)
				}
			}
			f.commit()
		}
	}
}

// TestReleaseStepsOfHighTrees releases trees of three levels that share parts, in steps of many
// sizes; after each the rest is a legal tree.
func TestReleaseStepsOfHighTrees(t *testing.T) {
	for _, size := range []int{8, 24} {
		for _, budget := range []int{1, 3, 50, 256} {
			t.Run(fmt.Sprintf("size=%d/budget=%d", size, budget), func(t *testing.T) {
				t.Parallel()
				f := newForest(t, size, 0)
				rng := rand.New(rand.NewSource(int64(budget)))
				i := f.add()
				var err error
				entries := uint64(60000) // more leaves than one node holds
				if size == 24 {
					entries = 30000
				}
				for begin := uint64(0); begin < entries; begin += 2000 {
					keys := make([]uint64, 2000)
					for j := range keys {
						keys[j] = 5*begin + 5*uint64(j)
						f.own(keys[j])
						f.model[i][keys[j]] = keys[j]
					}
					f.roots[i], _, err = f.tree.InsertSorted(f.roots[i], keys, func(j int) []byte { return f.encode(keys[j]) })
					f.must(err)
				}
				if h, err := f.tree.r.height(f.roots[i]); err != nil || h != 3 {
					t.Fatalf("a tree of %d levels, want 3", h)
				}
				f.commit()
				// Two copies, each with changes in half of the keys.
				for range 2 {
					j := f.snap(0)
					for range 400 {
						f.insert(rng, j, (5*entries+uint64(rng.Intn(int(5*entries))))/2, uint64(rng.Intn(1<<30)))
					}
					f.removeRange(j, uint64(rng.Intn(int(3*entries))), 4*entries, 20000)
				}
				f.verify()
				f.commit()
				steps := 0
				for len(f.roots) > 0 {
					f.releaseStep(rng.Intn(len(f.roots)), budget)
					if steps++; steps%(1+200/budget) == 0 {
						f.verify()
					}
					if rng.Intn(10) == 0 {
						f.commit()
					}
				}
				f.verify()
				if len(f.space.counts) != 0 {
					t.Errorf("%d blocks are left when all trees are gone", len(f.space.counts))
				}
				t.Logf("%d steps", steps)
			})
		}
	}
}
