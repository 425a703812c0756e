package enginetest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/thin"
)

// runTime is how long the tests of this file let things run beside each other.
func runTime(e Engine) time.Duration {
	if e.Slow > 1 {
		return 2 * time.Second
	}
	return time.Second
}

// trimBesideWriters: a trim takes nothing away from those who are given free blocks meanwhile.
func trimBesideWriters(t *testing.T, e Engine) {
	p := newPool(t, e, small, Options{})
	var stop atomic.Bool
	var wg sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			t.Error(err)
			stop.Store(true)
		}
	}
	defer wg.Wait()
	defer stop.Store(true)
	var rounds, trims atomic.Int64
	for w := range 3 {
		wg.Go(func() {
			id := thin.DevID(10 + w)
			for i := 1; !stop.Load(); i++ {
				fail(p.round(id, byte(16*w+i%15+1)))
				rounds.Add(1)
			}
		})
	}
	wg.Go(func() {
		for !stop.Load() {
			_, err := p.p.Trim(ctx)
			fail(err)
			trims.Add(1)
		}
	})
	for end := time.Now().Add(runTime(e)); !stop.Load() && (time.Now().Before(end) || rounds.Load() < 6 || trims.Load() < 3); {
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("%d devices written, read and deleted, %d trims", rounds.Load(), trims.Load())
}

// round makes a device, fills it, reads it back and deletes it.
func (p *pool) round(id thin.DevID, c byte) error {
	const size = 3 * mib
	if err := p.p.CreateThin(ctx, id); err != nil {
		return err
	}
	d, err := p.p.Open(ctx, id, openSize(size))
	if err != nil {
		return err
	}
	buf := bytes.Repeat([]byte{c}, 20*kib)
	for off := int64(0); off+int64(len(buf)) <= size && err == nil; off += 24 * kib {
		_, err = d.WriteAt(buf, off)
	}
	got := make([]byte, len(buf))
	for off := int64(0); off+int64(len(buf)) <= size && err == nil; off += 24 * kib {
		if _, err = d.ReadAt(got, off); err == nil && !bytes.Equal(got, buf) {
			err = fmt.Errorf("device %d: bytes at %d are not what was written", id, off)
		}
	}
	return errors.Join(err, d.Close(), p.p.Delete(ctx, id))
}

// looksBesideCommits asks for what is in the metadata while every block of it moves: what stays
// must always be there, as it is.
func looksBesideCommits(t *testing.T, e Engine) {
	f := small
	f.MetadataBytes = mib // little, so that freed blocks are soon used again
	p := newPool(t, e, f, Options{})
	const n = 100
	for i := range n {
		p.create(thin.DevID(1000 + i))
	}
	p.create(1)
	d := p.thin(1, 8*mib)
	for i := range int64(64) {
		p.write(d, 1, 512, i*2*p.bs)
	}
	p.must(d.Flush())
	p.snap(2, 1)
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop.Store(true)
	var looks, changes atomic.Int64
	each := func(fn func(i int) error) {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if err := fn(i); err != nil {
					t.Error(err)
					stop.Store(true)
				}
			}
		})
	}
	each(func(i int) error { // changes of all trees, a commit each
		changes.Add(1)
		id := thin.DevID(100 + i%7)
		err := p.p.CreateSnap(ctx, id, 1)
		if err == nil {
			_, err = d.WriteAt(make([]byte, 512), int64(i*5%128)*p.bs)
		}
		return errors.Join(err, d.Flush(), p.p.Delete(ctx, id))
	})
	each(func(int) error {
		looks.Add(1)
		list, err := p.p.Devices(ctx)
		if err != nil {
			return err
		}
		fixed := 0
		for _, i := range list {
			if i.ID >= 1000 {
				fixed++
			}
		}
		if fixed != n {
			return fmt.Errorf("%d devices of %d are listed", fixed, n)
		}
		return nil
	})
	each(func(int) error {
		last, ok, err := p.p.HighestMapped(ctx, 2)
		if err == nil && (!ok || last != 126) {
			err = fmt.Errorf("highest mapped block of the snapshot: %d %v", last, ok)
		}
		return err
	})
	for end := time.Now().Add(runTime(e)); !stop.Load() && (time.Now().Before(end) || looks.Load() < 10 || changes.Load() < 10); {
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("%d looks beside %d changes", looks.Load(), changes.Load())
}
