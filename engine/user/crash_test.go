package user

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var crashCuts = flag.Int("crash.cuts", 150, "random power cuts of the crash test in each configuration, beside those at every flush")

const sector = 512

// A version is one change of a sector: a stamped write, or zeros (stamp 0).
type version struct {
	stamp uint64
	begin int // clock
}

// A history knows what each sector of one device may hold after a power cut. One goroutine
// changes the device.
type history struct {
	log     *dev.CrashLog
	id      thin.DevID
	h       engine.Thin
	sectors [][]version
	flushed []flushMark // ascending
	created int         // clock when the creation returned
	deleted int         // clock when the deletion began, 0: never
}

// A flushMark says that everything up to version n[i] of sector i was durable at time end.
type flushMark struct {
	end int
	n   []int
}

func (h *history) marks() []int {
	n := make([]int, len(h.sectors))
	for i, s := range h.sectors {
		n[i] = len(s)
	}
	return n
}

func (h *history) change(off, n int64, stamp func(sector int64) uint64, do func() error) error {
	begin := h.log.Now()
	for s := off / sector; s < (off+n)/sector; s++ {
		h.sectors[s] = append(h.sectors[s], version{stamp(s), begin})
	}
	return do()
}

func zeroStamp(int64) uint64 { return 0 }

// check compares a device after a cut with what it may hold.
func (h *history) check(p *Pool, cut int, size int64) error {
	d, err := p.Open(ctx, h.id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
	if errors.Is(err, thin.ErrNotFound) {
		if cut >= h.created && (h.deleted == 0 || cut < h.deleted) {
			return fmt.Errorf("thin %d is gone: it was created at %d", h.id, h.created)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if h.deleted != 0 && cut >= h.deleted {
		return nil // it may be there, in part
	}
	buf := make([]byte, size)
	if _, err := d.ReadAt(buf, 0); err != nil {
		return err
	}
	sure := make([]int, len(h.sectors))
	for _, f := range h.flushed {
		if f.end <= cut {
			sure = f.n
		}
	}
	for i, vs := range h.sectors {
		b := buf[i*sector : (i+1)*sector]
		got := binary.LittleEndian.Uint64(b)
		for j := 8; j < sector; j += 8 {
			if v := binary.LittleEndian.Uint64(b[j:]); v != got {
				return fmt.Errorf("thin %d, sector %d: torn: %#x and %#x", h.id, i, got, v)
			}
		}
		last := uint64(0)
		if sure[i] > 0 {
			last = vs[sure[i]-1].stamp
		}
		ok := got == last
		for _, v := range vs[sure[i]:] {
			ok = ok || v.begin <= cut && v.stamp == got
		}
		if !ok {
			return fmt.Errorf("thin %d, sector %d: stamp %#x, want %#x (%d of %d versions durable) or a later one",
				h.id, i, got, last, sure[i], len(vs))
		}
	}
	return nil
}

// TestCrash cuts the power of a busy pool at every flush and at random points between, with
// writes that no flush covers kept, lost, reordered and torn, and opens what is left.
func TestCrash(t *testing.T) {
	for i, c := range []struct {
		bs   int64
		opts Options
	}{
		{64 << 10, Options{CommitInterval: 5 * time.Millisecond}},
		{64 << 10, Options{CommitInterval: time.Hour, TableCacheBytes: 1}},
		{128 << 10, Options{CommitInterval: time.Hour, NoDiscardPassdown: true, MaxPending: 2}},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) { crashTest(t, c.bs, c.opts, testSeed(t)) })
	}
}

func crashTest(t *testing.T, bs int64, o Options, seed uint64) {
	const workers, ops = 4, 120
	size := 6*bs + 4096
	o.ErrorIfNoSpace = true
	meta, data := dev.NewMem(2<<20), dev.NewMem(bs*workers*7*4)
	must(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: bs, DataBlocks: uint64(data.Size() / bs)}))
	log := dev.NewCrashLog()
	rm, err := log.Wrap(meta)
	must(t, err)
	rd, err := log.Wrap(data)
	must(t, err)
	p, err := New(rm, rd, o)
	must(t, err)
	var mu sync.Mutex
	var all []*history
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			hs, err := crashWorker(p, log, rand.New(rand.NewPCG(seed, uint64(w))), thin.DevID(1+w*1000), size, ops)
			if err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
			mu.Lock()
			all = append(all, hs...)
			mu.Unlock()
		}()
	}
	wg.Wait()
	must(t, p.Close())
	if t.Failed() {
		return
	}

	ends := log.FlushEnds()
	now := log.Now()
	rng := rand.New(rand.NewPCG(seed, 99))
	var cuts []int
	for _, e := range ends {
		cuts = append(cuts, e-1, e)
	}
	for range *crashCuts {
		cuts = append(cuts, 1+rng.IntN(now))
	}
	rng.Shuffle(len(cuts), func(i, j int) { cuts[i], cuts[j] = cuts[j], cuts[i] })
	cuts = cuts[:len(cuts)/slow]
	modes := []dev.CrashMode{dev.CrashKeep, dev.CrashLose, dev.CrashRandom, dev.CrashTorn}
	for k, cut := range cuts {
		mode := modes[k%len(modes)]
		m := log.Image(rm, cut, mode, 4096, rng)
		d := log.Image(rd, cut, mode, sector, rng)
		if err := crashCheck(t, m, d, all, cut, size); err != nil {
			t.Fatalf("seed %d, cut at %d of %d, unflushed writes: %v: %v", seed, cut, now, mode, err)
		}
	}
	t.Logf("%d flushes, %d cuts, %d devices", len(ends), len(cuts), len(all))
}

func crashCheck(t *testing.T, m, d *dev.Mem, all []*history, cut int, size int64) error {
	rep, err := thin.Check(m.Clone(), thin.CheckOptions{})
	if err != nil {
		return err
	}
	if len(rep.Findings) > 0 {
		return fmt.Errorf("check: %d findings, the first: %s", len(rep.Findings), rep.Findings[0].String())
	}
	p, err := New(m, d, Options{Logger: quiet})
	if err != nil {
		return err
	}
	defer p.Close()
	for _, h := range all {
		if err := h.check(p, cut, size); err != nil {
			return err
		}
	}
	return nil
}

// crashWorker changes devices with ids from first on.
func crashWorker(p *Pool, log *dev.CrashLog, rng *rand.Rand, first thin.DevID, size int64, ops int) (all []*history, err error) {
	next := first
	var live []*history
	add := func(h *history, create func(id thin.DevID) error) error {
		h.log, h.id = log, next
		next++
		if err := create(h.id); err != nil {
			return err
		}
		h.created = log.Now()
		all = append(all, h)
		h.flushed = append(h.flushed, flushMark{h.created, h.marks()})
		var err error
		if h.h, err = p.Open(ctx, h.id, engine.OpenOptions{SizeBytes: size}); err == nil {
			live = append(live, h)
		}
		return err
	}
	defer func() {
		for _, h := range live {
			err = errors.Join(err, h.h.Close())
		}
	}()
	if err := add(&history{sectors: make([][]version, size/sector)}, func(id thin.DevID) error { return p.CreateThin(ctx, id) }); err != nil {
		return all, err
	}
	bs := live[0].h.BlockSize()
	stamp := uint64(first) << 32
	buf := make([]byte, size)
	for range ops {
		i := rng.IntN(len(live))
		h := live[i]
		off := rng.Int64N(size/sector) * sector
		n := min(size-off, sector*(1+rng.Int64N(40)))
		if rng.IntN(5) == 0 {
			off = off / bs * bs
			n = min(size-off, bs)
		}
		switch rng.IntN(12) {
		case 0, 1:
			// Everything acknowledged so far; later versions do not count.
			n := h.marks()
			if err := h.h.Flush(); err != nil {
				return all, err
			}
			h.flushed = append(h.flushed, flushMark{log.Now(), n})
		case 2:
			err = h.change(off, n, zeroStamp, func() error { return h.h.WriteZeroes(off, n, rng.IntN(3) == 0) })
		case 3:
			begin, end := (off+bs-1)/bs*bs, (off+n)/bs*bs
			err = h.change(begin, max(0, end-begin), zeroStamp, func() error { return h.h.Discard(off, n) })
		case 4:
			if len(live) < 3 {
				s := &history{sectors: make([][]version, len(h.sectors))}
				for k, vs := range h.sectors {
					if len(vs) > 0 { // what it holds at this moment, once and for all
						s.sectors[k] = []version{vs[len(vs)-1]}
					}
				}
				err = add(s, func(id thin.DevID) error { return p.CreateSnap(ctx, id, h.id) })
			}
		case 5:
			if len(live) == 3 {
				if err := h.h.Close(); err != nil {
					return all, err
				}
				live = append(live[:i], live[i+1:]...)
				h.deleted = log.Now()
				err = p.Delete(ctx, h.id)
			}
		default:
			stamp++
			this := stamp
			for k := int64(0); k < n; k += 8 {
				binary.LittleEndian.PutUint64(buf[k:], this)
			}
			err = h.change(off, n, func(int64) uint64 { return this }, func() error {
				_, err := h.h.WriteAt(buf[:n], off)
				return err
			})
		}
		if err != nil {
			return all, err
		}
	}
	return all, nil
}
