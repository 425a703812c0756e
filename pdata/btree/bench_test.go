package btree

import (
	"math/rand"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/txn"
)

// BenchmarkMillion works on trees of a million entries of 8 bytes.
func BenchmarkMillion(b *testing.B) {
	const n = 1000000
	build := func() (*Tree, *testSpace, block.Loc) {
		d := dev.NewMem(1 << 40)
		space := newTestSpace(0)
		tm := txn.New(d, block.NewCache(d, 256<<20))
		tm.SetSpaceMap(space)
		t := New(tm, ValueType{Size: 8})
		root, err := t.Empty()
		if err != nil {
			b.Fatal(err)
		}
		keys := make([]uint64, 4096)
		var v [8]byte
		for k := uint64(0); k < n; k += 4096 {
			for i := range keys {
				keys[i] = 3 * (k + uint64(i))
			}
			if root, _, err = t.InsertSorted(root, keys, func(int) []byte { return v[:] }); err != nil {
				b.Fatal(err)
			}
		}
		return t, space, root
	}
	rng := rand.New(rand.NewSource(1))
	b.Run("op=build-sorted", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			build()
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
	})
	t, space, root := build()
	b.Run("op=lookup", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, ok, err := t.Lookup(root, 3*uint64(rng.Intn(n))); err != nil || !ok {
				b.Fatal(ok, err)
			}
		}
	})
	b.Run("op=walk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := t.Walk(root, 0, func(uint64, []byte) bool { return true }); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/entry")
	})
	b.Run("op=insert-random", func(b *testing.B) {
		b.ReportAllocs()
		var v [8]byte
		var err error
		for b.Loop() {
			if root, _, err = t.Insert(root, uint64(rng.Intn(3*n)), v[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("op=remove-random", func(b *testing.B) {
		b.ReportAllocs()
		var err error
		for b.Loop() {
			if root, _, err = t.Remove(root, uint64(rng.Intn(3*n))); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("op=snap-and-insert", func(b *testing.B) {
		var v [8]byte
		for b.Loop() {
			space.counts[root]++
			r, _, err := t.Insert(root, uint64(rng.Intn(3*n)), v[:])
			if err == nil {
				err = t.Release(r)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
