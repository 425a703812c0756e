package exporttest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// testFlush: what was written before an fsync is durable after it, whoever wrote it; without a
// flush it is not.
func testFlush(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(16 << 20)
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
	buf := fill(aligned(t, 64<<10), 1)
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	if !m.unflushed(0, 64<<10) {
		t.Error("durable without a flush: the test sees nothing")
	}
	var wg sync.WaitGroup
	for w := range 4 {
		g := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
		b := fill(aligned(t, 4096), uint64(w))
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 2))
			for range 50 {
				off := (int64(w)<<10 + rnd.Int64N(1<<10)) << 12
				if _, err := g.WriteAt(b, off); err != nil {
					t.Error(err)
					return
				}
				if err := g.Sync(); err != nil {
					t.Error(err)
					return
				}
				if m.unflushed(off, 4096) {
					t.Errorf("[%d, +4096) is not durable after fsync", off)
					return
				}
			}
			g.Close()
		})
	}
	wg.Wait()
	if m.unflushed(0, 64<<10) {
		t.Error("a flush of another descriptor left writes out")
	}
	// Buffered writes, too.
	g := openNode(t, a.Node(), os.O_RDWR)
	if _, err := g.WriteAt(buf[:10000], 1<<20+77); err != nil {
		t.Fatal(err)
	}
	if err := g.Sync(); err != nil {
		t.Fatal(err)
	}
	same(t, "buffered", contents(t, m, 1<<20+77, 10000), buf[:10000])
	if m.unflushed(1<<20, 16<<10) {
		t.Error("buffered writes are not durable after fsync")
	}
	f.Close()
	g.Close()
}

// testForced: a write with O_DSYNC is durable when it returns.
func testForced(t *testing.T, d Driver) {
	for _, try := range []bool{false, true} {
		r := newRig(t, d)
		m := newDisk(4 << 20)
		var served device = m
		if try {
			served = &trying{disk: m}
		}
		a := r.attach("x", served, export.AttachOptions{})
		f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC)
		b := fill(aligned(t, 256<<10), 9)
		for i := range 16 {
			n := int64(4096) << (i % 7)
			off := int64(i) << 17 % (4<<20 - n)
			if _, err := f.WriteAt(b[:n], off); err != nil {
				t.Fatal(err)
			}
			if m.unflushed(off, n) {
				t.Fatalf("try %v: [%d, +%d) is not durable", try, off, n)
			}
		}
		f.Close()
	}
}

// testConcurrent: many requests at once, each region one writer, all sizes.
func testConcurrent(t *testing.T, d Driver) {
	for _, try := range []bool{false, true} {
		t.Run(fmt.Sprintf("try=%v", try), func(t *testing.T) {
			r := newRig(t, d)
			m := newDisk(64 << 20)
			var served device = m
			if try {
				served = &trying{disk: m}
			}
			a := r.attach("x", served, export.AttachOptions{})
			const writers, region = 16, 4 << 20
			seed := time.Now().UnixNano()
			t.Logf("seed %d", seed)
			var wg sync.WaitGroup
			want := make([]byte, writers*region)
			for w := range writers {
				f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
				buf, got := aligned(t, 2<<20), aligned(t, 2<<20)
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(seed), uint64(w)))
					mine := want[w*region:][:region]
					for range number("MICA_ROUNDS", 10) {
						n := 512 << rnd.IntN(13) // up to 2 MiB
						off := rnd.IntN((region-n)/512+1) * 512
						b := fill(buf[:n], rnd.Uint64())
						if _, err := f.WriteAt(b, int64(w*region+off)); err != nil {
							t.Errorf("write [%d, +%d): %v", w*region+off, n, err)
							return
						}
						copy(mine[off:], b)
						n = 512 << rnd.IntN(13)
						off = rnd.IntN((region-n)/512+1) * 512
						if _, err := f.ReadAt(got[:n], int64(w*region+off)); err != nil {
							t.Errorf("read [%d, +%d): %v", w*region+off, n, err)
							return
						}
						same(t, fmt.Sprintf("writer %d, [%d, +%d)", w, off, n), got[:n], mine[off:off+n])
					}
					f.Close()
				})
			}
			wg.Wait()
			same(t, "the device in the end", contents(t, m, 0, len(want)), want)
			if s, ok := served.(*trying); ok && s.served.Load() == 0 {
				t.Error("nothing was served at once")
			}
		})
	}
}

// testInline: requests that the device can do at once need no other goroutine: they are served also
// while all others wait.
func testInline(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := &trying{disk: newDisk(1 << 20)}
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
	b := fill(aligned(t, 4096), 1)
	for i := range 60 {
		if _, err := f.WriteAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(b, int64(i)*4096); err != nil {
			t.Fatal(err)
		}
	}
	if n := m.served.Load(); n < 60 {
		t.Errorf("%d of 120 requests were served at once", n)
	}
	f.Close()
}

// testErrors: the device's errors reach the caller, and end nothing.
func testErrors(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(8 << 20)
	const full, broken = 4 << 20, 6 << 20
	m.setBefore(func(write bool, off int64) error {
		switch {
		case off >= broken:
			return errBroken
		case write && off >= full:
			return dev.ErrNoSpace
		}
		return nil
	})
	a := r.attach("x", m, export.AttachOptions{})
	f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
	b := aligned(t, 64<<10)
	noSpace := unix.ENOSPC
	if d.NoENOSPC {
		noSpace = unix.EIO
	}
	for range 3 {
		_, err := f.WriteAt(b, full)
		wantErrno(t, "write without space", err, noSpace)
		if _, err := f.ReadAt(b, full); err != nil {
			t.Errorf("read where no space is: %v", err)
		}
		_, err = f.WriteAt(b, broken)
		wantErrno(t, "write to what is broken", err, unix.EIO)
		_, err = f.ReadAt(b, broken)
		wantErrno(t, "read of what is broken", err, unix.EIO)
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Errorf("write elsewhere: %v", err)
		}
	}
	f.Close()
	m.setBefore(nil)
}

// testWaiting: writes that wait for space, as many as can be, do not keep reads from being served,
// and end when there is space.
func testWaiting(t *testing.T, d Driver) {
	r := newRig(t, d)
	m := newDisk(16 << 20)
	space := make(chan struct{})
	var waiting atomic.Int64
	m.setBefore(func(write bool, _ int64) error {
		if write {
			waiting.Add(1)
			<-space
		}
		return nil
	})
	a := r.attach("x", m, export.AttachOptions{})
	var wg sync.WaitGroup
	const writers = 48
	for w := range writers {
		f := openNode(t, a.Node(), os.O_RDWR|unix.O_DIRECT)
		b := fill(aligned(t, 4096), uint64(w))
		wg.Go(func() {
			if _, err := f.WriteAt(b, int64(w)<<16); err != nil {
				t.Error(err)
			}
			f.Close()
		})
	}
	for end := time.Now().Add(30 * time.Second); waiting.Load() < 8 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	f := openNode(t, a.Node(), os.O_RDONLY|unix.O_DIRECT)
	done := make(chan error, 1)
	b := aligned(t, 4096)
	go func() {
		_, err := f.ReadAt(b, 8<<20)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Errorf("a read waits behind %d writes", waiting.Load())
	}
	close(space)
	wg.Wait()
	for w := range writers {
		same(t, fmt.Sprint("write ", w), contents(t, m, int64(w)<<16, 4096), fill(make([]byte, 4096), uint64(w)))
	}
	f.Close()
}
