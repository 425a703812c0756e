package dev

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// OpenOptions say how a file or a block device is opened.
type OpenOptions struct {
	ReadOnly bool
	// Lock takes the one-opener lock on the descriptor that does the I/O: flock, and O_EXCL on
	// block devices. It does not wait; who is refused gets ErrLocked. The lock ends with Close,
	// or with the last request in flight if the process is killed. A file under a loop device is
	// refused too: the kernel reads and writes it, whoever attached it.
	Lock bool
	// LoopOK allows a loop device on the file: the kernel engine's own.
	LoopOK bool
}

// A File is a regular file as a device: pread, pwrite, fdatasync, fallocate on one descriptor, and a
// second one for large writes while there are syncs (see direct).
// Its length is the file's when it is opened. Safe for concurrent use.
//
// Durability: Flush is fdatasync, which also makes a new length and punched holes durable.
type File struct {
	path string
	fd   int
	busy inflight
	size atomic.Int64

	direct *direct // for large writes; nil if there is no use for it

	resizeMu sync.Mutex  // one Resize at a time
	noZero   atomic.Bool // FALLOC_FL_ZERO_RANGE is not supported here
	noPunch  atomic.Bool // nor FALLOC_FL_PUNCH_HOLE
}

// OpenFile opens an existing regular file.
func OpenFile(path string, o OpenOptions) (*File, error) {
	fd, err := openFd(path, o, 0)
	if err != nil {
		return nil, err
	}
	return newFile(path, fd, o)
}

// CreateFile makes a new file of sizeBytes, all hole. It fails with os.ErrExist if the path is
// taken. The caller makes the directory entry durable (SyncDir).
func CreateFile(path string, sizeBytes int64, o OpenOptions) (*File, error) {
	fd, err := openFd(path, o, unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	f, err := newFile(path, fd, o)
	if err != nil {
		return nil, err
	}
	if err := f.Resize(sizeBytes); err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	return f, nil
}

// SyncDir makes new and removed entries of a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

func openFd(path string, o OpenOptions, flags int) (int, error) {
	flags |= unix.O_CLOEXEC
	if o.ReadOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	for {
		fd, err := unix.Open(path, flags, 0o600)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}

func newFile(path string, fd int, o OpenOptions) (*File, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("not a regular file")
	}
	if err == nil && o.Lock {
		if err = lockFd(fd, path); err == nil {
			err = replaced(path, &st)
		}
	}
	if err == nil && o.Lock && !o.LoopOK {
		err = loopHolder(path, &st)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, ErrLocked) {
			return nil, err
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := &File{path: path, fd: fd}
	if !o.ReadOnly && !inMemory(fd) {
		f.direct = newDirect(fd)
	}
	f.size.Store(st.Size)
	return f, nil
}

// Path is the path that the file was opened by.
func (f *File) Path() string { return f.path }

func (f *File) Descriptor() int { return f.fd }

func (f *File) Size() int64 { return f.size.Load() }

func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if !f.busy.enter() {
		return 0, ErrClosed
	}
	defer f.busy.leave()
	n, end := CheckRead(off, len(p), f.size.Load())
	if err := preadFull(f.fd, p[:n], off); err != nil {
		return 0, &os.PathError{Op: "read", Path: f.path, Err: err}
	}
	return n, end
}

func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if !f.busy.enter() {
		return 0, ErrClosed
	}
	defer f.busy.leave()
	if err := CheckRange(off, int64(len(p)), f.size.Load()); err != nil {
		return 0, fmt.Errorf("write %s: %w", f.path, err)
	}
	n, err := f.direct.pwrite(f.fd, p, off)
	if err != nil {
		return n, &os.PathError{Op: "write", Path: f.path, Err: err}
	}
	return n, nil
}

// Flush is fdatasync. An error is reported once by the kernel and must be taken as the loss of
// anything written since the last Flush that succeeded.
func (f *File) Flush() error {
	if !f.busy.enter() {
		return ErrClosed
	}
	defer f.busy.leave()
	f.direct.flushed()
	return f.op("fdatasync", func() error { return unix.Fdatasync(f.fd) })
}

// Discard punches a hole: the range reads as zeros and its space goes back to the host.
// ErrUnsupported where the file system has no holes.
func (f *File) Discard(off, n int64) error {
	if !f.busy.enter() {
		return ErrClosed
	}
	defer f.busy.leave()
	if err := CheckRange(off, n, f.size.Load()); err != nil {
		return fmt.Errorf("discard %s: %w", f.path, err)
	}
	return f.punch(off, n)
}

// DiscardZeroes: a punched hole reads as zeros.
func (f *File) DiscardZeroes() bool { return true }

func (f *File) punch(off, n int64) error {
	if n == 0 {
		return nil
	}
	if f.noPunch.Load() {
		return fmt.Errorf("punch hole in %s: %w", f.path, ErrUnsupported)
	}
	err := f.op("punch hole", func() error {
		return unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		f.noPunch.Store(true)
	}
	return err
}

// WriteZeroes punches a hole, or with keepAllocated zeroes the range and keeps its space; where
// the file system can do neither it writes zeros.
func (f *File) WriteZeroes(off, n int64, keepAllocated bool) error {
	if !f.busy.enter() {
		return ErrClosed
	}
	defer f.busy.leave()
	if err := CheckRange(off, n, f.size.Load()); err != nil {
		return fmt.Errorf("write zeroes %s: %w", f.path, err)
	}
	if n == 0 {
		return nil
	}
	if !keepAllocated {
		err := f.punch(off, n)
		if !errors.Is(err, ErrUnsupported) {
			return err
		}
	} else if !f.noZero.Load() {
		err := f.op("zero range", func() error {
			return unix.Fallocate(f.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		})
		if !errors.Is(err, ErrUnsupported) {
			return err
		}
		f.noZero.Store(true)
	}
	return writeZeros(f, off, n)
}

// Allocate reserves host space for a range (fallocate). Contents do not change.
func (f *File) Allocate(off, n int64) error {
	if !f.busy.enter() {
		return ErrClosed
	}
	defer f.busy.leave()
	if err := CheckRange(off, n, f.size.Load()); err != nil {
		return fmt.Errorf("allocate %s: %w", f.path, err)
	}
	if n == 0 {
		return nil
	}
	return f.op("allocate", func() error { return unix.Fallocate(f.fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
}

// Extents asks the file system for holes (SEEK_DATA, SEEK_HOLE). It returns at most 1024 at a time.
func (f *File) Extents(off, n int64) ([]Extent, error) {
	if !f.busy.enter() {
		return nil, ErrClosed
	}
	defer f.busy.leave()
	if err := CheckRange(off, n, f.size.Load()); err != nil {
		return nil, fmt.Errorf("extents %s: %w", f.path, err)
	}
	var out []Extent
	for end := off + n; off < end && len(out) < 1024; {
		data, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
		switch {
		case err == unix.ENXIO: // no data up to the end of the file
			data = end
		case err != nil:
			return nil, &os.PathError{Op: "seek data", Path: f.path, Err: err}
		}
		if data = min(data, end); data > off {
			out = append(out, Extent{Off: off, Len: data - off, Hole: true, Zero: true})
			off = data
			continue
		}
		hole, err := unix.Seek(f.fd, off, unix.SEEK_HOLE)
		if err == unix.ENXIO { // the range was punched in between
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "seek hole", Path: f.path, Err: err}
		}
		if hole = min(hole, end); hole > off {
			out = append(out, Extent{Off: off, Len: hole - off})
			off = hole
		}
	}
	return out, nil
}

// Resize truncates or extends the file; what is added is a hole.
func (f *File) Resize(sizeBytes int64) error {
	if !f.busy.enter() {
		return ErrClosed
	}
	defer f.busy.leave()
	f.resizeMu.Lock()
	defer f.resizeMu.Unlock()
	if err := f.op("truncate", func() error { return unix.Ftruncate(f.fd, sizeBytes) }); err != nil {
		return err
	}
	f.size.Store(sizeBytes)
	return nil
}

// HostBytes is what the file occupies on its file system.
func (f *File) HostBytes() (int64, error) {
	if !f.busy.enter() {
		return 0, ErrClosed
	}
	defer f.busy.leave()
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: f.path, Err: err}
	}
	return st.Blocks * 512, nil
}

// Close waits for requests in flight and drops the lock with the descriptor.
func (f *File) Close() error {
	if !f.busy.close() {
		return nil
	}
	f.direct.close()
	if err := unix.Close(f.fd); err != nil {
		return &os.PathError{Op: "close", Path: f.path, Err: err}
	}
	return nil
}

// op runs a system call until it is not interrupted, and names the file in its error.
func (f *File) op(name string, call func() error) error { return sysOp(name, f.path, call) }

func sysOp(name, path string, call func() error) error {
	for {
		err := call()
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: name, Path: path, Err: err}
		}
		return nil
	}
}

func preadFull(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pread(fd, p, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("the medium ends at byte %d, %d bytes are missing: %w", off, len(p), unix.EIO)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func pwriteFull(fd int, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pwrite(fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if n == 0 {
			return done, unix.EIO
		}
		done += n
	}
	return done, nil
}
