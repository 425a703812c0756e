package ublk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
	"mica/internal/uring"

	"golang.org/x/sys/unix"
)

// A placed device is a medium whose every range is in one piece, shift bytes further on.
type placed struct {
	dev.Device
	fd                  int
	shift               int64
	places, pins, reads atomic.Int64
}

func (d *placed) PlaceRead(off, n int64) (dev.Place, bool) {
	d.places.Add(1)
	d.pins.Add(1)
	return dev.Place{FD: d.fd, Off: off + d.shift, Pinner: d}, true
}

func (d *placed) Unpin(uint32) { d.pins.Add(-1) }

func (d *placed) ReadAt(p []byte, off int64) (int, error) {
	d.reads.Add(1)
	return d.Device.ReadAt(p, off)
}

// newPlaced is a file of n bytes that say where they are, in dir.
func newPlaced(t *testing.T, dir string, n int64) *placed {
	t.Helper()
	f, err := dev.CreateFile(filepath.Join(dir, "medium"), n, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(numbered(0, int(n)), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Flush(); err != nil {
		t.Fatal(err)
	}
	return &placed{Device: f, fd: f.Descriptor()}
}

// numbered are n bytes from off on in which each 512 have a number.
func numbered(off int64, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((off + int64(i)) >> 9 * 167)
	}
	return p
}

func (d *placed) forget(t *testing.T) {
	t.Helper()
	if err := unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// readRig is a server of d with a ring, whose driver is a file.
func readRig(t *testing.T, d *placed, depth int) *queue {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	s := newIdleServer(t, d, depth)
	s.place, s.inlineMax, s.log = d, 128<<10, slog.New(slog.NewTextHandler(io.Discard, nil))
	var err error
	if s.fd, err = unix.MemfdCreate("driver", unix.MFD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	q := s.queues[0]
	if q.ring, err = uring.New(uring.Options{Entries: depth}); err != nil {
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			t.Skipf("SKIPPED: no io_uring here: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.idle()
		q.ring.Close()
		unix.Close(s.fd)
		if n := d.pins.Load(); n != 0 || s.bufs.out != 0 || q.reading != 0 {
			t.Errorf("%d places and %d buffers are held, %d bytes are read", n, s.bufs.out, q.reading)
		}
	})
	return q
}

func (q *queue) tryRead(tag int, off, n int64) error {
	t := &q.tasks[tag]
	t.ioDesc = ioDesc{op: opRead, off: off, n: n}
	q.busy++
	err := q.try(t)
	q.end(t, err)
	return err
}

// answered checks what the driver got for a tag.
func (q *queue) answered(t *testing.T, what string, tag int, off int64, n int) {
	t.Helper()
	got := make([]byte, n)
	if _, err := unix.Pread(q.s.fd, got, dataOffset(0, uint16(tag))); err != nil || !bytes.Equal(got, numbered(off, n)) {
		t.Errorf("%s: other data than was read (%v)", what, err)
	}
}

// wait takes completions until nothing is served any more.
func (q *queue) wait(t *testing.T) {
	t.Helper()
	for q.busy > 0 {
		if q.takeDone(false) {
			continue
		}
		if err := q.ring.Enter(0); err != nil {
			t.Fatal(err)
		}
		q.ring.Reap(q.reap)
		runtime.Gosched()
	}
}

// TestRingReads: what is in the page cache is served at once, what is not is read by the ring, and what
// cannot be read so goes to a worker. Nothing stays pinned.
func TestRingReads(t *testing.T) {
	d := newPlaced(t, t.TempDir(), 1<<20)
	q := readRig(t, d, 8)
	d.forget(t)
	if err := q.tryRead(0, 64<<10, 4096); err == dev.ErrWouldBlock && q.s.noNowait.Load() {
		t.Skip("SKIPPED: the file system of the temporary directory waits for every read")
	} else if err != errLater {
		t.Skipf("SKIPPED: the page cache does not forget: %v", err)
	}
	q.wait(t)
	q.answered(t, "cold", 0, 64<<10, 4096)
	if err := q.tryRead(1, 64<<10, 4096); err != nil {
		t.Errorf("read of what is in the page cache: %v", err)
	}
	q.answered(t, "cached", 1, 64<<10, 4096)
	if n := q.s.ringReads.Load(); n != 1 || q.misses != 0 {
		t.Errorf("%d reads of the ring, %d misses", n, q.misses)
	}

	// In the cold it does not ask each time.
	q.misses = missesFor
	if err := q.tryRead(2, 64<<10, 4096); err != errLater {
		t.Errorf("read in the cold: %v", err)
	}
	q.wait(t)
	q.unlooked = lookEvery
	if err := q.tryRead(2, 64<<10, 4096); err != nil || q.misses != 0 {
		t.Errorf("it does not ask any more: %v", err)
	}

	for what, misses := range map[string]int{"cached": 0, "by the ring": missesFor} {
		if n := testing.AllocsPerRun(50, func() {
			q.misses, q.unlooked = misses, 0
			q.tryRead(2, 64<<10, 4096)
			q.wait(t)
		}); n != 0 {
			t.Errorf("a read, %s, makes %v allocations", what, n)
		}
	}

	// What is short is repeated by a worker.
	d.shift, q.misses = 1<<20, missesFor
	if err := q.tryRead(3, 8192, 4096); err != errLater {
		t.Errorf("read behind the end: %v", err)
	}
	q.wait(t)
	d.shift = 0
	if d.reads.Load() != 1 {
		t.Errorf("%d reads by workers, want 1", d.reads.Load())
	}
	q.answered(t, "short", 3, 8192, 4096)

	q.reading, q.misses = maxReading, missesFor
	if err := q.tryRead(4, 0, 4096); err != dev.ErrWouldBlock {
		t.Errorf("more bytes than may be read at once: %v", err)
	}
	q.reading = 0
	q.wait(t)
	places := d.places.Load()
	if err := q.tryRead(5, 0, 256<<10); err != dev.ErrWouldBlock || d.places.Load() != places {
		t.Errorf("a long read: %v, %d places", err, d.places.Load())
	}
	q.wait(t)
}

// TestReadsInMemory: where reads do not wait there is nothing for the ring.
func TestReadsInMemory(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "mica-ublk-")
	if err != nil {
		t.Skipf("SKIPPED: no memory to make files in: %v", err)
	}
	defer os.RemoveAll(dir)
	d := newPlaced(t, dir, 1<<20)
	q := readRig(t, d, 4)
	for range 2 {
		if err := q.tryRead(0, 0, 4096); err != nil && err != dev.ErrWouldBlock {
			t.Error(err)
		}
		q.wait(t)
	}
	if n := q.s.ringReads.Load(); n != 0 {
		t.Errorf("%d reads of the ring", n)
	}
}

// TestColdReads reads from a disk, with nothing in the page cache, through the kernel. MICA_DISK names
// a block device that may be overwritten.
func TestColdReads(t *testing.T) {
	disk := os.Getenv("MICA_DISK")
	if disk == "" {
		t.Skip("SKIPPED: MICA_DISK names no block device")
	}
	if err := Available(); err != nil {
		t.Skipf("SKIPPED here: %v", err)
	}
	b, err := dev.OpenBlock(disk, dev.OpenOptions{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	size := b.Size()
	if _, err := b.WriteAt(numbered(0, int(size)), 0); err != nil {
		t.Fatal(err)
	}
	if err := b.Flush(); err != nil {
		t.Fatal(err)
	}
	d := &placed{Device: b, fd: b.Descriptor()}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	e, err := New(Options{RunDir: filepath.Join(t.TempDir(), "run")})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	a, err := e.Attach(ctx, "cold", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Detach(ctx); err != nil {
			t.Error(err)
		}
		if n := d.pins.Load(); n != 0 {
			t.Errorf("%d places are pinned", n)
		}
	}()
	f, err := os.OpenFile(a.Node(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	const jobs, each = 16, 100
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for j := range jobs {
		p, err := unix.Mmap(-1, 0, 16<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(p)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(j)))
			for range each {
				n := (1 + rnd.IntN(32)) * 512
				off := rnd.Int64N((size-int64(n))/512) * 512
				if _, err := f.ReadAt(p[:n], off); err != nil || !bytes.Equal(p[:n], numbered(off, n)) {
					t.Errorf("read of %d bytes at %d: %v, or other data", n, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	ring := e.x.List()[0].N.s.ringReads.Load()
	t.Logf("%d reads, %d by the ring, %d by workers", jobs*each, ring, d.reads.Load())
	if ring == 0 || d.reads.Load() > 0 {
		t.Errorf("%d reads by the ring and %d by workers, want some and none", ring, d.reads.Load())
	}
}
