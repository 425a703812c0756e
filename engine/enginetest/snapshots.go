package enginetest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"mica/engine"
	"mica/thin"
)

// recursiveSnapshots makes snapshots of snapshots, a block changed in each, and deletes them in
// any order: every one that is left keeps what it held.
func recursiveSnapshots(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	rng := random(t)
	const size = 4 * mib
	blocks := int(size / p.bs)
	n := max(20, 200/e.Slow)
	holds := map[thin.DevID][]byte{} // the first byte of every block
	cur := make([]byte, blocks)
	p.create(0)
	for i := range n {
		id := thin.DevID(i)
		if i > 0 {
			p.snap(id, id-1)
		}
		b := rng.IntN(blocks)
		cur[b] = byte(1 + i%255)
		d := p.thin(id, size)
		p.write(d, cur[b], 512, int64(b)*p.bs)
		if i%50 == 0 {
			p.must(d.Flush())
		}
		p.done(d)
		holds[id] = append([]byte(nil), cur...)
	}
	verify := func(id thin.DevID) {
		t.Helper()
		d := p.view(id, size)
		defer p.done(d)
		for b, c := range holds[id] {
			p.want(d, c, 512, int64(b)*p.bs)
		}
	}
	order := rng.Perm(n)
	for i, k := range order {
		id := thin.DevID(k)
		if i%10 == 0 {
			verify(id)
		}
		p.remove(id)
		delete(holds, id)
		if i%20 == 0 && i+1 < n {
			verify(thin.DevID(order[i+1]))
			verify(thin.DevID(order[n-1]))
		}
	}
	if used := p.used(); used != 0 {
		t.Errorf("%d blocks are used when all is deleted", used)
	}
}

// A stomper writes numbered patterns over random blocks of a device and knows what each block
// must hold.
type stomper struct {
	p     *pool
	seeds []uint64 // by piece
	next  *uint64
}

const stompPiece = 16 * kib // smaller than a block: sharing is broken by copying

func newStomper(p *pool, size int64, next *uint64) *stomper {
	return &stomper{p, make([]uint64, size/stompPiece), next}
}

func (s *stomper) clone() *stomper {
	return &stomper{s.p, append([]uint64(nil), s.seeds...), s.next}
}

func stompPattern(b []byte, seed uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], seed*0x9e3779b97f4a7c15+uint64(i))
	}
	if seed == 0 {
		clear(b)
	}
}

// stomp writes over every n-th piece, from a random one on.
func (s *stomper) stomp(d engine.Thin, first, every int) {
	s.p.Helper()
	b := make([]byte, stompPiece)
	for i := first; i < len(s.seeds); i += every {
		*s.next++
		s.seeds[i] = *s.next
		stompPattern(b, s.seeds[i])
		if _, err := d.WriteAt(b, int64(i)*stompPiece); err != nil {
			s.p.Fatal(err)
		}
	}
}

func (s *stomper) verify(what string, d engine.Thin) {
	s.p.Helper()
	got, want := make([]byte, stompPiece), make([]byte, stompPiece)
	for i, seed := range s.seeds {
		if _, err := d.ReadAt(got, int64(i)*stompPiece); err != nil {
			s.p.Fatal(err)
		}
		stompPattern(want, seed)
		if string(got) != string(want) {
			s.p.Fatalf("%s: piece %d does not hold pattern %d", what, i, seed)
		}
	}
}

// patternStomping: what is written over an origin does not show in its snapshots, nor the other
// way round, over several generations, also while both are open.
func patternStomping(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	rng := random(t)
	const size = 4 * mib
	next := uint64(0)
	p.create(0)
	origin := newStomper(p, size, &next)
	d := p.thin(0, size)
	origin.stomp(d, 0, 1)
	snaps := map[thin.DevID]*stomper{}
	rounds := max(3, 8/e.Slow)
	for i := 1; i <= rounds; i++ {
		id := thin.DevID(i)
		p.snap(id, 0)
		snaps[id] = origin.clone()
		origin.stomp(d, rng.IntN(8), 1+rng.IntN(8))
		if i%2 == 0 { // the snapshot is written to as well
			s := p.thin(id, size)
			snaps[id].stomp(s, rng.IntN(8), 1+rng.IntN(8))
			snaps[id].verify(fmt.Sprintf("snapshot %d, open", i), s)
			origin.stomp(d, rng.IntN(8), 3)
			p.done(s)
		}
		origin.verify("origin", d)
		for id, s := range snaps {
			v := p.view(id, size)
			s.verify(fmt.Sprintf("round %d, snapshot %d", i, id), v)
			p.done(v)
		}
	}
	p.must(d.Flush())
	p.reopen()
	v := p.view(0, size)
	origin.verify("origin, reopened", v)
	for id, s := range snaps {
		s.verify(fmt.Sprintf("snapshot %d, reopened", id), p.view(id, size))
	}
}

// prefixes lets writers write numbered records, each after the one before was acknowledged. A
// snapshot holds, of each writer, all records up to one that is not older than the last
// acknowledged before the call, and not younger than the last begun at its return; and with a
// record all that its writer had seen of the others.
func prefixes(t *testing.T, e Engine) {
	const (
		writers = 4
		slots   = 20
		stride  = 24 * kib
		area    = slots * stride
		size    = writers * area
		recLen  = 8 * (2 + writers)
	)
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, size)
	var begun, acked [writers]atomic.Uint64
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rec := make([]byte, 4096)
			for n := uint64(1); !stop.Load(); n++ {
				binary.LittleEndian.PutUint64(rec, uint64(w+1))
				binary.LittleEndian.PutUint64(rec[8:], n)
				for v := range writers {
					binary.LittleEndian.PutUint64(rec[16+8*v:], acked[v].Load())
				}
				begun[w].Store(n)
				if _, err := d.WriteAt(rec, int64(w)*area+int64(n%slots)*stride); err != nil {
					t.Error(err)
					return
				}
				acked[w].Store(n)
			}
		})
	}
	defer wg.Wait()
	defer stop.Store(true)
	for i := range max(8, 40/e.Slow) {
		var before, after [writers]uint64
		for w := range writers {
			before[w] = acked[w].Load()
		}
		id := thin.DevID(10 + i)
		p.snap(id, 1)
		for w := range writers {
			after[w] = begun[w].Load()
		}
		s := p.view(id, size)
		var last [writers]uint64
		var knows [writers][writers]uint64
		rec := make([]byte, recLen)
		for w := range writers {
			var have [slots]uint64
			for k := range slots {
				if _, err := s.ReadAt(rec, int64(w)*area+int64(k)*stride); err != nil {
					t.Fatal(err)
				}
				have[k] = binary.LittleEndian.Uint64(rec[8:])
				if have[k] > last[w] {
					last[w] = have[k]
					for v := range writers {
						knows[w][v] = binary.LittleEndian.Uint64(rec[16+8*v:])
					}
				}
			}
			if last[w] < before[w] || last[w] > after[w] {
				t.Errorf("snapshot %d: writer %d is at %d, want %d to %d", id, w, last[w], before[w], after[w])
			}
			for n := last[w]; n > 0 && n+slots > last[w]; n-- {
				if have[n%slots] != n {
					t.Errorf("snapshot %d: writer %d is at %d, but record %d is %d", id, w, last[w], n, have[n%slots])
				}
			}
		}
		for w := range writers {
			for v := range writers {
				if knows[w][v] > last[v] {
					t.Errorf("snapshot %d: record %d of writer %d knows record %d of writer %d, which is at %d", id, last[w], w, knows[w][v], v, last[v])
				}
			}
		}
		p.done(s)
		p.remove(id)
		if t.Failed() {
			return
		}
	}
}

// oneMoment: snapshots of one origin made in one step hold the same, while somebody writes.
func oneMoment(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1, 2)
	a, b := p.thin(1, mib), p.thin(2, mib)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		rec := make([]byte, 512)
		for n := uint64(1); !stop.Load(); n++ {
			binary.LittleEndian.PutUint64(rec, n)
			for _, d := range []engine.Thin{a, b} { // a first
				if _, err := d.WriteAt(rec, int64(n%3)*100*kib); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	defer wg.Wait()
	defer stop.Store(true)
	newest := func(id thin.DevID) (n uint64) {
		d := p.view(id, mib)
		defer p.done(d)
		rec := make([]byte, 512)
		for i := range int64(3) {
			if _, err := d.ReadAt(rec, i*100*kib); err != nil {
				t.Fatal(err)
			}
			n = max(n, binary.LittleEndian.Uint64(rec))
		}
		return n
	}
	for i := range max(5, 20/e.Slow) {
		p.must(p.p.CreateSnaps(ctx, []engine.SnapPair{{ID: 10, Origin: 1}, {ID: 11, Origin: 1}, {ID: 20, Origin: 2}, {ID: 12, Origin: 1}}))
		if x, y, z := newest(10), newest(11), newest(12); x != y || y != z {
			t.Errorf("step %d: snapshots of one origin are at %d, %d and %d", i, x, y, z)
		}
		for _, id := range []thin.DevID{10, 11, 12, 20} {
			p.remove(id)
		}
	}
}

// allOrNone: if one snapshot of a step cannot be made, none is.
func allOrNone(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1, 2)
	d := p.thin(1, mib)
	for _, c := range []struct {
		pairs []engine.SnapPair
		want  error
	}{
		{[]engine.SnapPair{{ID: 10, Origin: 1}, {ID: 11, Origin: 77}}, thin.ErrNotFound},
		{[]engine.SnapPair{{ID: 10, Origin: 1}, {ID: 2, Origin: 1}}, thin.ErrExists},
		{[]engine.SnapPair{{ID: 10, Origin: 1}, {ID: 11, Origin: 1}, {ID: 10, Origin: 2}}, thin.ErrExists},
	} {
		p.wantErr(p.p.CreateSnaps(ctx, c.pairs), c.want, "a step that cannot be")
		if list, err := p.p.Devices(ctx); err != nil || idList(list) != "1 2 " || p.status().Devices != 2 {
			t.Errorf("devices after a step that failed: %s, %v; status %+v", idList(list), err, p.status())
		}
		p.write(d, 1, 4096, 0) // the origin goes on
	}
	p.must(p.p.CreateSnaps(ctx, nil))
}

// deltaAndUsage: both see what was written just now.
func deltaAndUsage(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, 8*mib)
	p.write(d, 1, 10*p.bs, 0)
	p.snap(2, 1)
	p.write(d, 2, 2*p.bs, 4*p.bs)   // different
	p.write(d, 3, p.bs, 20*p.bs)    // left only
	p.must(d.Discard(8*p.bs, p.bs)) // right only
	kinds := map[string]uint64{}
	at := map[string]thin.VBlock{}
	p.must(p.p.Delta(ctx, 1, 2, func(r thin.DeltaRange) error {
		kinds[r.Kind] += r.Len
		at[r.Kind] = r.Begin
		return nil
	}))
	if want := map[string]uint64{"same": 7, "different": 2, "left_only": 1, "right_only": 1}; fmt.Sprint(kinds) != fmt.Sprint(want) {
		t.Errorf("delta %v, want %v", kinds, want)
	}
	if at["different"] != 4 || at["left_only"] != 20 || at["right_only"] != 8 {
		t.Errorf("delta begins at %v", at)
	}
	u, err := p.p.Usage(ctx)
	want := map[thin.DevID]thin.Usage{1: {Mapped: 10, Exclusive: 3}, 2: {Mapped: 10, Exclusive: 3}}
	if err != nil || fmt.Sprint(u) != fmt.Sprint(want) {
		t.Errorf("usage %v, %v, want %v", u, err, want)
	}
	info, err := p.p.Device(ctx, 1)
	if err != nil || info.MappedBlocks != 10 || d.MappedBlocks() != 10 {
		t.Errorf("device %+v, %v; %d blocks are mapped", info, err, d.MappedBlocks())
	}
	stop := errors.New("enough")
	p.wantErr(p.p.Delta(ctx, 1, 2, func(thin.DeltaRange) error { return stop }), stop, "delta that is given up")
	es, err := d.Extents(0, 8*mib)
	got := ""
	for _, x := range es {
		got += fmt.Sprintf("%d+%d:%v ", x.Off/p.bs, x.Len/p.bs, x.Hole)
	}
	if err != nil || got != "0+8:false 8+1:true 9+1:false 10+10:true 20+1:false 21+107:true " {
		t.Errorf("extents %s, %v", got, err)
	}
	if st := p.status(); st.HeldRoot != 0 {
		t.Errorf("a metadata snapshot is still held: %+v", st)
	}
}

// readersBesideWriters asks everything that there is to ask, from several sides at once, while a
// device is written to and snapshots come and go.
func readersBesideWriters(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1)
	d := p.thin(1, 16*mib)
	p.write(d, 1, mib, 0)
	p.snap(2, 1)
	var stop atomic.Bool
	var wg sync.WaitGroup
	each := func(name string, fn func(i int) error) {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if err := fn(i); err != nil {
					t.Errorf("%s, call %d: %v", name, i, err)
					return
				}
			}
		})
	}
	buf := make([]byte, 4096)
	var writes, looks atomic.Int64
	each("write", func(i int) error {
		_, err := d.WriteAt(buf, int64(i*7%256)*64*kib)
		if i%10 == 0 {
			err = errors.Join(err, d.Flush())
		}
		writes.Add(1)
		return err
	})
	for range 2 {
		each("delta", func(int) error {
			n := uint64(0)
			err := p.p.Delta(ctx, 2, 1, func(r thin.DeltaRange) error { n += r.Len; return nil })
			if err == nil && n < 16 {
				err = fmt.Errorf("%d blocks", n)
			}
			looks.Add(1)
			return err
		})
	}
	each("usage", func(int) error {
		u, err := p.p.Usage(ctx)
		if err == nil && (u[1].Mapped < 16 || u[2].Mapped != 16) {
			err = fmt.Errorf("usage %v", u)
		}
		return err
	})
	each("device", func(int) error {
		i, err := p.p.Device(ctx, 2)
		if err == nil && i.MappedBlocks != 16 {
			err = fmt.Errorf("device %+v", i)
		}
		return err
	})
	each("devices", func(int) error {
		list, err := p.p.Devices(ctx)
		if err == nil && (len(list) < 2 || len(list) > 3) {
			err = fmt.Errorf("devices %v", list)
		}
		return err
	})
	each("extents", func(int) error {
		es, err := d.Extents(0, mib)
		if err == nil && (len(es) != 1 || es[0].Hole) {
			err = fmt.Errorf("extents %v", es)
		}
		return err
	})
	each("status", func(int) error { _, err := p.p.Status(ctx); return err })
	for range max(5, 20/e.Slow) {
		p.snap(3, 1)
		p.remove(3)
	}
	p.eventually("some of everything", func() bool { return t.Failed() || writes.Load() > 20 && looks.Load() > 4 })
	stop.Store(true)
	wg.Wait()
	p.eventually("no metadata snapshot", func() bool { return p.status().HeldRoot == 0 })
}
