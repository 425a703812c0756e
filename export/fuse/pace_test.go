package fuse

import (
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/export/pacing"

	"golang.org/x/sys/unix"
)

func TestPace(t *testing.T) {
	var p pace
	here := func(others bool, want bool, what string) {
		t.Helper()
		if got := p.begin(others); got != want {
			t.Errorf("%s: served on the thread: %v, want %v", what, got, want)
		}
	}
	slow := func() { p.observe(true, true) }
	fast := func() { p.observe(false, false) }
	here(true, true, "at the beginning")
	slow()
	slow()
	here(true, true, "after two slow ones")
	fast()
	slow()
	here(true, true, "when a fast one was among three slow ones")
	slow()
	for i := range pacing.For {
		if i == 5 {
			here(false, true, "slow, but nothing else to do")
			continue
		}
		here(true, false, "slow, and others are there")
	}
	here(true, true, "one is tried again")
	slow()
	here(true, false, "it was slow")
	p = pace{}
	for range 100 {
		slow()
		for range pacing.Slow {
			fast()
		}
	}
	here(true, true, "one slow in nine")
	p = pace{}
	for range 100 {
		p.observe(true, false)
	}
	here(true, true, "long, but without a wait")
}

// TestPaceWaits: a request for which the thread waits is slow, one that only takes long is not.
func TestPaceWaits(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var p pace
	serve := func(work func()) {
		if p.begin(false) {
			work()
			p.served(4096)
		}
	}
	busy := func() {
		for begin := time.Now(); time.Since(begin) < 2*slowRequest; {
		}
	}
	for range 20 {
		serve(busy)
	}
	if p.watch == 0 {
		t.Error("requests that take long are not watched")
	}
	if p.Points >= pacing.Limit || p.Left > 0 {
		t.Errorf("work without a wait is taken for slow: score %d", p.Points)
	}
	p = pace{}
	wait := func() {
		var pipe [1]unix.PollFd
		if _, err := unix.Poll(pipe[:0], 1); err != nil && err != unix.EINTR {
			t.Error(err)
		}
	}
	for range 20 {
		serve(wait)
	}
	if p.Left == 0 {
		t.Errorf("20 requests that waited are not taken for slow: score %d", p.Points)
	}
}

// TestInlineDefault: the thread that has read a request serves it, however long it is.
func TestInlineDefault(t *testing.T) {
	o := Options{RunDir: t.TempDir()}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	s, err := newServer(-1, inline(dev.NewMem(maxIO)), false, &o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if !s.here(maxIO, new(pace), false) {
		t.Error("a request of the longest kind goes to a goroutine")
	}
	s.try = nil
	if s.here(512, new(pace), true) {
		t.Error("a device without Trier is tried")
	}
}

// A disk takes its time. Reads that may wait come back only when there were as many at the same time
// as were asked for.
type disk struct {
	dev.Device
	together int

	mu   sync.Mutex
	cond *sync.Cond // of mu
	in   int        // guarded by mu; reads that may wait
	met  bool       // guarded by mu
	late bool       // guarded by mu
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	d.in++
	d.met = d.met || d.in >= d.together
	d.cond.Broadcast()
	for !d.met && !d.late {
		d.cond.Wait()
	}
	d.in--
	d.mu.Unlock()
	return d.Device.ReadAt(p, off)
}

func (d *disk) TryReadAt(p []byte, off int64) error {
	time.Sleep(time.Millisecond)
	_, err := d.Device.ReadAt(p, off)
	return err
}

func (d *disk) TryWriteAt([]byte, int64) error { return dev.ErrWouldBlock }

// TestSlowDeviceTogether: requests that come at the same time are not done one after the other by
// the threads when the device is slow, although it can do each at once.
func TestSlowDeviceTogether(t *testing.T) {
	needRoot(t)
	const clients = 12
	d := &disk{Device: dev.NewMem(1 << 20), together: clients / 2}
	d.cond = sync.NewCond(&d.mu)
	path := filepath.Join(shmDir(t), "file")
	f, err := ServeFile(path, d, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(ctx(t)); err != nil {
			t.Error(err)
		}
	}()
	limit := time.AfterFunc(20*time.Second, func() {
		d.mu.Lock()
		d.late = true
		d.mu.Unlock()
		d.cond.Broadcast()
	})
	defer limit.Stop()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fd)
			p := make([]byte, 4096)
			for over := false; !over; {
				if _, err := unix.Pread(fd, p, 0); err != nil {
					t.Error(err)
					return
				}
				d.mu.Lock()
				over = d.met || d.late
				d.mu.Unlock()
			}
		})
	}
	wg.Wait()
	if !d.met {
		t.Errorf("there were never %d reads at the same time", d.together)
	}
}
