package kernel

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"mica/dev"
)

// bounceBytes is the length of the buffers through which requests go that are not aligned as the
// device wants it.
const bounceBytes = 256 << 10

var bounce = sync.Pool{New: func() any { b := aligned(bounceBytes); return &b }}

// A direct is a block device node without the page cache: a write that has returned is where a
// snapshot finds it, and a read sees what others wrote. Requests may have any offset and length;
// those that do not fit the sectors go through a buffer. Safe for concurrent use.
type direct struct {
	path   string
	fd     int
	sector int64 // logical sector size in bytes

	mu     sync.RWMutex // held for reading by requests; Close waits for them
	closed bool         // guarded by mu
	edges  sync.Mutex   // one change of a part of a sector at a time
}

func openDirect(path string, readOnly bool) (*direct, error) {
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	fd, err := unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	if err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "sector size of", Path: path, Err: err}
	}
	return &direct{path: path, fd: fd, sector: int64(n)}, nil
}

func (d *direct) enter() error {
	d.mu.RLock()
	if d.closed {
		d.mu.RUnlock()
		return dev.ErrClosed
	}
	return nil
}

// Size is the device's length now.
func (d *direct) Size() int64 {
	if d.enter() != nil {
		return 0
	}
	defer d.mu.RUnlock()
	n, err := ioctlSize(d.fd)
	if err != nil {
		return 0
	}
	return n
}

// fits reports whether the kernel takes the request as it is.
func (d *direct) fits(p []byte, off int64) bool {
	return off%d.sector == 0 && int64(len(p))%d.sector == 0 && alignedTo(p, d.sector)
}

// ReadAt reads; the caller has checked the range against the device's length.
func (d *direct) ReadAt(p []byte, off int64) (int, error) {
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.mu.RUnlock()
	if d.fits(p, off) {
		return d.pread(p, off)
	}
	buf := bounce.Get().(*[]byte)
	defer bounce.Put(buf)
	done := 0
	for done < len(p) {
		begin, end := d.around(off+int64(done), int64(len(p)-done))
		b := (*buf)[:end-begin]
		n, err := d.pread(b, begin)
		skip := int(off + int64(done) - begin)
		c := copy(p[done:], b[min(skip, n):n])
		done += c
		if err != nil && (err != io.EOF || done < len(p)) {
			return done, err
		}
		if c == 0 {
			return done, io.ErrUnexpectedEOF
		}
	}
	return done, nil
}

// around is the range of whole sectors over [off, off+n), cut to a buffer.
func (d *direct) around(off, n int64) (begin, end int64) {
	begin = off / d.sector * d.sector
	end = (off + n + d.sector - 1) / d.sector * d.sector
	return begin, min(end, begin+bounceBytes)
}

func (d *direct) pread(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pread(d.fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return done, &os.PathError{Op: "read", Path: d.path, Err: err}
		case n == 0:
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// WriteAt writes; the caller has checked the range.
func (d *direct) WriteAt(p []byte, off int64) (int, error) {
	if err := d.enter(); err != nil {
		return 0, err
	}
	defer d.mu.RUnlock()
	if d.fits(p, off) {
		return d.pwrite(p, off)
	}
	buf := bounce.Get().(*[]byte)
	defer bounce.Put(buf)
	if off%d.sector != 0 || int64(len(p))%d.sector != 0 {
		d.edges.Lock()
		defer d.edges.Unlock()
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		begin, end := d.around(at, int64(len(p)-done))
		b := (*buf)[:end-begin]
		stop := min(end, off+int64(len(p)))
		// What the first and the last sector hold beside the new bytes.
		if at != begin {
			if _, err := d.pread(b[:d.sector], begin); err != nil {
				return done, err
			}
		}
		if last := end - d.sector; stop != end && (last != begin || at == begin) {
			if _, err := d.pread(b[last-begin:], last); err != nil {
				return done, err
			}
		}
		n := copy(b[at-begin:stop-begin], p[done:])
		if _, err := d.pwrite(b, begin); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (d *direct) pwrite(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pwrite(d.fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = unix.EIO
		}
		if err != nil {
			return done, &os.PathError{Op: "write", Path: d.path, Err: err}
		}
		done += n
	}
	return done, nil
}

// Flush makes what was written durable, and commits the pool if the device's mappings changed.
func (d *direct) Flush() error {
	return d.call("fdatasync", func() error { return unix.Fdatasync(d.fd) })
}

// discard and zero are BLKDISCARD and BLKZEROOUT; whole sectors.
func (d *direct) discard(off, n int64) error {
	return d.call("discard", func() error { return ioctlRange(d.fd, unix.BLKDISCARD, off, n) })
}

func (d *direct) zero(off, n int64) error {
	return d.call("zero", func() error { return ioctlRange(d.fd, unix.BLKZEROOUT, off, n) })
}

func (d *direct) call(op string, fn func() error) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.mu.RUnlock()
	for {
		err := fn()
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: op, Path: d.path, Err: err}
		}
		return nil
	}
}

// Close waits for requests in flight.
func (d *direct) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	if err := unix.Close(d.fd); err != nil {
		return fmt.Errorf("close %s: %w", d.path, err)
	}
	return nil
}
