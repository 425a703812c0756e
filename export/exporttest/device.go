package exporttest

import (
	"errors"
	"sync"
	"sync/atomic"

	"mica/dev"
)

// device is what tests export: memory, with hooks.
type device = dev.Device

// A disk is a device in memory with a volatile cache: what was not flushed is known. Safe for
// concurrent use.
type disk struct {
	*dev.Mem
	mu       sync.Mutex
	dirty    []dev.Extent // guarded by mu; written since the last flush began
	flushes  int          // guarded by mu
	zeroed   int64        // guarded by mu; bytes
	unmapped int64        // guarded by mu; bytes

	size   atomic.Int64 // 0: that of Mem
	before atomic.Pointer[func(write bool, off int64) error]
}

// setBefore has f called before each request; it may wait. nil: nothing is.
func (d *disk) setBefore(f func(write bool, off int64) error) { d.before.Store(&f) }

// wait is what f says.
func (d *disk) wait(write bool, off int64) error {
	if f := d.before.Load(); f != nil && *f != nil {
		return (*f)(write, off)
	}
	return nil
}

func newDisk(size int64) *disk { return &disk{Mem: dev.NewMem(size)} }

func (d *disk) BlockSize() int64 { return 64 << 10 }

func (d *disk) note(off, n int64) {
	d.mu.Lock()
	d.dirty = append(d.dirty, dev.Extent{Off: off, Len: n})
	d.mu.Unlock()
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.wait(false, off); err != nil {
		return 0, err
	}
	return d.Mem.ReadAt(p, off)
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.wait(true, off); err != nil {
		return 0, err
	}
	n, err := d.Mem.WriteAt(p, off)
	d.note(off, int64(n))
	return n, err
}

func (d *disk) WriteZeroes(off, n int64, keep bool) error {
	if err := d.wait(true, off); err != nil {
		return err
	}
	zeros := make([]byte, min(n, 1<<20))
	for o := off; o < off+n; o += int64(len(zeros)) {
		if _, err := d.Mem.WriteAt(zeros[:min(int64(len(zeros)), off+n-o)], o); err != nil {
			return err
		}
	}
	d.note(off, n)
	d.mu.Lock()
	d.zeroed += n
	d.mu.Unlock()
	return nil
}

func (d *disk) Discard(off, n int64) error {
	d.mu.Lock()
	d.unmapped += n
	d.mu.Unlock()
	return nil
}

// Flush makes durable what was acknowledged before it began.
func (d *disk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dirty = nil
	d.flushes++
	return nil
}

// unflushed reports whether a byte of a range was written since the last flush.
func (d *disk) unflushed(off, n int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.dirty {
		if e.Off < off+n && off < e.Off+e.Len {
			return true
		}
	}
	return false
}

// A trying disk serves requests at once where it can: every third one "would block".
type trying struct {
	*disk
	tries, served atomic.Int64
}

func (d *trying) TryReadAt(p []byte, off int64) error {
	if d.tries.Add(1)%3 == 0 {
		return dev.ErrWouldBlock
	}
	d.served.Add(1)
	_, err := d.ReadAt(p, off)
	return err
}

func (d *trying) TryWriteAt(p []byte, off int64) error {
	if d.tries.Add(1)%3 == 0 {
		return dev.ErrWouldBlock
	}
	d.served.Add(1)
	_, err := d.WriteAt(p, off)
	return err
}

var errBroken = errors.New("broken on purpose")
