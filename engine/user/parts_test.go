package user

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// TestZeroedPartsUnmapBlocks: a block whose parts were zeroed one by one is unmapped, one that
// has a byte left is not.
func TestZeroedPartsUnmapBlocks(t *testing.T) {
	for _, bs := range []int64{64 << 10, 192 << 10, 1 << 20, 4 << 20} {
		t.Run(fmt.Sprintf("bs=%dKiB", bs>>10), func(t *testing.T) {
			tp := newPool(t, poolSize{bs: bs, dataBlocks: 16}, still)
			tp.create(1)
			h := tp.thin(1, 8*bs)
			mapped := func(want uint64) {
				t.Helper()
				if n := h.MappedBlocks(); n != want {
					t.Errorf("%d blocks mapped, want %d", n, want)
				}
			}
			zero := func(off, n int64) { t.Helper(); must(t, h.WriteZeroes(off, n, false)) }

			// A small file in a fresh block, deleted.
			write(t, h, fill(1, 8192), 4096)
			mapped(1)
			zero(4096, 4096)
			mapped(1)
			zero(8192, 4096)
			mapped(0)
			// All of a block, in pieces out of order.
			write(t, h, fill(1, 2*bs), 0)
			for off := bs - 4096; off >= 0; off -= 4096 {
				mapped(2)
				zero(off, 4096)
			}
			mapped(1)
			wantBytes(t, h, 0, bs, 0)
			wantBytes(t, h, 1, bs, bs)
			// A write between keeps it.
			for off := bs; off < 2*bs; off += 8192 {
				zero(off, 4096)
			}
			write(t, h, fill(2, 1), bs+100)
			for off := bs + 4096; off < 2*bs; off += 8192 {
				zero(off, 4096)
			}
			mapped(1)
			wantBytes(t, h, 2, 1, bs+100)
			wantBytes(t, h, 0, bs-101, bs+101)
			zero(bs, 512) // less than a part: zero, but not known to be
			mapped(1)
			zero(bs, 4096)
			mapped(0)
			// Kept where it is asked for.
			write(t, h, fill(1, 4096), 0)
			must(t, h.WriteZeroes(0, 4096, true))
			must(t, h.WriteZeroes(0, bs, true))
			mapped(1)
			wantBytes(t, h, 0, bs, 0)
			zero(0, bs)
			mapped(0)
			must(t, tp.p.Commit(ctx))
			if s := tp.status(); s.DataUsed+s.DataFreeing != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestZeroedPartsOfSharedBlocks: zeroing a part of a snapshot's block copies it; when all of the
// copy is zero it goes, and the other device keeps its contents.
func TestZeroedPartsOfSharedBlocks(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 8192), block+8192)
	write(t, h, fill(1, block), 2*block)
	tp.snap(2, 1)
	s := tp.thin(2, 1<<20)
	must(t, s.WriteZeroes(block+8192, 4096, false))
	must(t, s.WriteZeroes(block+8192+4096, 4096, false))
	must(t, s.WriteZeroes(2*block, block, false))
	if n := s.MappedBlocks(); n != 0 {
		t.Errorf("%d blocks of the snapshot are mapped, want none", n)
	}
	wantBytes(t, s, 0, 1<<20, 0)
	wantBytes(t, h, 1, 8192, block+8192)
	wantBytes(t, h, 1, block, 2*block)
	if n := h.MappedBlocks(); n != 2 {
		t.Errorf("%d blocks of the origin are mapped, want 2", n)
	}
}

// TestZeroedPartsAfterReopening: parts that were never written are holes of the data file, which
// is remembered by the file system.
func TestZeroedPartsAfterReopening(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 8192), 4096)
	h.Close()
	tp.reopen()
	h = tp.thin(1, 1<<20)
	must(t, h.WriteZeroes(4096, 8192, false))
	if n := h.MappedBlocks(); n != 0 {
		t.Errorf("%d blocks mapped, want none", n)
	}
}

// TestZeroMapsAreBounded drops maps when there are many, which costs nothing but the hint.
func TestZeroMapsAreBounded(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	var z zeroMaps
	z.init(block)
	limit := partsMaxBytes / 72
	first := &zeroMap{words: make([]atomic.Uint64, 1)}
	z.add(first)
	for range limit {
		z.add(&zeroMap{words: make([]atomic.Uint64, 1)})
	}
	if !first.gone.Load() || len(z.ring) != limit {
		t.Errorf("the first of %d maps is kept, or %d of %d are remembered", limit+1, len(z.ring), limit)
	}
	// A map that was dropped is made anew.
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 8192), 0)
	h.d.table.at(0).parts(0).gone.Store(true)
	must(t, h.WriteZeroes(0, 8192, false))
	if n := h.MappedBlocks(); n != 0 {
		t.Errorf("%d blocks mapped, want none", n)
	}
}

// holdWrite makes the next data write wait until the returned function is called; held is closed
// when it has come.
func (tp *testPool) holdWrite() (held chan struct{}, release func()) {
	held, ch := make(chan struct{}), make(chan struct{})
	tp.data.Add(dev.Rule{Ops: dev.OpWrite, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { close(held); <-ch }})
	return held, sync.OnceFunc(func() { close(ch) })
}

// TestUnmappingWaitsForUntrackedWriters: a write in place that began before anything was known of
// the block's parts is waited for, and what it writes stays.
func TestUnmappingWaitsForUntrackedWriters(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 4096), 4096)
	h.Close()
	tp.reopen() // the rest of the block is a hole of the data device, nothing is remembered
	h = tp.thin(1, 1<<20)
	read(t, h, 1, 0)
	held, release := tp.holdWrite()
	defer release()
	wrote, zeroed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := h.WriteAt(fill(2, 4096), 16<<10)
		wrote <- err
	}()
	<-held
	go func() { zeroed <- h.WriteZeroes(4096, 4096, false) }()
	select {
	case <-zeroed:
		t.Error("the block was unmapped beside a write in place")
	case <-time.After(30 * time.Millisecond):
	}
	release()
	must(t, <-wrote)
	if !t.Failed() {
		must(t, <-zeroed)
	}
	wantBytes(t, h, 2, 4096, 16<<10)
	wantBytes(t, h, 0, 4096, 4096)
}

// TestUnmappingAndWritersExclude: no block is unmapped under a writer in place, and no writer goes
// in place while one is being unmapped.
func TestUnmappingAndWritersExclude(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 4096), 0)
	write(t, h, fill(1, 4096), block)
	l := h.d.table.at(0)
	dir := l.zero.Load()
	if !dir.enter() {
		t.Fatal("a writer was refused while nothing is being unmapped")
	}
	must(t, h.WriteZeroes(0, 4096, false))
	if n := h.MappedBlocks(); n != 2 {
		t.Errorf("%d blocks mapped: one was unmapped under a writer", n)
	}
	dir.exit()
	must(t, h.WriteZeroes(0, 4096, false))
	if n := h.MappedBlocks(); n != 1 {
		t.Errorf("%d blocks mapped, want 1", n)
	}
	dir.unmapping.Add(1)
	if err := h.TryWriteAt(fill(2, 512), block); err == nil {
		t.Error("a write went in place while a block is being unmapped")
	}
	if n, err := h.writeMapped(bytesOf(fill(2, 512)), block); n != 0 || err != nil {
		t.Errorf("a write in place while a block is being unmapped: %d, %v", n, err)
	}
	write(t, h, fill(2, 512), block) // under the block's lock it goes
	dir.unmapping.Add(-1)
	wantBytes(t, h, 2, 512, block)
}

// TestWrongHintsDoNoHarm: parts that are called zero and are not.
func TestWrongHintsDoNoHarm(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	h := tp.thin(1, 1<<20)
	write(t, h, fill(1, 4096), 0)
	write(t, h, fill(2, 4096), 8192)
	h.d.table.at(0).parts(0).set(0, block)
	must(t, h.WriteZeroes(0, 4096, false))
	wantBytes(t, h, 2, 4096, 8192)
	if n := h.MappedBlocks(); n != 1 {
		t.Errorf("%d blocks mapped, want 1", n)
	}
}

// TestLanes lets goroutines write, zero and read lanes of one device that are interleaved in
// every block, while snapshots are taken, checked and deleted. Whatever one does to a block
// must not disturb the others' lanes.
func TestLanes(t *testing.T) {
	for _, c := range []struct {
		name string
		bs   int64
		lane int64
		opts Options
	}{
		{"parts", 64 << 10, 4096, Options{CommitInterval: time.Millisecond}},
		{"half parts", 64 << 10, 2048, Options{CommitInterval: time.Millisecond, NoDiscardPassdown: true}},
		{"tiny caches", 64 << 10, 4096, Options{TableCacheBytes: 1, MaxPending: 2}},
		{"128 KiB", 128 << 10, 8192, Options{}},
	} {
		t.Run(c.name, func(t *testing.T) { lanes(t, c.bs, c.lane, c.opts, testSeed(t)) })
	}
}

func lanes(t *testing.T, bs, lane int64, o Options, seed uint64) {
	const workers, rounds = 8, 600
	size := 3 * bs
	tp := newPool(t, poolSize{bs: bs, dataBlocks: 256}, o)
	tp.create(1)
	h := tp.thin(1, size)
	perLane := size / lane / workers
	var wg sync.WaitGroup
	var done atomic.Int32
	for w := range int64(workers) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer done.Add(1)
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			want := make([]byte, perLane) // the byte that each place of the lane holds
			buf := make([]byte, lane)
			for r := range rounds {
				i := rng.Int64N(perLane)
				off := (i*workers + w) * lane
				var err error
				switch k := rng.IntN(10); {
				case k < 3:
					want[i] = byte(1 + (r+int(w))%255)
					_, err = h.WriteAt(fill(want[i], lane), off)
				case k < 4:
					want[i] = byte(1 + (r+int(w))%255)
					if h.TryWriteAt(fill(want[i], lane), off) != nil {
						_, err = h.WriteAt(fill(want[i], lane), off)
					}
				case k < 8:
					want[i] = 0
					err = h.WriteZeroes(off, lane, k == 7 && rng.IntN(4) == 0)
				default:
					if _, err = h.ReadAt(buf, off); err == nil && !bytes.Equal(buf, fill(want[i], lane)) {
						err = fmt.Errorf("place %d holds %#x ... %#x, want %#x", i, buf[0], buf[lane-1], want[i])
					}
				}
				if err != nil {
					t.Errorf("lane %d, round %d, seed %d: %v", w, r, seed, err)
					return
				}
				if r%50 == 0 { // let the whole device become zero now and then
					for i := range want {
						want[i] = 0
						if err := h.WriteZeroes((int64(i)*workers+w)*lane, lane, false); err != nil {
							t.Error(err)
							return
						}
					}
				}
			}
			for i := range want {
				if _, err := h.ReadAt(buf, (int64(i)*workers+w)*lane); err != nil || !bytes.Equal(buf, fill(want[i], lane)) {
					t.Errorf("lane %d, seed %d, at the end: place %d holds %#x, want %#x (%v)", w, seed, i, buf[0], want[i], err)
				}
			}
		}()
	}
	// Each place of a snapshot holds one value.
	p := make([]byte, size)
	for id := thin.DevID(2); done.Load() < workers; id++ {
		must(t, tp.p.CreateSnap(ctx, id, 1))
		s, err := tp.p.Open(ctx, id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
		must(t, err)
		_, err = s.ReadAt(p, 0)
		must(t, err)
		for off := int64(0); off < size; off += lane {
			if q := p[off : off+lane]; !bytes.Equal(q, fill(q[0], lane)) {
				t.Errorf("snapshot %d: place at %d holds half of a write", id, off)
			}
		}
		must(t, s.Close())
		must(t, tp.p.Delete(ctx, id))
	}
	wg.Wait()
}
