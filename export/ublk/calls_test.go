package ublk

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// A counted device does everything at once and counts what it is asked.
type counted struct {
	*dev.Mem
	tries, others, flushes, tryFlushes atomic.Int64
}

func (d *counted) TryReadAt(p []byte, off int64) error {
	d.tries.Add(1)
	_, err := d.Mem.ReadAt(p, off)
	return err
}

func (d *counted) TryWriteAt(p []byte, off int64) error {
	d.tries.Add(1)
	_, err := d.Mem.WriteAt(p, off)
	return err
}

func (d *counted) ReadAt(p []byte, off int64) (int, error) {
	d.others.Add(1)
	return d.Mem.ReadAt(p, off)
}

func (d *counted) WriteAt(p []byte, off int64) (int, error) {
	d.others.Add(1)
	return d.Mem.WriteAt(p, off)
}

func (d *counted) Flush() error { d.flushes.Add(1); return nil }

func (d *counted) TryFlush() error { d.tryFlushes.Add(1); return nil }

// TestCalls counts what requests cost the server: one call of io_uring for each that comes alone, and
// fewer than one when there are many at once; no worker for what can be done at once; and flushes of
// who writes and flushes in turn need none either.
func TestCalls(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: block devices need root")
	}
	if err := Available(); err != nil {
		t.Skipf("SKIPPED here: %v", err)
	}
	const size, n = 16 << 20, 2000
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	e, err := New(Options{RunDir: filepath.Join(t.TempDir(), "run")})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	d := &counted{Mem: dev.NewMem(size)}
	a, err := e.Attach(ctx, "calls", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Detach(ctx); err != nil {
			t.Error(err)
		}
	}()
	f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	calls := func() (n uint64) {
		for _, q := range e.x.List()[0].N.s.queues {
			n += q.ring.Calls()
		}
		return n
	}
	load := func(jobs int, do func(p []byte, off int64) error) (calledPerRequest float64) {
		before := calls()
		var wg sync.WaitGroup
		for j := range jobs {
			p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(p)
			wg.Go(func() {
				for i := j; i < n; i += jobs {
					if err := do(p, int64(i*7%(size/4096))*4096); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return float64(calls()-before) / n
	}
	read := func(p []byte, off int64) error { _, err := f.ReadAt(p, off); return err }
	write := func(p []byte, off int64) error { _, err := f.WriteAt(p, off); return err }
	load(1, read) // the habit of coming alone

	// A call ends early when the Go runtime wants something from the thread.
	one, oneWrite, many := load(1, read), load(1, write), load(16, read)
	t.Logf("calls of a read %.2f, of a write %.2f, of a read among 16 %.2f", one, oneWrite, many)
	if one > 1.3 || oneWrite > 1.3 {
		t.Errorf("%.2f calls for a read and %.2f for a write that comes alone, want 1", one, oneWrite)
	}
	if many > 1.3 {
		t.Errorf("%.2f calls for a read among 16, want at most 1", many)
	}
	if tries, others := d.tries.Load(), d.others.Load(); tries+others < 4*n || others > tries/10 {
		t.Errorf("%d requests were served at once and %d by workers", tries, others)
	}
	synced := load(1, func(p []byte, off int64) error {
		if err := write(p, off); err != nil {
			return err
		}
		return unix.Fdatasync(int(f.Fd()))
	})
	here, workers := d.tryFlushes.Load(), d.flushes.Load()
	t.Logf("calls of a write and a flush %.2f; flushes at once %d, by workers %d", synced, here, workers)
	if here+workers < n || workers > here/10 {
		t.Errorf("%d flushes were done at once and %d by workers", here, workers)
	}
	if synced > 2.6 {
		t.Errorf("%.2f calls for a write and a flush, want 2", synced)
	}
}
