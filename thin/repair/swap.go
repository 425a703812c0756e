package repair

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/pdata/block"
)

// Swap puts the metadata in the file repaired in place of those at path, which stay as the file
// keep. The caller holds the locks of both, has checked the new ones, and opens nothing by path
// before Swap returns.
//
// If path is a file, keep becomes its second name and repaired takes the first: both must lie in
// one file system, and after a crash path is either the old file or the new one. If it is a block
// device, keep is written as a copy of it, and then the device, its superblock last: after a crash
// in between it holds no pool, and Swap is to be called again with another keep.
//
// Durable when it returns.
func Swap(path, repaired, keep string) error {
	if _, err := os.Lstat(keep); err == nil {
		return fmt.Errorf("keep the old metadata as %s: %w", keep, os.ErrExist)
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return overwrite(path, repaired, keep)
	}
	if err := os.Link(path, keep); err != nil {
		return fmt.Errorf("keep the old metadata: %w", err)
	}
	if err := dev.SyncDir(filepath.Dir(keep)); err != nil {
		return err
	}
	if err := unix.Rename(repaired, path); err != nil {
		os.Remove(keep)
		return &os.LinkError{Op: "rename", Old: repaired, New: path, Err: err}
	}
	return dev.SyncDir(filepath.Dir(path))
}

// overwrite saves a device to a file and writes another one's contents over it.
func overwrite(path, repaired, keep string) error {
	to, err := dev.Open(path, dev.OpenOptions{})
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := dev.Open(repaired, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer from.Close()
	if from.Size() > to.Size() {
		return fmt.Errorf("%s of %d bytes does not fit %s of %d bytes", repaired, from.Size(), path, to.Size())
	}
	if err := save(to, keep); err != nil {
		os.Remove(keep)
		return fmt.Errorf("keep the old metadata as %s: %w", keep, err)
	}
	return replaceContent(to, from)
}

func save(d dev.Device, keep string) (err error) {
	f, err := dev.CreateFile(keep, d.Size(), dev.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := copyRange(f, d, 0, d.Size()); err != nil {
		return err
	}
	if err := f.Flush(); err != nil {
		return err
	}
	return dev.SyncDir(filepath.Dir(keep))
}

// replaceContent writes one device over another: first block 0 is zeroed, last it is written.
func replaceContent(to, from dev.Device) error {
	if _, err := to.WriteAt(make([]byte, block.Size), 0); err != nil {
		return err
	}
	if err := to.Flush(); err != nil {
		return err
	}
	if err := copyRange(to, from, block.Size, from.Size()); err != nil {
		return err
	}
	if err := to.Flush(); err != nil {
		return err
	}
	if err := copyRange(to, from, 0, block.Size); err != nil {
		return err
	}
	return to.Flush()
}

func copyRange(to, from dev.Device, begin, end int64) error {
	buf := make([]byte, 1<<20)
	for off := begin; off < end; {
		b := buf[:min(int64(len(buf)), end-off)]
		if _, err := from.ReadAt(b, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(b), off, err)
		}
		if _, err := to.WriteAt(b, off); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", len(b), off, err)
		}
		off += int64(len(b))
	}
	return nil
}
