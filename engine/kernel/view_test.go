//go:build guest

package kernel

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/thin"
)

// TestLooksAreRepeated: a look into which commits fall is not believed. The commits here free and
// fill every block that it would have read.
func TestLooksAreRepeated(t *testing.T) {
	p, err := Open(ctx, Source{Dir: newDir(t, 16<<20, 256<<10, 64<<10)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for id := thin.DevID(1); id <= 20; id++ {
		must(p.CreateThin(ctx, id))
	}
	churn := func() { // by messages: Delete looks at the metadata itself
		for range 30 {
			must(p.dm.CreateThin(p.name, 100))
			must(p.dm.DeleteThin(p.name, 100))
		}
	}
	looks := 0
	p.looking = func() {
		if looks++; looks == 1 {
			churn()
		}
	}
	list, err := p.Devices(ctx)
	if err != nil || len(list) != 20 || looks != 2 {
		t.Errorf("%d devices, %v, after %d looks; want 20 after 2", len(list), err, looks)
	}
	// Commits all the time: in the end the metadata snapshot is looked at, which stands still.
	looks = 0
	p.looking = func() { looks++; churn() }
	info, err := p.Device(ctx, 7)
	if err != nil || info.ID != 7 || looks != quietTries {
		t.Errorf("device %+v, %v, after %d looks", info, err, looks)
	}
	if st, err := p.Status(ctx); err != nil || st.HeldRoot != 0 {
		t.Errorf("status %+v, %v", st, err)
	}
}

// TestReadersShare: readers that come while the metadata snapshot is held share the next one; one
// that gives up leaves nothing held; a snapshot holds what was written before it was asked for.
func TestReadersShare(t *testing.T) {
	p, err := Open(ctx, Source{Dir: newDir(t, 16<<20, 2<<20, 64<<10)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	inside, leave := make(chan struct{}), make(chan struct{})
	go p.hold(ctx, func(*thin.View) error {
		close(inside)
		<-leave
		return nil
	})
	<-inside
	if err := p.CreateThin(ctx, 2); err != nil { // the one that is held does not show it
		t.Fatal(err)
	}
	// Two give up, ten wait.
	for range 2 {
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		if err := p.hold(short, func(*thin.View) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a reader that gave up: %v", err)
		}
		cancel()
	}
	var wg sync.WaitGroup
	var together, most atomic.Int64
	roots := make(chan uint64, 10)
	all := make(chan struct{})
	for range 10 {
		wg.Go(func() {
			err := p.hold(ctx, func(v *thin.View) error {
				if n := together.Add(1); n == 10 {
					close(all)
				}
				select {
				case <-all:
				case <-time.After(10 * time.Second):
				}
				most.Store(together.Load())
				list, err := v.Devices()
				if err == nil && len(list) != 2 {
					err = errors.New("the device made before is missing")
				}
				st, serr := p.poolStatus(true)
				roots <- st.HeldRoot
				return errors.Join(err, serr)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	close(leave)
	wg.Wait()
	close(roots)
	first := uint64(0)
	for r := range roots {
		if first == 0 {
			first = r
		}
		if r != first || r == 0 {
			t.Errorf("held root %d, another reader has %d", r, first)
		}
	}
	if most.Load() != 10 {
		t.Errorf("%d readers shared a snapshot, want 10", most.Load())
	}
	if st, err := p.Status(ctx); err != nil || st.HeldRoot != 0 {
		t.Errorf("status %+v, %v", st, err)
	}
}

// TestTrimStandsStill: while a trim reads which blocks are free nobody commits, for a later commit may
// put another bitmap where it is about to read one, and it would discard what is mapped.
func TestTrimStandsStill(t *testing.T) {
	p, err := Open(ctx, Source{Dir: newDir(t, 16<<20, 256<<10, 64<<10)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for id := thin.DevID(1); id <= 3; id++ {
		must(p.CreateThin(ctx, id))
	}
	must(p.SetTransactionID(ctx, 0, 1))
	held := 0
	changes := []func() error{
		func() error { return p.Delete(ctx, 3) },
		func() error { return p.CreateThin(ctx, 4) },
		func() error { return p.CreateSnap(ctx, 5, 1) },
		func() error { return p.SetTransactionID(ctx, 1, 2) },
		func() error { return p.ReserveMetadataSnap(ctx) },
		func() error { return p.ReleaseMetadataSnap(ctx) },
	}
	for i, change := range changes {
		done := make(chan error, 1)
		p.trimming = func() {
			p.trimming = nil
			held++
			before, err := p.superblockBytes()
			must(err)
			go func() { done <- change() }()
			select {
			case err := <-done:
				t.Errorf("change %d was done in the middle of a trim: %v", i, err)
				done <- err
			case <-time.After(300 * time.Millisecond):
			}
			if after, err := p.superblockBytes(); err != nil || !bytes.Equal(before, after) {
				t.Errorf("change %d was committed in the middle of a trim (%v)", i, err)
			}
		}
		_, err := p.Trim(ctx)
		must(err)
		must(<-done)
	}
	if held != len(changes) {
		t.Errorf("%d looks", held)
	}
}
