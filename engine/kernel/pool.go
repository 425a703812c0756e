package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/internal/dmioctl"
	"mica/thin"
)

// Options are the properties of an opened pool. The zero value is a pool as the kernel opens it
// by default. A pool that is active already (a predecessor's, or one named by Source.Pool) keeps
// the properties that it has.
type Options struct {
	ReadOnly          bool
	SkipBlockZeroing  bool
	NoDiscardPassdown bool
	ErrorIfNoSpace    bool
	LowWaterMark      uint64 // free data blocks at which an event is sent; 0: none
	// BlockSize, if not 0, is what the pool's data blocks must be, in bytes.
	BlockSize int64
	// Adopt takes an active pool (Source.Pool) that has thin devices already. They are foreign to
	// whoever did not make them.
	Adopt    bool
	LockWait time.Duration // how long Open waits for a dying predecessor; 0: 10 s
	Logger   *slog.Logger  // nil: slog.Default
}

// A Pool is one opened pool of the kernel. It implements engine.Pool. Safe for concurrent use;
// the package comment has the lock order.
//
// Goroutines: watchLoop (events of device-mapper), trimLoop (holes for what was deleted). Both end
// with Close.
type Pool struct {
	src  Source
	opts Options
	log  *slog.Logger
	dm   *dmioctl.Control
	id   string // POOL in names
	name string // of the pool's device
	node string
	num  string // major:minor of the pool's device
	bs   int64  // bytes of a data block
	ours bool   // the pool was activated by this engine: it is deactivated by Close

	meta, data *medium // nil for an active pool that is not ours
	metaDev    *direct // the metadata device, beside the kernel
	names      names
	snaps      readers
	events     events
	trim       trimmer
	devices    atomic.Int64  // thin devices of the pool
	views      atomic.Uint64 // counts read-only nodes, for their names

	// tableMu is held for writing by who suspends the pool, and for reading by who loads a table
	// of a thin device, which the kernel refuses meanwhile.
	tableMu sync.RWMutex

	// For tests: called between the superblock and the reads of a look, and of a step of a trim.
	looking, trimming func()

	stop  chan struct{}
	loops sync.WaitGroup

	mu     sync.Mutex
	open   map[thin.DevID]*handles // guarded by mu
	left   map[string]*leftover    // by name; guarded by mu
	kept   int                     // nodes that stay when the pool is closed; guarded by mu
	closed bool                    // guarded by mu
}

var _ engine.Pool = (*Pool)(nil)

// handles counts who has a thin device open through this pool.
type handles struct {
	writer  bool
	readers int
}

// poolStatus asks the kernel. Without noFlush the pool commits first.
func (p *Pool) poolStatus(noFlush bool) (dmioctl.PoolStatus, error) {
	t, err := p.dm.Status(p.name, noFlush)
	if err != nil {
		return dmioctl.PoolStatus{}, fmt.Errorf("status of pool %s: %w", p.src, err)
	}
	if len(t) != 1 || t[0].Type != "thin-pool" {
		return dmioctl.PoolStatus{}, fmt.Errorf("device %s is no thin pool any more: %v", p.name, t)
	}
	return dmioctl.ParsePoolStatus(t[0].Params)
}

// Commit makes everything acknowledged so far durable: what was written in place by a flush of the
// data device, the rest by a commit of the kernel.
func (p *Pool) Commit(ctx context.Context) error {
	if p.opts.ReadOnly {
		return nil
	}
	f, err := os.OpenFile(p.node, os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	err = f.Sync() // requests to the pool's device go to the data device
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("commit: flush the data device: %w", err)
	}
	st, err := p.poolStatus(false)
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if st.Failed || st.Mode == "ro" && st.NeedsCheck {
		return fmt.Errorf("commit: %w", p.writable())
	}
	return nil
}

// Close commits and closes. ErrInUse while thin devices are open. Where nodes were left for a
// successor (KeepNode), or are used by somebody who was left over, the pool stays active in the
// kernel and only this process lets go of it; so does a pool that is not ours.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	if n := len(p.open); n > 0 {
		p.mu.Unlock()
		return fmt.Errorf("close pool: %d thin devices are open: %w", n, engine.ErrInUse)
	}
	p.closed = true
	p.mu.Unlock()

	close(p.stop)
	p.events.stopWatch()
	p.loops.Wait()
	p.snaps.close()
	var errs []error
	if st, err := p.poolStatus(true); err == nil && !st.Failed && st.Mode != "ro" {
		errs = append(errs, p.Commit(context.Background()))
	}
	errs = append(errs, p.metaDev.Close())
	keep := !p.ours
	if p.ours {
		var busy []string
		p.mu.Lock()
		keep = p.kept > 0
		p.mu.Unlock()
		if !keep {
			if busy = p.sweep(); len(busy) > 0 {
				p.log.Warn("the pool stays active: its devices are in use", "pool", p.src.String(), "devices", busy)
				keep = true
			}
		}
	}
	if !keep {
		errs = append(errs, p.deactivate(context.Background()))
	}
	errs = append(errs, p.data.close(), p.meta.close(), p.dm.Close())
	p.events.Close()
	return errors.Join(errs...)
}

// deactivate removes the pool's device and the loop devices below it.
func (p *Pool) deactivate(ctx context.Context) error {
	if err := removePatiently(ctx, p.dm, p.name); err != nil {
		return fmt.Errorf("deactivate pool %s: %w", p.src, err)
	}
	return errors.Join(p.data.detach(ctx), p.meta.detach(ctx))
}

// removeWait is how long the removal of a node waits for an opener that is about to go: udev opens
// every changed device for some milliseconds.
const removeWait = 2 * time.Second

// removePatiently removes a device; EBUSY if it is still open after removeWait.
func removePatiently(ctx context.Context, dm *dmioctl.Control, name string) error {
	deadline := time.Now().Add(removeWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := dm.Remove(name, false)
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(deadline):
			return err
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}

// checkSize is for lengths of thin devices.
func checkSize(sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes%sectorSize != 0 {
		return fmt.Errorf("size of %d bytes: want a positive multiple of %d: %w", sizeBytes, sectorSize, dev.ErrOutOfRange)
	}
	return nil
}

const sectorSize = 512
