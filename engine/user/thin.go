package user

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// A Thin is a handle of an open thin device. It implements engine.Thin. Safe for concurrent use.
type Thin struct {
	p        *Pool
	d        *device
	bs       int64 // bytes of a block
	readOnly bool
	origin   dev.Device   // external origin, or nil
	size     atomic.Int64 // bytes

	spaceWait time.Duration // 0: the pool's
	outMu     sync.Mutex
	outState  time.Time // guarded by outMu: the beginning of the state to which outSince belongs
	outSince  time.Time // guarded by outMu: when a write of this handle had to wait first

	closed    atomic.Bool
	closing   chan struct{} // closed when Close begins
	closeOnce sync.Once
	closeErr  error
}

var _ engine.Thin = (*Thin)(nil)

func (t *Thin) ID() thin.DevID { return t.d.id }

func (t *Thin) ReadOnly() bool { return t.readOnly }

func (t *Thin) Size() int64 { return t.size.Load() }

// BlockSize is the pool's data block size in bytes.
func (t *Thin) BlockSize() int64 { return t.bs }

func (t *Thin) MappedBlocks() uint64 { return uint64(max(0, t.d.mapped.Load())) }

// Resize changes the length. Blocks beyond a smaller length stay mapped, and show again when the
// device is made longer.
func (t *Thin) Resize(sizeBytes int64) error {
	if err := CheckSize(sizeBytes, t.bs); err != nil {
		return fmt.Errorf("resize thin %d: %w", t.d.id, err)
	}
	t.d.table.reach(uint64((sizeBytes + t.bs - 1) / t.bs))
	t.size.Store(sizeBytes)
	return nil
}

// Flush makes every write acknowledged before the call durable: a data sync, or a commit if
// mappings of this device are not durable yet.
func (t *Thin) Flush() error {
	if t.closed.Load() {
		return t.wrap("flush", dev.ErrClosed)
	}
	if t.p.opts.ReadOnly {
		return nil
	}
	if err := t.p.flush(t.d); err != nil {
		return t.wrap("flush", err)
	}
	return nil
}

// TryFlush is Flush if every mapping of this device is durable: it takes a data sync at most, its
// own or one that is under way.
func (t *Thin) TryFlush() error {
	if t.closed.Load() || t.p.opts.ReadOnly {
		return dev.ErrWouldBlock // Flush says what is wrong
	}
	err := t.p.tryFlush(t.d)
	if err != nil && err != dev.ErrWouldBlock {
		return t.wrap("flush", err)
	}
	return err
}

// Close waits for requests in flight; writes that wait for space fail. It does not flush.
func (t *Thin) Close() error {
	t.closeOnce.Do(func() {
		t.closed.Store(true)
		close(t.closing)
		t.d.r.drain()
		t.d.w.drain()
		t.closeErr = t.d.close(!t.readOnly)
		if errors.Is(t.closeErr, engine.ErrFailed) {
			t.closeErr = nil // said by the flush that failed, or by the pool's Close
		}
	})
	return t.closeErr
}

func (t *Thin) wrap(what string, err error) error {
	return fmt.Errorf("thin %d: %s: %w", t.d.id, what, err)
}

// enterRead takes a readers' token of an open handle.
func (t *Thin) enterRead() (uint32, error) {
	token := t.d.r.enter()
	if t.closed.Load() {
		t.d.r.exit(token)
		return 0, dev.ErrClosed
	}
	return token, nil
}

// enterWrite takes a writers' token if the handle is open and the pool accepts changes.
func (t *Thin) enterWrite() (uint32, error) {
	token := t.d.w.enter()
	if err := t.mayWrite(); err != nil {
		t.d.w.exit(token)
		return 0, err
	}
	return token, nil
}

func (t *Thin) mayWrite() error {
	switch {
	case t.closed.Load():
		return dev.ErrClosed
	case t.p.failure.Load() != nil:
		return t.p.writable()
	}
	return nil
}

// originBytes is how much of the external origin lies at or after off.
func (t *Thin) originBytes(off int64) int64 {
	if t.origin == nil {
		return 0
	}
	return max(0, t.origin.Size()-off)
}

// readOrigin fills p with what an unmapped range reads as.
func (t *Thin) readOrigin(p []byte, off int64) error {
	n := min(int64(len(p)), t.originBytes(off))
	if n > 0 {
		if _, err := t.origin.ReadAt(p[:n], off); err != nil {
			return fmt.Errorf("external origin, %d bytes at %d: %w", n, off, err)
		}
	}
	clear(p[n:])
	return nil
}
