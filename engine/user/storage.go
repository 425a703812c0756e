package user

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/dev/signature"
	"mica/journal"
	"mica/thin"
)

// A Location names a pool: a directory with the files data and metadata, or two devices, each a
// block device or a file.
type Location struct {
	Dir            string
	Data, Metadata string // if Dir is empty
}

// DataPath and MetadataPath are the paths of the two devices.
func (l Location) DataPath() string {
	if l.Dir != "" {
		return filepath.Join(l.Dir, "data")
	}
	return l.Data
}

func (l Location) MetadataPath() string {
	if l.Dir != "" {
		return filepath.Join(l.Dir, "metadata")
	}
	return l.Metadata
}

func (l Location) String() string {
	if l.Dir != "" {
		return l.Dir
	}
	return l.Data + " with metadata " + l.Metadata
}

// pidPath is a file beside the lock that says who holds it, for those who cannot see the holder
// in /proc/locks. Only pools in directories have one.
func (l Location) pidPath() string {
	if l.Dir == "" {
		return ""
	}
	return filepath.Join(l.Dir, "pid")
}

const (
	defaultBlockSize = 64 << 10
	defaultDataBytes = 100 << 30
	// metadataPerBlock is what a data block costs on the metadata device by default, in bytes.
	metadataPerBlock = 48
	minMetadataBytes = 2 << 20
)

// FormatOptions say what pool to make. Zero values are defaults.
type FormatOptions struct {
	BlockSize int64 // bytes; 64 KiB
	// DataBytes and MetadataBytes are the lengths of files that are created: by default the
	// smaller of 100 GiB and 80 % of the host's free space, and 48 bytes a data block. Block
	// devices and existing files are used as long as they are.
	DataBytes     int64
	MetadataBytes int64
	// Force overwrites a pool, and devices with a file system, a partition table or another
	// signature on them.
	Force bool
}

// MetadataBytes is the default length of the metadata device of a pool of dataBytes.
func MetadataBytes(dataBytes, blockSize int64) int64 {
	n := (dataBytes/blockSize*metadataPerBlock + 1<<20 - 1) >> 20 << 20
	return min(max(n, minMetadataBytes), thin.MaxMetadataBytes)
}

// Format makes an empty pool. Files that are missing are created, the data file sparse, the
// metadata file with all its space allocated; on an error they are removed again. A pool that
// is there is refused (thin.ErrExists), and so are devices with a signature on them, unless
// forced; a device in use is always refused (dev.ErrLocked).
func Format(ctx context.Context, l Location, o FormatOptions) (err error) {
	if o.BlockSize == 0 {
		o.BlockSize = defaultBlockSize
	}
	if err := thin.CheckBlockSize(o.BlockSize); err != nil {
		return fmt.Errorf("format %s: %w", l, err)
	}
	if err := l.check(); err != nil {
		return err
	}
	f := formatter{l: l, o: o}
	defer func() {
		f.close()
		if err != nil {
			f.undo()
			err = fmt.Errorf("format %s: %w", l, err)
		}
	}()
	return f.run(ctx)
}

func (l Location) check() error {
	switch {
	case l.Dir != "" && (l.Data != "" || l.Metadata != ""):
		return fmt.Errorf("pool %s: a directory and devices are both given", l)
	case l.Dir == "" && (l.Data == "" || l.Metadata == ""):
		return errors.New("pool: a directory, or a data device and a metadata device")
	}
	if a, err := os.Stat(l.DataPath()); err == nil {
		if b, err := os.Stat(l.MetadataPath()); err == nil && os.SameFile(a, b) {
			return fmt.Errorf("pool %s: data and metadata are the same device", l)
		}
	}
	return nil
}

type formatter struct {
	l          Location
	o          FormatOptions
	data, meta dev.Device
	made       []string // files and directories to remove on an error
}

func (f *formatter) close() {
	for _, d := range []dev.Device{f.data, f.meta} {
		if d != nil {
			d.Close()
		}
	}
}

func (f *formatter) undo() {
	for i := len(f.made) - 1; i >= 0; i-- {
		os.Remove(f.made[i])
	}
}

func (f *formatter) run(ctx context.Context) (err error) {
	if f.l.Dir != "" {
		if _, err := os.Stat(f.l.Dir); errors.Is(err, os.ErrNotExist) {
			if err := os.Mkdir(f.l.Dir, 0o700); err != nil {
				return err
			}
			f.made = append(f.made, f.l.Dir)
		}
		if _, err := os.Stat(f.l.MetadataPath()); err == nil && !f.o.Force {
			return fmt.Errorf("%s: a pool %w", f.l.MetadataPath(), thin.ErrExists)
		}
		if _, err := os.Stat(f.l.DataPath()); err == nil && !f.o.Force {
			return fmt.Errorf("%s is there without metadata: %w", f.l.DataPath(), thin.ErrExists)
		}
	}
	if f.data, err = f.openOrCreate(ctx, f.l.DataPath(), f.dataBytes); err != nil {
		return err
	}
	dataBytes := f.data.Size() / f.o.BlockSize * f.o.BlockSize
	if dataBytes == 0 {
		return fmt.Errorf("data device of %d bytes: less than one block of %d bytes", f.data.Size(), f.o.BlockSize)
	}
	metaBytes := func() (int64, error) {
		if f.o.MetadataBytes > 0 {
			return f.o.MetadataBytes, nil
		}
		return MetadataBytes(dataBytes, f.o.BlockSize), nil
	}
	if f.meta, err = f.openOrCreate(ctx, f.l.MetadataPath(), metaBytes); err != nil {
		return err
	}
	if slices.Contains(f.made, f.l.MetadataPath()) {
		if err := allocateNew(f.meta, 0, f.meta.Size()); err != nil {
			return err
		}
	} else if a, ok := f.meta.(dev.Allocator); ok {
		if err := a.Allocate(0, f.meta.Size()); err != nil && !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
	}
	if err := f.data.Flush(); err != nil {
		return err
	}
	if err := RefuseExported(f.l); err != nil {
		return err
	}
	// A journal of what was there before is worth nothing from here on, and must not meet a pool
	// that looks like that one. One that is refused keeps its own.
	if f.o.Force || f.empty() {
		if err := DiscardJournal(f.l); err != nil {
			return err
		}
	}
	err = thin.Format(f.meta, thin.FormatOptions{DataBlockSize: f.o.BlockSize, DataBlocks: uint64(dataBytes / f.o.BlockSize), Force: f.o.Force})
	if err != nil {
		return err
	}
	if f.l.Dir != "" {
		if err := dev.SyncDir(f.l.Dir); err != nil {
			return err
		}
		return dev.SyncDir(filepath.Dir(filepath.Clean(f.l.Dir)))
	}
	return nil
}

// empty reports whether there is nothing on the metadata device, as thin.Format wants it.
func (f *formatter) empty() bool {
	b := make([]byte, 4096)
	_, err := f.meta.ReadAt(b, 0)
	return err == nil && bytes.Count(b, []byte{0}) == len(b)
}

// dataBytes is the length of a new data file.
func (f *formatter) dataBytes() (int64, error) {
	if f.o.DataBytes > 0 {
		return f.o.DataBytes, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(f.l.DataPath()), &st); err != nil {
		return 0, err
	}
	n := min(defaultDataBytes, int64(st.Bavail)*st.Bsize/10*8)
	return n / f.o.BlockSize * f.o.BlockSize, nil
}

// openOrCreate opens a device under its lock, or makes a new file.
func (f *formatter) openOrCreate(ctx context.Context, path string, size func() (int64, error)) (dev.Device, error) {
	d, err := dev.Open(path, dev.OpenOptions{Lock: true})
	if err == nil {
		if !f.o.Force {
			if err := signature.Check(ctx, path); err != nil {
				d.Close()
				return nil, err
			}
		}
		return d, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	n, err := size()
	if err != nil {
		return nil, err
	}
	c, err := dev.CreateFile(path, n, dev.OpenOptions{Lock: true})
	if err != nil {
		return nil, err
	}
	f.made = append(f.made, path)
	return c, nil
}

// Open opens a pool under its locks, which are on the descriptors that do the I/O. It waits for
// a predecessor that is about to die; who is refused in the end gets dev.ErrLocked, and the
// error names the holder.
func Open(ctx context.Context, l Location, o Options) (*Pool, error) {
	p, err := open(ctx, l, o)
	if err != nil {
		return nil, fmt.Errorf("open pool %s: %w", l, err)
	}
	return p, nil
}

func open(ctx context.Context, l Location, o Options) (*Pool, error) {
	o.setDefaults()
	if err := l.check(); err != nil {
		return nil, err
	}
	do := dev.OpenOptions{ReadOnly: o.ReadOnly, Lock: true}
	// Metadata first: two openers meet at the same lock.
	meta, err := openLocked(ctx, l, l.MetadataPath(), do, o.LockWait)
	if err != nil {
		return nil, err
	}
	data, err := openLocked(ctx, l, l.DataPath(), do, o.LockWait)
	if err != nil {
		meta.Close()
		return nil, err
	}
	id, err := journal.Identify(l.MetadataPath())
	if err != nil {
		meta.Close()
		data.Close()
		return nil, err
	}
	if err := mayWriteTo(id, o); err != nil {
		meta.Close()
		data.Close()
		return nil, err
	}
	p, err := openOn(meta, data, o, &id)
	if err != nil {
		return nil, err
	}
	p.noteExports(id)
	if pid := l.pidPath(); pid != "" && !o.ReadOnly {
		if err := os.WriteFile(pid, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
			o.Logger.Warn("could not note the pid beside the pool", "err", err)
		}
		p.onDone = func() { os.Remove(pid) }
	}
	return p, nil
}

// lockRetry is the pause between attempts at a lock: neither flock nor O_EXCL can wait for a
// limited time.
const lockRetry = 50 * time.Millisecond

func openLocked(ctx context.Context, l Location, path string, o dev.OpenOptions, wait time.Duration) (dev.Device, error) {
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	tick := time.NewTicker(lockRetry)
	defer tick.Stop()
	for {
		d, err := dev.Open(path, o)
		if !errors.Is(err, dev.ErrLocked) {
			return d, err
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-deadline.C:
		}
		var le *dev.LockedError
		if errors.As(err, &le) && le.PID == 0 && le.By == "" {
			if b, rerr := os.ReadFile(l.pidPath()); rerr == nil {
				le.PID, _ = strconv.Atoi(strings.TrimSpace(string(b)))
			}
		}
		return nil, fmt.Errorf("waited %v: %w", wait, err)
	}
}
