package dev

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Large writes past the page cache.
//
// A sync of a file waits for all of its pages that are on their way to the disk, also those that
// somebody else has written and goes on writing: one that writes in sequence through the page cache
// makes every sync of its neighbours take tens of milliseconds, and is itself held up by them. So
// while there are syncs, large aligned writes go straight to the disk, by a second descriptor with
// O_DIRECT. Without syncs they go through the page cache, where whoever reads them next finds them.
//
// The kernel does not want a page that is being written directly to become dirty meanwhile: it
// takes that for a lost write, and fails the next sync. So writes that overlap do not run at
// the same time if one of them is direct (stripes). Readers need not wait.
//
// The lock of the file stays on the first descriptor. A process that is killed closes none of its
// descriptors before all of its threads have left their system calls, so that the lock ends after
// the last direct write too.
type direct struct {
	fd     int
	failed atomic.Bool // the file system refused: never again
	writes atomic.Int64

	mu      sync.Mutex
	flushes [busyFlushes]time.Duration // guarded by mu; when the last ones began
	next    int                        // guarded by mu
	until   atomic.Int64               // there are syncs until then, ns since epoch

	stripes [directStripes]sync.RWMutex
}

const (
	// directMin is the shortest write that goes past the page cache, bytes.
	directMin = 128 << 10
	// directAlign is what its offset, length and memory must be multiples of.
	directAlign = 4096
	// busyFlushes syncs within busyTime mean that there are syncs, for as long again.
	busyFlushes = 4
	busyTime    = time.Second
	// A stripe is for every directStripes-th piece of directPiece bytes.
	directPiece   = 1 << 20
	directStripes = 512
)

// epoch is what the times are relative to.
var epoch = time.Now()

// inMemory reports whether a file lies in memory, where there is no disk to wait for.
func inMemory(fd int) bool {
	var st unix.Statfs_t
	err := unix.Fstatfs(fd, &st)
	return err == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

// newDirect opens the second descriptor of a file or a block device; nil if it is not to be had.
func newDirect(fd int) *direct {
	// By the descriptor and not by the path, which may name another file by now.
	dfd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return &direct{fd: dfd}
}

// close closes the descriptor. Nobody writes any more.
func (d *direct) close() {
	if d != nil {
		unix.Close(d.fd)
	}
}

// flushed notes that a sync begins.
func (d *direct) flushed() {
	if d == nil {
		return
	}
	now := time.Since(epoch)
	d.mu.Lock()
	oldest := d.flushes[d.next]
	d.flushes[d.next] = now
	d.next = (d.next + 1) % busyFlushes
	d.mu.Unlock()
	if oldest > 0 && now-oldest < busyTime {
		d.until.Store(int64(now + busyTime))
	}
}

// wants reports whether a write should go past the page cache.
func (d *direct) wants(p []byte, off int64) bool {
	return len(p) >= directMin && off%directAlign == 0 && len(p)%directAlign == 0 && aligned(p, directAlign) &&
		!d.failed.Load() && int64(time.Since(epoch)) < d.until.Load()
}

// pwrite writes p to fd, or past the page cache; d may be nil.
func (d *direct) pwrite(fd int, p []byte, off int64) (int, error) {
	if d == nil || len(p) == 0 {
		return pwriteFull(fd, p, off)
	}
	if !d.wants(p, off) {
		d.each(off, len(p), (*sync.RWMutex).RLock)
		defer d.each(off, len(p), (*sync.RWMutex).RUnlock)
		return pwriteFull(fd, p, off)
	}
	d.each(off, len(p), (*sync.RWMutex).Lock)
	defer d.each(off, len(p), (*sync.RWMutex).Unlock)
	return d.past(fd, p, off)
}

// past writes past the page cache, or if the file system does not do that, through it.
func (d *direct) past(fd int, p []byte, off int64) (int, error) {
	d.writes.Add(1)
	n, err := pwriteFull(d.fd, p, off)
	if err == unix.EINVAL || err == unix.EOPNOTSUPP {
		d.failed.Store(true)
		var rest int
		rest, err = pwriteFull(fd, p[n:], off+int64(n))
		n += rest
	}
	return n, err
}

// each calls fn for the stripes of a range, which is not empty, in rising order.
func (d *direct) each(off int64, n int, fn func(*sync.RWMutex)) {
	first, last := off/directPiece, (off+int64(n)-1)/directPiece
	if last-first >= directStripes-1 {
		for i := range d.stripes {
			fn(&d.stripes[i])
		}
		return
	}
	a, b := first%directStripes, last%directStripes
	if a <= b {
		for i := a; i <= b; i++ {
			fn(&d.stripes[i])
		}
		return
	}
	for i := int64(0); i <= b; i++ {
		fn(&d.stripes[i])
	}
	for i := a; i < directStripes; i++ {
		fn(&d.stripes[i])
	}
}
