package enginetest

import (
	"errors"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// tight is a pool of 32 blocks.
var tight = Format{BlockSize: 64 * kib, DataBytes: 2 * mib, MetadataBytes: 2 * mib}

// full makes a pool of which device 1 uses all blocks, beside an empty device 2.
func full(t *testing.T, e Engine, o Options) (*pool, engine.Thin) {
	t.Helper()
	p := newPool(t, e, tight, o)
	p.create(1, 2)
	d := p.thin(1, 2*mib)
	p.write(d, 1, 2*mib, 0)
	p.must(d.Flush())
	return p, d
}

// outOfDataErrors: writes that need a block fail, everything else goes on; deletes and discards
// make room.
func outOfDataErrors(t *testing.T, e Engine) {
	p, d := full(t, e, Options{ErrorIfNoSpace: true})
	events, cancel := p.p.Events()
	defer cancel()
	g := p.thin(2, mib)
	if _, err := g.WriteAt(make([]byte, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write to a full pool: %v, want ErrNoSpace", err)
	}
	p.wantMode("out_of_data_space")
	if s := p.status(); !s.ErrorIfNoSpace || s.DataUsed != 32 {
		t.Errorf("status %+v", s)
	}
	p.want(d, 1, 2*mib, 0)
	p.write(d, 3, 4096, 4096) // its own block
	p.must(d.Flush())
	p.snap(3, 1)
	if _, err := d.WriteAt(make([]byte, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("breaking sharing in a full pool: %v, want ErrNoSpace", err)
	}
	p.want(d, 3, 4096, 4096)
	p.remove(3)
	p.must(d.Discard(0, 2*p.bs))
	p.wantMode("rw")
	p.write(g, 2, 4096, 0)
	p.write(g, 2, 4096, p.bs)
	if _, err := g.WriteAt(make([]byte, 4096), 2*p.bs); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write to a pool that is full again: %v, want ErrNoSpace", err)
	}
	p.want(g, 2, 4096, p.bs)
	p.must(p.p.GrowData(ctx, 3*mib))
	p.wantMode("rw")
	p.write(g, 2, 4096, 2*p.bs)
	wantEvents(p, events, engine.EventNoSpace, engine.EventSpaceAgain)
}

// wantEvents waits for events of these kinds, in this order; others may come between.
func wantEvents(p *pool, events <-chan engine.Event, kinds ...engine.EventKind) {
	p.Helper()
	limit := time.After(30 * time.Second)
	for _, want := range kinds {
		for {
			select {
			case ev := <-events:
				if ev.Detail == "" {
					p.Errorf("event without a detail: %+v", ev)
				}
				if ev.Kind == want {
					break
				}
				continue
			case <-limit:
				p.Fatalf("no event %s", want)
			}
			break
		}
	}
}

// outOfDataQueues: a write that needs a block waits, and goes on as soon as there is one, wherever
// it comes from. Snapshots of its device do not wait for it.
func outOfDataQueues(t *testing.T, e Engine) {
	for _, c := range []struct {
		name string
		free func(p *pool, d engine.Thin)
	}{
		{"growth", func(p *pool, d engine.Thin) { p.must(p.p.GrowData(ctx, 3*mib)) }},
		{"discard", func(p *pool, d engine.Thin) {
			p.must(d.Discard(0, p.bs))
			p.must(d.Flush())
		}},
		{"delete", func(p *pool, d engine.Thin) {
			p.done(d)
			p.remove(1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, d := full(t, e, Options{})
			events, cancel := p.p.Events()
			defer cancel()
			g := p.thin(2, mib)
			done := make(chan error, 1)
			go func() {
				_, err := g.WriteAt(make([]byte, 4096), 8192)
				done <- err
			}()
			p.eventually("mode out_of_data_space", func() bool { return p.status().Mode == "out_of_data_space" })
			p.snap(3, 2)
			p.write(d, 5, 4096, 0) // its own block
			select {
			case err := <-done:
				t.Fatalf("the write returned early: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			c.free(p, d)
			select {
			case err := <-done:
				p.must(err)
			case <-time.After(30 * time.Second):
				t.Fatalf("the write still waits; status %+v", p.status())
			}
			p.want(g, 0, mib, 0)
			p.want(p.view(3, mib), 0, mib, 0)
			wantEvents(p, events, engine.EventNoSpace, engine.EventSpaceAgain)
			p.wantMode("rw")
			p.must(g.Flush())
		})
	}
}

// outOfDataTimeout: what has waited for the time limit fails, and later writes do at once.
func outOfDataTimeout(t *testing.T, e Engine) {
	p, _ := full(t, e, Options{NoSpaceTimeout: time.Second})
	g := p.thin(2, mib)
	begin := time.Now()
	if _, err := g.WriteAt(make([]byte, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("a write that waited: %v, want ErrNoSpace", err)
	}
	if took := time.Since(begin); took < 900*time.Millisecond {
		t.Errorf("it waited %v, the limit is 1 s", took)
	}
	if _, err := g.WriteAt(make([]byte, 4096), 0); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("a later write: %v, want ErrNoSpace", err)
	}
	p.must(p.p.GrowData(ctx, 3*mib))
	p.wantMode("rw")
	p.write(g, 1, 4096, 0)
}

// outOfMetadata fills the metadata with mappings until no change is taken any more. What was
// flushed before stays, and after growth (and a check, where the engine asks for one) all goes on.
func outOfMetadata(t *testing.T, e Engine) {
	// With half of that, most would be what the user engine keeps back so that a delete never fails.
	p := newPool(t, e, Format{BlockSize: 64 * kib, DataBytes: 256 * mib, MetadataBytes: 512 * kib}, Options{ErrorIfNoSpace: true})
	p.dirty = true
	const size = 1 << 40
	good := thin.DevID(0)
	var err error
	for id := thin.DevID(1); id < 1000; id++ {
		if err = p.p.CreateThin(ctx, id); err != nil {
			break
		}
		var d engine.Thin
		if d, err = p.p.Open(ctx, id, engine.OpenOptions{SizeBytes: size}); err != nil {
			break
		}
		_, err = d.WriteAt([]byte{byte(id)}, int64(id)*17*mib)
		if err == nil {
			err = d.Flush()
		}
		d.Close()
		if err != nil {
			break
		}
		good = id
	}
	if !errors.Is(err, dev.ErrNoSpace) && !errors.Is(err, thin.ErrNoMetaSpace) && !errors.Is(err, thin.ErrNeedsCheck) {
		t.Fatalf("after %d devices: %v, want an end of the metadata space", good, err)
	}
	t.Logf("%d devices: %v", good, err)
	if good < 32 {
		t.Errorf("only %d devices fitted", good)
	}
	readAll := func() {
		t.Helper()
		for _, id := range []thin.DevID{1, good / 2, good} {
			d := p.view(id, size)
			p.want(d, byte(id), 1, int64(id)*17*mib)
			p.want(d, 0, 100, int64(id)*17*mib+100)
			p.done(d)
		}
	}
	readAll()
	if err := p.p.GrowMetadata(ctx, 4*mib); errors.Is(err, thin.ErrNeedsCheck) {
		t.Logf("growth: %v", err)
		p.recover()
		p.must(p.p.GrowMetadata(ctx, 4*mib))
	} else {
		p.must(err)
	}
	if s := p.status(); s.Mode != "rw" || s.MetaBlocks != 1024 {
		t.Errorf("status after growth %+v", s)
	}
	readAll()
	for id := thin.DevID(2000); id < 2020; id++ {
		p.create(id)
		d := p.thin(id, size)
		p.write(d, 1, 512, int64(id)*mib)
		p.must(d.Flush())
		p.done(d)
	}
	p.remove(1)
}

// recover closes the pool, repairs what a failure left, takes the mark needs_check away and opens
// it again.
func (p *pool) recover() {
	p.Helper()
	p.close()
	d := p.s.Metadata(p)
	r, err := thin.Check(d, thin.CheckOptions{RepairLeaks: true, ClearNeedsCheck: true})
	if err != nil || !r.Clean() {
		p.Fatalf("check: %v, %+v", err, r)
	}
	p.must(d.Close())
	p.reopen()
}

// lowWater: one event when the free blocks come down to the mark.
func lowWater(t *testing.T, e Engine) {
	p := newPool(t, e, tight, Options{LowWaterMark: 10})
	events, cancel := p.p.Events()
	defer cancel()
	if s := p.status(); s.LowWaterMark != 10 {
		t.Errorf("status %+v", s)
	}
	p.create(1)
	d := p.thin(1, 2*mib)
	p.write(d, 1, 20*p.bs, 0)
	p.must(d.Flush())
	select {
	case ev := <-events:
		t.Errorf("event %+v with 12 blocks free", ev)
	case <-time.After(100 * time.Millisecond):
	}
	for b := int64(20); b < 24; b++ {
		p.write(d, 1, p.bs, b*p.bs)
	}
	p.must(d.Flush())
	wantEvents(p, events, engine.EventLowWater)
}

// growth: of both devices, in use, never shorter.
func growth(t *testing.T, e Engine) {
	p := newPool(t, e, tight, Options{ErrorIfNoSpace: true})
	p.create(1)
	d := p.thin(1, 8*mib)
	p.write(d, 1, 2*mib, 0)
	if err := p.p.GrowData(ctx, mib); err == nil {
		t.Error("the data device was made shorter")
	}
	if err := p.p.GrowMetadata(ctx, mib); err == nil {
		t.Error("the metadata device was made shorter")
	}
	p.must(p.p.GrowData(ctx, 2*mib))
	p.must(p.p.GrowData(ctx, 5*mib+1000)) // what does not fill a block is not used
	p.must(p.p.GrowMetadata(ctx, 3*mib))
	if s := p.status(); s.DataBlocks != 80 || s.MetaBlocks != 768 || s.Mode != "rw" {
		t.Errorf("status %+v, want 80 data blocks and 768 metadata blocks", s)
	}
	p.want(d, 1, 2*mib, 0)
	p.write(d, 2, 3*mib, 2*mib)
	if _, err := d.WriteAt(make([]byte, 4096), 6*mib); !errors.Is(err, dev.ErrNoSpace) {
		t.Errorf("write beyond 80 blocks: %v, want ErrNoSpace", err)
	}
	p.must(d.Flush())
	p.reopen()
	if s := p.status(); s.DataBlocks != 80 || s.MetaBlocks != 768 {
		t.Errorf("status after reopening %+v", s)
	}
	d = p.view(1, 8*mib)
	p.want(d, 1, 2*mib, 0)
	p.want(d, 2, 3*mib, 2*mib)
}

// trim: what nobody maps is given back to the host, and nothing else.
func trim(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	p.create(1, 2)
	d := p.thin(1, 16*mib)
	for i := int64(0); i < 16; i++ { // interleaved
		p.write(d, 1, mib, i*mib)
		g := p.thin(2, 16*mib)
		p.write(g, 2, mib, i*mib)
		p.must(g.Flush())
		p.done(g)
	}
	p.must(d.Flush())
	before := p.status().HostBytes
	p.remove(2)
	p.must(p.p.Commit(ctx))
	n, err := p.p.Trim(ctx)
	p.must(err)
	after := p.status().HostBytes
	t.Logf("host bytes from %d to %d, %d of them by the trim", before, after, n)
	if before < 32*mib || after < 16*mib || after > 18*mib {
		t.Errorf("host bytes from %d to %d, want 32 MiB and 16 MiB", before, after)
	}
	p.want(d, 1, 16*mib, 0)
	if n, err := p.p.Trim(ctx); err != nil || n != 0 {
		t.Errorf("another trim gave back %d bytes, %v", n, err)
	}
}
