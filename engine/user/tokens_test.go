package user

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

func TestTokens(t *testing.T) {
	var k tokens
	k.init()
	a := k.enter()
	drained := make(chan struct{})
	go func() { k.drain(); close(drained) }()
	eventually(t, "the drain waits", func() bool { return k.waiters.Load() == 1 })
	b := k.enter() // does not hold the drain up
	select {
	case <-drained:
		t.Fatal("drained while an older token is out")
	default:
	}
	k.exit(a)
	<-drained
	k.exit(b)

	k.shutGate()
	k.shutGate()
	if _, ok := k.tryEnter(); ok {
		t.Error("a closed gate let a request in")
	}
	in := make(chan uint32)
	go func() { in <- k.enter() }()
	k.openGate()
	if _, ok := k.tryEnter(); ok {
		t.Error("the gate opened with one of two")
	}
	k.openGate()
	k.exit(<-in)
	k.drain()
	if n := k.n[0].Load() + k.n[1].Load(); n != 0 {
		t.Errorf("%d tokens are out at the end", n)
	}
}

// TestDrainSeesEveryToken: whoever entered before a drain began has left when it returns.
func TestDrainSeesEveryToken(t *testing.T) {
	var k tokens
	k.init()
	var inside [8]atomic.Uint64 // odd while the worker is inside
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range inside {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for !stop.Load() {
				token := k.enter()
				inside[w].Add(1)
				for range w * 50 {
					_ = inside[w].Load()
				}
				inside[w].Add(1)
				k.exit(token)
			}
		}()
	}
	for i := range 4000 / slow {
		var before [8]uint64
		for w := range inside {
			before[w] = inside[w].Load()
		}
		gate := i%3 == 0
		if gate {
			k.shutGate()
		}
		k.drain()
		for w := range inside {
			now := inside[w].Load()
			if before[w]%2 == 1 && now == before[w] {
				t.Fatalf("drain %d returned while worker %d is where it was", i, w)
			}
			if gate && now%2 == 1 {
				t.Fatalf("drain %d: worker %d is inside a closed gate", i, w)
			}
		}
		if gate {
			k.openGate()
		}
	}
	stop.Store(true)
	wg.Wait()
}

// TestSnapshotWaitsForAllOrigins: a snapshot of several devices waits for the writes in flight of
// each, holds back new ones, and lets reads pass.
func TestSnapshotWaitsForAllOrigins(t *testing.T) {
	for _, busy := range []int{0, 1} {
		tp := newPool(t, poolSize{}, still)
		tp.create(1)
		tp.create(2)
		hs := []*Thin{tp.thin(1, 1<<20), tp.thin(2, 1<<20)}
		for _, h := range hs {
			write(t, h, fill(1, block), 0)
		}
		held, release := tp.holdWrite()
		wrote, snapped := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := hs[busy].WriteAt(fill(2, 4096), 0)
			wrote <- err
		}()
		<-held
		go func() {
			snapped <- tp.p.CreateSnaps(ctx, []engine.SnapPair{{ID: 11, Origin: 1}, {ID: 12, Origin: 2}})
		}()
		for _, h := range hs {
			eventually(t, "the gates are closed", func() bool { return h.d.w.state.Load()&gateClosed != 0 })
			if err := h.TryWriteAt(fill(3, 512), 0); !errors.Is(err, dev.ErrWouldBlock) {
				t.Errorf("write at a closed gate: %v", err)
			}
			wantBytes(t, h, 1, 4096, 8192)
		}
		select {
		case err := <-snapped:
			t.Errorf("snapshot returned (%v) while a write is in flight", err)
		case <-time.After(20 * time.Millisecond):
		}
		release()
		must(t, <-wrote)
		must(t, <-snapped)
		for i, h := range hs {
			write(t, h, fill(4, 4096), 0)
			want := byte(1)
			if i == busy {
				want = 2
			}
			s := tp.thin(11+h.ID()-1, 1<<20)
			wantBytes(t, s, want, 4096, 0)
			s.Close()
			h.Close()
		}
	}
}

// TestFailedSyncFailsAllWhoShareIt: a sync that fails is not tried again for those who waited for it.
func TestFailedSyncFailsAllWhoShareIt(t *testing.T) {
	f := dev.NewFault(dev.NewMem(1 << 20))
	x := newData(f, block)
	held, release := make(chan struct{}), make(chan struct{})
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { close(held); <-release }})
	first := make(chan error, 1)
	go func() { first <- x.sync() }()
	<-held
	if _, err := x.WriteAt(fill(1, 512), 0); err != nil { // there is something to sync again
		t.Fatal(err)
	}
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Err: errIO})
	const waiters = 5
	errs := make(chan error, waiters)
	for range waiters {
		go func() { errs <- x.sync() }()
	}
	time.Sleep(20 * time.Millisecond) // lets them arrive; who comes later fails all the same
	close(release)
	must(t, <-first)
	for range waiters {
		if err := <-errs; !errors.Is(err, errIO) {
			t.Errorf("sync that shared the failed one: %v", err)
		}
	}
	if err := x.sync(); !errors.Is(err, errIO) {
		t.Errorf("later sync: %v, want the old error", err)
	}
	if n := f.Counts().Flushes; n != 2 {
		t.Errorf("%d flushes, want 2: none after the failure", n)
	}
}

// TestSyncOnlyWhatWasWritten: a sync with nothing to do waits for the one under way, which may hold
// what its caller wrote, and costs nothing otherwise. What is written during a sync needs another.
func TestSyncOnlyWhatWasWritten(t *testing.T) {
	f := dev.NewFault(dev.NewMem(1 << 20))
	x := newData(f, block)
	must(t, x.findZero(0, 1<<20/block))
	must(t, x.sync())
	must(t, x.sync())
	if n := f.Counts().Flushes; n != 1 {
		t.Errorf("%d flushes of what an earlier opener left, and of nothing; want 1", n)
	}
	for _, touch := range []func() error{
		func() error { _, err := x.WriteAt(fill(1, 512), 0); return err },
		func() error { return x.writeZeros(0, 512<<10) },
		func() error { x.punch(thin.DataRun{Begin: 1, Len: 1}); return nil },
	} {
		before := f.Counts().Flushes
		must(t, touch())
		must(t, x.sync())
		must(t, x.sync())
		if n := f.Counts().Flushes - before; n != 1 {
			t.Errorf("%d flushes, want 1", n)
		}
	}
	write := func() error { _, err := x.WriteAt(fill(2, 512), 512); return err }
	held, release := make(chan struct{}), make(chan struct{})
	must(t, write())
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: func(dev.Op, int64, int64) { close(held); <-release }})
	first, late := make(chan error, 1), make(chan error, 1)
	go func() { first <- x.sync() }()
	<-held
	go func() { late <- x.sync() }() // what it is about may be in the sync under way
	select {
	case <-late:
		close(release)
		t.Fatal("a sync returned while the one that holds its data is under way")
	case <-time.After(20 * time.Millisecond):
	}
	must(t, write())
	before := f.Counts().Flushes
	close(release)
	must(t, <-first)
	must(t, <-late)
	must(t, x.sync())
	if n := f.Counts().Flushes - before; n < 1 {
		t.Errorf("%d flushes after a write during a sync, want one", n)
	}
}
