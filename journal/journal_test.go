package journal

import (
	"cmp"
	"fmt"
	"math/rand"
	"os"
	"slices"
	"sync"
	"testing"

	"mica/thin"
)

const small = slotsAt + 2*64*slotBytes // 64 slots a generation

// TestGenerations goes through the commits of a pool and looks at each step what a reader would
// take, for each superblock that may be on the medium then.
func TestGenerations(t *testing.T) {
	f := newFixture(t, small)
	j := f.create(t, state(1))
	f.want(t, state(1), nil)
	f.want(t, state(2), nil) // nothing is in it: nothing is lost
	appendAll(t, j, entries(0, 10))
	f.want(t, state(1), entries(0, 10))
	f.wantLost(t, state(2))

	j.Switch(state(1)) // a commit begins
	f.want(t, state(1), entries(0, 10))
	appendAll(t, j, entries(10, 15))
	f.want(t, state(1), entries(0, 15))
	f.wantLost(t, state(2))
	j.Expect(state(2)) // it is about to write its superblock
	f.want(t, state(1), entries(0, 15))
	f.want(t, state(2), entries(10, 15))
	f.wantLost(t, state(3))
	appendAll(t, j, entries(15, 20)) // and has written it
	f.want(t, state(2), entries(10, 20))
	f.want(t, state(1), entries(0, 20)) // nobody knows yet
	j.Written()
	f.want(t, state(2), entries(10, 20))
	f.wantLost(t, state(1))

	j.Switch(state(2)) // the next one
	f.want(t, state(2), entries(10, 20))
	appendAll(t, j, entries(20, 21))
	f.want(t, state(2), entries(10, 21))
	f.wantLost(t, state(1))
	j.Expect(state(3))
	f.want(t, state(2), entries(10, 21))
	f.want(t, state(3), entries(20, 21))
	j.Written()

	// One that has nothing to write keeps the superblock.
	j.Switch(state(3))
	f.want(t, state(3), entries(20, 21))
	j.Switch(state(3))
	f.want(t, state(3), nil)
	appendAll(t, j, entries(30, 33))
	j.Switch(state(3))
	j.Expect(state(4))
	appendAll(t, j, entries(33, 34))
	f.want(t, state(3), entries(30, 34))
	f.want(t, state(4), entries(33, 34))
	must(t, j.Remove())
	if l, err := Find(f.id, f.o, true); err != nil || len(l) != 0 {
		t.Errorf("after it was removed: %v, %v", l, err)
	}
}

// TestManyGenerations reuses the areas: slots of earlier generations never come back.
func TestManyGenerations(t *testing.T) {
	seed := rand.Int63()
	rng := rand.New(rand.NewSource(seed))
	t.Logf("seed %d", seed)
	f := newFixture(t, small)
	j := f.create(t, state(0))
	n, closed := uint64(0), uint64(0) // closed: where what the pool lacks begins
	for g := uint64(1); g < 300; g++ {
		for range rng.Intn(50) {
			must(t, j.Append(entry(n)))
			n++
		}
		f.want(t, state(g-1), entries(closed, n))
		open := n
		j.Switch(state(g - 1))
		for range rng.Intn(9) {
			must(t, j.Append(entry(n)))
			n++
		}
		f.want(t, state(g-1), entries(closed, n))
		j.Expect(state(g))
		f.want(t, state(g), entries(open, n))
		closed = open
	}
}

func TestFullAndHalf(t *testing.T) {
	f := newFixture(t, small)
	half := 0
	j, err := Create(f.id, f.o, state(0), func() { half++ })
	must(t, err)
	defer j.Close()
	for round := range 3 {
		for n := range uint64(64) {
			if j.Full() || j.Entries() != n || half != round+map[bool]int{true: 1}[n > 32] {
				t.Fatalf("with %d of 64 entries: full %v, entries %d, half %d", n, j.Full(), j.Entries(), half)
			}
			must(t, j.Append(entry(n)))
		}
		for range 3 {
			wantErr(t, "append to a full journal", j.Append(entry(99)), ErrFull)
		}
		if !j.Full() || j.Entries() != 64 {
			t.Errorf("full %v, entries %d", j.Full(), j.Entries())
		}
		f.want(t, state(0), entries(0, 64))
		j.Switch(state(0))
		j.Expect(state(1))
		f.want(t, state(1), nil)
		j.Switch(state(1))
		j.Switch(state(0))
	}
}

func TestFailedAndDone(t *testing.T) {
	f := newFixture(t, small)
	j := f.create(t, state(1))
	appendAll(t, j, entries(0, 3))
	l := f.left(t)
	l.Done(state(7))
	f.want(t, state(7), nil) // the reader's own commit: all of it is taken
	f.want(t, state(1), entries(0, 3))
	j.Fail()
	f.want(t, state(7), nil)
	f.wantLost(t, state(1))
}

// TestTornSlots: invalid slots are skipped, what follows them counts.
func TestTornSlots(t *testing.T) {
	f := newFixture(t, small)
	j := f.create(t, state(1))
	appendAll(t, j, entries(0, 20))
	slots := j.open.Load().slots
	clear(slots[3*slotBytes : 4*slotBytes])                      // taken, and never filled
	word(slots[7*slotBytes:], 0).Store(0)                        // filled, and not made valid
	slots[11*slotBytes+9] ^= 0x10                                // torn
	copy(slots[15*slotBytes:], slots[16*slotBytes:][:slotBytes]) // not in its place
	var want []Entry
	for n := range uint64(20) {
		if n != 3 && n != 7 && n != 11 && n != 15 {
			want = append(want, entry(n))
		}
	}
	f.want(t, state(1), want)
}

// TestTornHeaders: the records of a generation are written in a moment; a kill in it leaves the
// others whole.
func TestTornHeaders(t *testing.T) {
	f := newFixture(t, small)
	j := f.create(t, state(1))
	appendAll(t, j, entries(0, 5))
	j.Switch(state(1))
	appendAll(t, j, entries(5, 9))
	j.Expect(state(2))
	page := func(number uint64) []byte { return j.m.mem[generationAt+number%2*pageBytes:] }

	word(page(2)[toComeAt:], 0).Store(0) // killed while it was noted: block 0 is not written
	f.want(t, state(1), entries(0, 9))
	f.wantLost(t, state(2))
	j.Expect(state(2))
	word(page(3), 0).Store(0) // killed while generation 3 was opened, after the commit of 2
	f.want(t, state(2), entries(5, 9))
	f.want(t, state(1), entries(0, 9)) // the record of 1 is gone, its slots are not
	word(page(2), 0).Store(0)
	if got, why := f.left(t).Entries(state(2)); len(got) > 0 || why == "" {
		t.Errorf("without any record: %s, %q", brief(got), why)
	}
}

// TestConcurrentAppend: what 16 goroutines append is all there, each one's in its order.
func TestConcurrentAppend(t *testing.T) {
	f := newFixture(t, 4<<20)
	j := f.create(t, state(1))
	const each, workers = 2000, 16
	var wg sync.WaitGroup
	for w := range uint64(workers) {
		wg.Go(func() {
			for i := range uint64(each) {
				if err := j.Append(Entry{ID: thin.DevID(w), VBlock: thin.VBlock(i % 300 * GroupBlocks), Len: 1, Block: thin.DataBlock(i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, why := f.left(t).Entries(state(1))
	if len(got) != each*workers || why != "" {
		t.Fatalf("%d entries (%s), want %d", len(got), why, each*workers)
	}
	var next [workers]thin.DataBlock
	for _, e := range got {
		if e.Block != next[e.ID] {
			t.Fatalf("worker %d: entry %d, want %d", e.ID, e.Block, next[e.ID])
		}
		next[e.ID]++
	}
}

func TestAppendAllocatesNothing(t *testing.T) {
	f := newFixture(t, 4<<20)
	j := f.create(t, state(1))
	e := entry(1)
	if n := testing.AllocsPerRun(1000, func() { must(t, j.Append(e)) }); n != 0 {
		t.Errorf("%v allocations an append, want 0", n)
	}
}

// TestFoldAgainstMap compares with entries applied one by one to a map.
func TestFoldAgainstMap(t *testing.T) {
	for seed := range int64(50) {
		rng := rand.New(rand.NewSource(seed))
		type key struct {
			id thin.DevID
			vb thin.VBlock
		}
		want := map[key]Change{}
		var list []Entry
		for range rng.Intn(400) {
			e := Entry{ID: thin.DevID(rng.Intn(3)), VBlock: thin.VBlock(rng.Intn(4 * GroupBlocks)), Block: thin.DataBlock(rng.Intn(1 << 20)), Removed: rng.Intn(3) == 0}
			e.Len = 1 + uint64(rng.Intn(int(min(40, GroupBlocks-uint64(e.VBlock)%GroupBlocks))))
			list = append(list, e)
			for k := range e.Len {
				c := Change{VBlock: e.VBlock + thin.VBlock(k), Removed: e.Removed}
				if !e.Removed {
					c.Block = e.Block + thin.DataBlock(k)
				}
				want[key{e.ID, c.VBlock}] = c
			}
		}
		got := map[key]Change{}
		last := key{}
		must(t, Fold(list, func(id thin.DevID, changes []Change) error {
			for _, c := range changes {
				k := key{id, c.VBlock}
				if len(got) > 0 && cmp.Or(cmp.Compare(k.id, last.id), cmp.Compare(k.vb, last.vb)) <= 0 {
					t.Fatalf("seed %d: %v after %v", seed, k, last)
				}
				if c.VBlock/GroupBlocks != changes[0].VBlock/GroupBlocks {
					t.Fatalf("seed %d: a group with %d and %d", seed, changes[0].VBlock, c.VBlock)
				}
				got[k], last = c, k
			}
			return nil
		}))
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("seed %d: %d changes differ from the %d wanted", seed, len(got), len(want))
		}
	}
	boom := os.ErrInvalid
	wantErr(t, "fold", Fold(slices.Clone(entries(0, 9)), func(thin.DevID, []Change) error { return boom }), boom)
}

func BenchmarkAppend(b *testing.B) {
	f := newFixture(b, 64<<20)
	j := f.create(b, state(1))
	e := entry(1)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if j.Append(e) != nil {
				j.open.Load().next.Store(0)
			}
		}
	})
}
