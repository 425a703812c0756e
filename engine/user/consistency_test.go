package user

import (
	"bytes"
	"encoding/binary"
	"errors"
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

func testSeed(t *testing.T) uint64 {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	return seed
}

// TestSnapshotsHoldPrefixes lets 16 writers write numbered records. Each record says how many
// records of every writer had been acknowledged before it began. A snapshot must hold all
// records acknowledged before it was asked for, none begun after it returned, of each writer
// all up to the last one, and with a record all that the record knows of.
func TestSnapshotsHoldPrefixes(t *testing.T) {
	snapshotsHoldPrefixes(t, Options{CommitInterval: 3 * time.Millisecond})
}

func snapshotsHoldPrefixes(t *testing.T, o Options) {
	const (
		writers = 16
		slots   = 40 // records kept of each writer, one every 20 KiB
		stride  = 20 << 10
		area    = slots * stride
		recLen  = 8 * (2 + writers)
		snaps   = 60 / slow
	)
	tp := newPool(t, poolSize{dataBlocks: 2000}, o)
	tp.create(1)
	const size = writers * area
	h := tp.thin(1, size)
	var begun, acked [writers]atomic.Uint64
	var stop atomic.Bool
	var wg sync.WaitGroup
	fail := make(chan error, writers+1)
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rec := make([]byte, 6000)
			for n := uint64(1); !stop.Load(); n++ {
				binary.LittleEndian.PutUint64(rec, uint64(w+1))
				binary.LittleEndian.PutUint64(rec[8:], n)
				for v := range writers {
					binary.LittleEndian.PutUint64(rec[16+8*v:], acked[v].Load())
				}
				begun[w].Store(n)
				if _, err := h.WriteAt(rec, int64(w)*area+int64(n%slots)*stride); err != nil {
					fail <- err
					return
				}
				acked[w].Store(n)
				if n%32 == 0 && w%4 == 0 {
					if err := h.Flush(); err != nil {
						fail <- err
						return
					}
				}
			}
		}()
	}
	check := func(id thin.DevID, before, after [writers]uint64) error {
		s, err := tp.p.Open(ctx, id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
		if err != nil {
			return err
		}
		defer s.Close()
		var last [writers]uint64
		var knows [writers][writers]uint64
		rec := make([]byte, recLen)
		for w := range writers {
			var have [slots]uint64
			for i := range slots {
				if _, err := s.ReadAt(rec, int64(w)*area+int64(i)*stride); err != nil {
					return err
				}
				n := binary.LittleEndian.Uint64(rec[8:])
				have[i] = n
				if n > last[w] {
					last[w] = n
					for v := range writers {
						knows[w][v] = binary.LittleEndian.Uint64(rec[16+8*v:])
					}
				}
			}
			if last[w] < before[w] {
				return fmt.Errorf("snapshot %d: writer %d is at %d, %d was acknowledged before the call", id, w, last[w], before[w])
			}
			if last[w] > after[w] {
				return fmt.Errorf("snapshot %d: writer %d is at %d, only %d had begun at the return", id, w, last[w], after[w])
			}
			for n := last[w]; n > 0 && n+slots > last[w]; n-- {
				if have[n%slots] != n {
					return fmt.Errorf("snapshot %d: writer %d is at %d, but record %d is %d", id, w, last[w], n, have[n%slots])
				}
			}
		}
		for w := range writers {
			for v := range writers {
				if knows[w][v] > last[v] {
					return fmt.Errorf("snapshot %d: record %d of writer %d knows record %d of writer %d, which is at %d",
						id, last[w], w, knows[w][v], v, last[v])
				}
			}
		}
		return nil
	}
	for i := range snaps {
		var before, after [writers]uint64
		for w := range writers {
			before[w] = acked[w].Load()
		}
		id := thin.DevID(10 + i)
		if err := tp.p.CreateSnap(ctx, id, 1); err != nil {
			t.Fatal(err)
		}
		for w := range writers {
			after[w] = begun[w].Load()
		}
		if err := check(id, before, after); err != nil {
			t.Error(err)
			break
		}
		if i > 3 {
			must(t, tp.p.Delete(ctx, id-3))
		}
	}
	stop.Store(true)
	wg.Wait()
	select {
	case err := <-fail:
		t.Fatal(err)
	default:
	}
	total := uint64(0)
	for w := range writers {
		total += acked[w].Load()
	}
	t.Logf("%d records", total)
}

// TestSnapshotsOfOneMomentAgree takes several snapshots of one origin in one call while it is
// written; they must be equal. So must two origins' snapshots with respect to writes that are
// ordered across the origins.
func TestSnapshotsOfOneMomentAgree(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{})
	tp.create(1)
	tp.create(2)
	a, b := tp.thin(1, 1<<20), tp.thin(2, 1<<20)
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		p := make([]byte, 8)
		for n := uint64(1); !stop.Load(); n++ {
			binary.LittleEndian.PutUint64(p, n)
			for _, h := range []*Thin{a, b} {
				if _, err := h.WriteAt(p, 4096*int64(n%16)); err != nil {
					done <- err
					return
				}
			}
		}
		done <- nil
	}()
	newest := func(id thin.DevID) (n uint64) {
		s := tp.thinWith(id, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true})
		defer s.Close()
		for i := range int64(16) {
			n = max(n, binary.LittleEndian.Uint64(read(t, s, 8, 4096*i)))
		}
		return n
	}
	for i := range 100 {
		id := thin.DevID(10 + 4*i)
		must(t, tp.p.CreateSnaps(ctx, []engine.SnapPair{{ID: id, Origin: 1}, {ID: id + 1, Origin: 2}, {ID: id + 2, Origin: 1}, {ID: id + 3, Origin: 2}}))
		n := [4]uint64{newest(id), newest(id + 1), newest(id + 2), newest(id + 3)}
		if n[0] != n[2] || n[1] != n[3] || n[0] < n[1] || n[0] > n[1]+1 {
			t.Fatalf("round %d: snapshots of one moment are at %v", i, n)
		}
		for k := range thin.DevID(4) {
			must(t, tp.p.Delete(ctx, id+k))
		}
	}
	stop.Store(true)
	must(t, <-done)
}

// TestIsolation writes a tag into every sector of many short-lived devices of a small pool, and
// looks for tags of others in everything that is read.
func TestIsolation(t *testing.T) {
	for _, c := range []struct {
		name      string
		bs        int64
		devBlocks int64
		opts      Options
	}{
		{"punching", 64 << 10, 12, Options{}},
		{"not punching", 64 << 10, 12, Options{NoDiscardPassdown: true}},
		{"tiny caches", 64 << 10, 12, Options{TableCacheBytes: 1, MaxPending: 4, NoDiscardPassdown: true}},
		{"blocks of two pieces", 1088 << 10, 3, Options{NoDiscardPassdown: true, CommitInterval: time.Millisecond}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := testSeed(t)
			c.opts.NoSpaceTimeout = 20 * time.Millisecond
			const workers, rounds = 6, 50 / slow
			tp := newPool(t, poolSize{bs: c.bs, dataBlocks: uint64((workers + 1) * c.devBlocks)}, c.opts)
			var wg sync.WaitGroup
			for w := range workers {
				wg.Add(1)
				go func() {
					defer wg.Done()
					rng := rand.New(rand.NewPCG(seed, uint64(w)))
					for r := range rounds {
						id := thin.DevID(1 + w + r*workers*2)
						if err := isolationRound(tp.p, rng, id, id+workers, c.devBlocks*c.bs); err != nil {
							t.Errorf("worker %d, round %d: %v", w, r, err)
							return
						}
					}
				}()
			}
			wg.Wait()
		})
	}
}

// isolationRound is the life of a device and its snapshot: both have the tag of the first.
func isolationRound(p *Pool, rng *rand.Rand, id, snap thin.DevID, size int64) error {
	if err := p.CreateThin(ctx, id); err != nil {
		return err
	}
	open := func(id thin.DevID) (engine.Thin, error) {
		return p.Open(ctx, id, engine.OpenOptions{SizeBytes: size})
	}
	h, err := open(id)
	if err != nil {
		return err
	}
	defer func() { h.Close() }()
	tag := make([]byte, size)
	for i := 0; i < len(tag); i += 8 {
		binary.LittleEndian.PutUint64(tag[i:], uint64(id)<<32|0xABCDEF01)
	}
	var readers sync.WaitGroup
	stop := make(chan struct{})
	var foreign atomic.Pointer[string]
	look := func(h dev.Device) {
		defer readers.Done()
		buf, at := make([]byte, size), int64(0)
		for last := false; ; {
			select {
			case <-stop:
				last = true
			default:
			}
			b := buf
			if !last { // a part at a time, from the end towards the beginning
				at = (at + size - 100<<10) % size / 8 * 8
				b = buf[at:min(at+100<<10, size)]
			}
			if _, err := h.ReadAt(b, int64(cap(buf)-cap(b))); err != nil {
				if !errors.Is(err, dev.ErrClosed) {
					s := err.Error()
					foreign.Store(&s)
				}
				return
			}
			for i := 0; i < len(b); i += 512 {
				sector := b[i:min(i+512, len(b))]
				if bytes.Equal(sector, tag[:len(sector)]) || bytes.Equal(sector, zeroBuf[:len(sector)]) {
					continue
				}
				for j := 0; j < len(sector); j += 8 {
					if v := binary.LittleEndian.Uint64(sector[j:]); v != 0 && v != uint64(id)<<32|0xABCDEF01 {
						s := fmt.Sprintf("thin %d: byte %d holds %#x, a stranger's data", id, cap(buf)-cap(b)+i+j, v)
						foreign.Store(&s)
						return
					}
				}
			}
			time.Sleep(20 * time.Microsecond)
			if last {
				return
			}
		}
	}
	readers.Add(1)
	go look(h)
	var s engine.Thin
	for range 40 {
		d := h
		if s != nil && rng.IntN(2) == 0 {
			d = s
		}
		n := 8 * (1 + rng.Int64N(2000))
		if rng.IntN(6) == 0 {
			n = size / 4
		}
		off := rng.Int64N((size-n)/8+1) * 8
		var err error
		switch rng.IntN(12) {
		case 0:
			err = d.Discard(off, size/3)
			if errors.Is(err, dev.ErrOutOfRange) {
				err = nil
			}
		case 1:
			err = d.WriteZeroes(off, n, false)
		case 2:
			err = d.Flush()
		case 3:
			if s == nil {
				if err = p.CreateSnap(ctx, snap, id); err == nil {
					if s, err = open(snap); err == nil {
						defer func() { s.Close() }()
						readers.Add(1)
						go look(s)
					}
				}
			}
		default:
			_, err = d.WriteAt(tag[:n], off)
		}
		if err != nil && !errors.Is(err, dev.ErrNoSpace) {
			close(stop)
			readers.Wait()
			return err
		}
	}
	close(stop)
	readers.Wait()
	if f := foreign.Load(); f != nil {
		return errors.New(*f)
	}
	h.Close()
	if s != nil {
		s.Close()
		if err := p.Delete(ctx, snap); err != nil {
			return err
		}
	}
	return p.Delete(ctx, id)
}
