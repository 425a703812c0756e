package layer

import (
	"errors"
	"sync"
	"sync/atomic"

	"mica/dev"
	"mica/engine"
	"mica/export"
)

// A noting is a device that remembers whether a write to it has failed. Whoever wrote may never
// hear of it: the kernel reports the error of a write-back to nobody who does not sync.
type noting struct {
	engine.Thin
	failed atomic.Bool
	once   sync.Once
	lost   func(error) // told of the first failure
}

func (d *noting) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.Thin.WriteAt(p, off)
	return n, d.note(err)
}

// A notedNode is a noting device that the kernel has a node for. Writes to the node do not pass
// through here: the device itself says whether some may have failed.
type notedNode struct {
	*noting
	export.Noder
}

// hasFailed reports whether a write to the device has failed, or may have.
func (d *noting) hasFailed() bool {
	l, ok := d.Thin.(interface{ Lost() bool })
	return d.failed.Load() || ok && l.Lost()
}

func (d *noting) WriteAtNoWait(p []byte, off int64) (int, error) {
	n, err := d.Thin.WriteAtNoWait(p, off)
	return n, d.note(err)
}

func (d *noting) TryWriteAt(p []byte, off int64) error {
	return d.note(d.Thin.TryWriteAt(p, off))
}

func (d *noting) WriteZeroes(off, n int64, keepAllocated bool) error {
	return d.note(d.Thin.WriteZeroes(off, n, keepAllocated))
}

// note looks at the outcome of a write. A device that is being closed fails nobody: the write
// waits for who opens it next.
func (d *noting) note(err error) error {
	if err == nil || errors.Is(err, dev.ErrWouldBlock) || errors.Is(err, dev.ErrClosed) {
		return err
	}
	d.failed.Store(true)
	d.once.Do(func() {
		if d.lost != nil {
			d.lost(err)
		}
	})
	return err
}

// lostWrites says whether a write to an attachment's device has failed since it was opened. l may be nil.
func (l *live) lostWrites() bool { return l != nil && l.noted != nil && l.noted.hasFailed() }
