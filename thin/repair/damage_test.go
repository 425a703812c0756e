package repair

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand"
	"runtime"
	"testing"
	"time"

	"mica/dev"
	"mica/pdata/block"
	"mica/thin"
)

var (
	damageRuns = flag.Int("damage.runs", 150, "pools that TestRandomDamage repairs")
	damageSeed = flag.Int64("damage.seed", 0, "seed of TestRandomDamage and TestFlippedFields, 0: by time")
	flipEvery  = flag.Int("flip.every", 12, "try one of so many changes of fields in TestFlippedFields")
)

func seedOf(t *testing.T) int64 {
	seed := *damageSeed
	if seed == 0 {
		seed = time.Now().UnixNano()
	}
	t.Logf("seed %d", seed)
	return seed
}

// TestRandomDamage breaks any blocks of a pool. What comes out is sound, has no mapping that was not
// there, and every mapping that is missing was reported.
func TestRandomDamage(t *testing.T) {
	seed := seedOf(t)
	rng := rand.New(rand.NewSource(seed))
	p := newPool(t, 40, 1024, 40000)
	p.fill(12)
	p.must(p.m.CreateThin(600))
	p.must(p.m.CreateSnap(601, 500))
	p.write(500, 20000, 300, 2)
	p.commit()
	was := map[thin.DevID]map[thin.VBlock]thin.Mapping{}
	v, err := thin.OpenView(p.mem)
	p.must(err)
	devs, err := v.Devices()
	p.must(err)
	for _, d := range devs {
		was[d.ID] = mappings(t, p.mem, d.ID)
	}
	used := usedBlocks(t, p.mem)
	failed, whole := 0, 0
	for run := range max(1, *damageRuns/slow) {
		mem := p.mem.Clone()
		n := 1 + rng.Intn(4)
		if rng.Intn(5) == 0 {
			n = len(used) / 2
		}
		var hit []block.Loc
		for range n {
			loc := used[rng.Intn(len(used))]
			hit = append(hit, loc)
			b := readBlock(t, mem, loc)
			switch rng.Intn(3) {
			case 0:
				clear(b)
			case 1:
				rng.Read(b)
			default:
				b[4+rng.Intn(block.Size-4)] ^= 1 << rng.Intn(8)
			}
			writeBlock(t, mem, loc, b)
		}
		out := dev.NewMem(mem.Size())
		r, err := Repair(mem, out, Options{DataBlockSize: blockSize, DataBytes: 40000 * blockSize})
		if err != nil {
			failed++
			if n < 3 {
				t.Errorf("seed %d run %d, blocks %v: %v", seed, run, hit, err)
			}
			continue
		}
		if r.Complete {
			whole++
		}
		c, err := thin.Check(out, thin.CheckOptions{})
		p.must(err)
		if !c.Clean() || c.Warnings > 0 {
			t.Fatalf("seed %d run %d, blocks %v: %v", seed, run, hit, c.Err())
		}
		if run%25 == 0 {
			thinCheck(t, out)
		}
		if r.From == FromSearch {
			continue // perhaps of an older state
		}
		for id, maps := range was {
			d, known := reported(r, id)
			var got map[thin.VBlock]thin.Mapping
			if known && !d.Gone {
				got = mappings(t, out, id)
			}
			if uint64(len(got)) != d.Kept {
				t.Fatalf("seed %d run %d: thin %d has %d mappings, reported %d", seed, run, id, len(got), d.Kept)
			}
			for vb, m := range got {
				if maps[vb] != m {
					t.Fatalf("seed %d run %d: thin %d block %d is mapped to %v, was %v", seed, run, id, vb, m, maps[vb])
				}
			}
			if d.Gone || !known && r.UnknownDevices {
				continue
			}
			for vb := range maps {
				if _, ok := got[vb]; !ok && !covered(d.Lost, vb) {
					t.Fatalf("seed %d run %d, blocks %v: thin %d lost block %d, which is not reported:\n%s", seed, run, hit, id, vb, text(t, r))
				}
			}
		}
	}
	t.Logf("%d pools, %d could not be repaired, of %d nothing was lost", max(1, *damageRuns/slow), failed, whole)
}

func reported(r *Report, id thin.DevID) (Device, bool) {
	for _, d := range r.Devices {
		if d.ID == id {
			return d, true
		}
	}
	return Device{}, false
}

func covered(lost []LostRange, vb thin.VBlock) bool {
	for _, l := range lost {
		if l.has(uint64(vb)) {
			return true
		}
	}
	return false
}

// usedBlocks lists the blocks that the space map of a pool counts.
func usedBlocks(t *testing.T, d dev.Device) (list []block.Loc) {
	t.Helper()
	x := &finder{f: newForest(d)}
	used := x.usedBlocks(&state{sb: super(t, d), known: true})
	for loc := range x.f.n {
		if u, _ := used(loc); u {
			list = append(list, loc)
		}
	}
	return list
}

// TestFlippedFields changes every field of every block of a pool, with right checksums and with wrong
// ones. A repair is an error or a sound pool in which no block has two writers; it does not take
// memory by what a field says.
func TestFlippedFields(t *testing.T) {
	seed := seedOf(t)
	rng := rand.New(rand.NewSource(seed))
	p := newPool(t, 41, 256, 20000)
	p.must(p.m.CreateThin(1))
	p.write(1, 0, 500, 3)
	p.must(p.m.CreateSnap(2, 1))
	p.write(2, 100, 50, 2)
	p.commit()
	p.must(p.m.ReserveMetadataSnap())
	p.commit()
	p.must(p.m.CreateSnap(3, 2))
	p.write(1, 600, 100, 1)
	p.commit()
	tried, failed, lossy := 0, 0, 0
	kinds := map[block.Kind]int{}
	for _, loc := range usedBlocks(t, p.mem) {
		b := readBlock(t, p.mem, loc)
		kind, ok := block.Identify(b)
		if !ok {
			t.Fatalf("metadata block %d is none", loc)
		}
		for _, f := range fieldsOf(kind, b) {
			for _, v := range values(b[f.off : f.off+f.size]) {
				every := *flipEvery * slow
				if kind != block.Node { // there are fewer of them
					every = max(1, every/16)
				}
				if rng.Intn(every) != 0 {
					continue
				}
				mem := p.mem.Clone()
				w := bytes.Clone(b)
				copy(w[f.off:], v)
				if rng.Intn(4) != 0 {
					binary.LittleEndian.PutUint32(w, block.Checksum(w, kind))
				}
				writeBlock(t, mem, loc, w)
				what := fmt.Sprintf("seed %d: metadata block %d, %v, bytes %d to %d set to % x", seed, loc, kind, f.off, f.off+f.size-1, v)
				tried++
				kinds[kind]++
				r, err := bounded(t, what, mem)
				if err != nil {
					failed++
				} else if !r.Complete {
					lossy++
				}
			}
		}
	}
	t.Logf("%d changes of %v: %d could not be repaired, %d with losses", tried, kinds, failed, lossy)
	if len(kinds) != 4 || failed > tried/10 {
		t.Errorf("%d of %d changes made a repair impossible", failed, tried)
	}
}

// bounded repairs a pool of a megabyte and watches the memory that it takes.
func bounded(t *testing.T, what string, mem *dev.Mem) (*Report, error) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	out := dev.NewMem(mem.Size())
	r, err := Repair(mem, out, Options{DataBlockSize: blockSize, DataBytes: 20000 * blockSize})
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 200<<20 {
		t.Errorf("%s: the repair took %d MiB", what, n>>20)
	}
	if err != nil {
		return nil, err
	}
	c, err := thin.Check(out, thin.CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Clean() || c.Warnings > 0 {
		t.Fatalf("%s: the result is not clean: %v", what, c.Err())
	}
	oneWriter(t, out)
	return r, nil
}

type field struct{ off, size int }

// fieldsOf lists the fields of a block, of repeated ones the first, a middle one and the last.
func fieldsOf(k block.Kind, b []byte) []field {
	fs := []field{{4, 4}, {8, 8}}
	switch k {
	case block.Superblock:
		for _, off := range []int{16, 32, 48, 56, 64, 72, 80, 88, 96, 192, 200, 208, 216, 224, 320, 328, 344} {
			fs = append(fs, field{off, 8})
		}
		for _, off := range []int{40, 44, 336, 340, 352, 356, 360, 364} {
			fs = append(fs, field{off, 4})
		}
	case block.Node:
		fs = append(fs, field{16, 4}, field{20, 4}, field{24, 4}, field{28, 4})
		nr, most, size := int(binary.LittleEndian.Uint32(b[16:])), int(binary.LittleEndian.Uint32(b[20:])), int(binary.LittleEndian.Uint32(b[24:]))
		for _, i := range []int{0, 1, nr / 2, nr - 1} {
			if i < 0 || i >= nr {
				continue
			}
			fs = append(fs, field{32 + 8*i, 8})
			for off := 0; off < size; off += 4 {
				fs = append(fs, field{32 + 8*most + size*i + off, 4})
			}
		}
	default:
		for _, off := range []int{16, 24, 32, 100, 4088} {
			fs = append(fs, field{off, 8})
		}
	}
	return fs
}

func values(old []byte) (all [][]byte) {
	change := func(fn func(v []byte)) {
		v := bytes.Clone(old)
		fn(v)
		if !bytes.Equal(v, old) {
			all = append(all, v)
		}
	}
	for bit := range 8 * len(old) {
		if bit < 9 || bit%7 == 0 || bit == 8*len(old)-1 {
			change(func(v []byte) { v[bit/8] ^= 1 << (bit % 8) })
		}
	}
	change(func(v []byte) { clear(v) })
	change(func(v []byte) {
		for i := range v {
			v[i] = 0xff
		}
	})
	return all
}
