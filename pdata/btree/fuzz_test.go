package btree

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"mica/dev"
	"mica/internal/mutate"
	"mica/pdata/block"
)

// fuzzBlocks is the length of the device that FuzzTree reads: block 0 is nothing, blocks 1 and 2 are
// the input, block 3 is a sound leaf.
const fuzzBlocks = 4

func treeSeeds() [][]byte {
	leaf := func(size, n int, first uint64) []byte {
		b := make([]byte, block.Size)
		EncodeNode(b, true, size, n, func(i int) (uint64, []byte) { return first + uint64(2*i), bytes.Repeat([]byte{byte(i)}, size) })
		return b
	}
	internal := func(children ...uint64) []byte {
		b := make([]byte, block.Size)
		EncodeNode(b, false, 8, len(children), func(i int) (uint64, []byte) {
			return uint64(1000 * i), binary.LittleEndian.AppendUint64(nil, children[i])
		})
		return b
	}
	return [][]byte{
		leaf(8, 0, 0), leaf(8, 252, 5), leaf(24, 126, 0), leaf(4, 336, 0), leaf(16, 168, 1<<40),
		append(internal(2, 3), leaf(8, 100, 7)...),
		append(internal(2, 2, 2), internal(1, 3)...), // a cycle
		append(internal(1), leaf(8, 3, 0)...),
		append(internal(3, 9), make([]byte, block.Size)...),
	}
}

// readTrees: any two blocks are read as trees of every kind: with an error, or with keys that
// ascend and are found again.
func readTrees(t *testing.T, in []byte) {
	mem := dev.NewMem(fuzzBlocks * block.Size)
	put := func(loc block.Loc, b []byte) {
		block.Seal(b, loc, block.Node)
		if _, err := mem.WriteAt(b, int64(loc)*block.Size); err != nil {
			t.Fatal(err)
		}
	}
	for loc := block.Loc(1); loc <= 2; loc++ {
		b := make([]byte, block.Size)
		copy(b, in)
		in = in[min(len(in), block.Size):]
		put(loc, b)
	}
	for _, size := range []int{4, 8, 16, 24} {
		b := make([]byte, block.Size)
		EncodeNode(b, true, size, 90, func(i int) (uint64, []byte) { return 1<<32 + uint64(i), make([]byte, size) })
		put(3, b)
		r := Reader{Blocks: block.NewCache(mem, 0), ValueSize: size}
		var keys []uint64
		err := r.Walk(1, 0, func(k uint64, v []byte) bool {
			if n := len(keys); n > 0 && k <= keys[n-1] {
				t.Fatalf("values of %d bytes: key %d after %d", size, k, keys[n-1])
			}
			if len(v) != size {
				t.Fatalf("a value of %d bytes, want %d", len(v), size)
			}
			keys = append(keys, k)
			return true
		})
		last, ok, lerr := r.Last(1)
		n, cerr := r.count(1, 0, bounds{})
		if err != nil {
			if !errors.Is(err, block.ErrCorrupt) {
				t.Fatal(err)
			}
			continue
		}
		if lerr != nil || ok != (len(keys) > 0) || ok && last != keys[len(keys)-1] || cerr != nil || n != uint64(len(keys)) {
			t.Fatalf("values of %d bytes: %d keys, last %d %v %v, count %d %v", size, len(keys), last, ok, lerr, n, cerr)
		}
		for _, k := range keys {
			if _, ok, err := r.Lookup(1, k); err != nil || !ok {
				t.Fatalf("values of %d bytes: key %d is walked and not found (%v)", size, k, err)
			}
		}
	}
}

func FuzzTree(f *testing.F) { mutate.Fuzz(f, treeSeeds(), readTrees) }

func TestTreeMutated(t *testing.T) {
	mutate.Test(t, "FuzzTree", treeSeeds(), mutate.Options{Inputs: 1500, MaxBytes: 2 * block.Size, AllocBase: 8 << 20}, readTrees)
}
