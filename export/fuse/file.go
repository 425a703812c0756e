package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/export"
)

// A File is a device that is served as one file under FUSE, without a loop device and without a
// holder: it lives as long as its process.
type File struct {
	path  string
	made  bool   // the file that the mount covers is ours
	bound bool   // the mount is on it
	dir   string // of a mount that only a setup has; "" after that
	fd    int
	s     *server
}

// readyWait bounds the wait for the kernel's first request.
const readyWait = 10 * time.Second

// ServeFile makes path the contents of d, until Close. path is covered by a mount: it must be
// an empty regular file, or not exist, and is then made. The device is not closed.
func ServeFile(path string, d dev.Device, readOnly bool) (_ *File, err error) {
	f := &File{fd: -1}
	if f.path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.undo()
			err = fmt.Errorf("serve %s: %w", path, err)
		}
	}()
	switch i, serr := os.Lstat(f.path); {
	case errors.Is(serr, os.ErrNotExist):
		if err := os.WriteFile(f.path, nil, 0o600); err != nil {
			return nil, err
		}
		f.made = true
	case serr != nil:
		return nil, serr
	case !i.Mode().IsRegular() || i.Size() > 0:
		return nil, fmt.Errorf("it is there and is not an empty file")
	}
	if f.dir, err = os.MkdirTemp("", "mica-fuse-"); err != nil {
		return nil, err
	}
	o := Options{RunDir: f.dir}
	if err := o.check(); err != nil {
		return nil, err
	}
	if f.fd, err = mountFuse(f.dir, "mica", readOnly); err != nil {
		return nil, err
	}
	if f.s, err = newServer(f.fd, d, readOnly, &o); err != nil {
		return nil, err
	}
	f.s.start()
	select {
	case <-f.s.ready:
	case <-f.s.gone:
		return nil, fmt.Errorf("the kernel ended the connection")
	case <-time.After(readyWait):
		return nil, fmt.Errorf("the kernel did not begin within %v", readyWait)
	}
	if err := unix.Mount(filepath.Join(f.dir, diskName), f.path, "", unix.MS_BIND, ""); err != nil {
		return nil, err
	}
	f.bound = true
	// The file is all that is needed, and all that is left if this process is killed.
	if err := unmount(f.dir); err != nil {
		return nil, err
	}
	f.dir = ""
	return f, nil
}

// undo takes down whatever ServeFile has put up.
func (f *File) undo() error {
	var err error
	if f.bound {
		err = unix.Unmount(f.path, unix.UMOUNT_NOFOLLOW)
	}
	if f.dir != "" {
		if f.fd >= 0 {
			err = errors.Join(err, unmount(f.dir))
		} else {
			os.Remove(f.dir)
		}
	}
	if f.s != nil {
		f.s.stop()
		f.s.close()
		f.s.crew.close()
	}
	if f.fd >= 0 {
		err = errors.Join(err, unix.Close(f.fd))
	}
	if f.made {
		err = errors.Join(err, os.Remove(f.path))
	}
	return err
}

// Close takes the file away; it waits until nobody has it open, at most until ctx ends
// (export.ErrBusy, and the file is still there). The device is flushed by the caller.
func (f *File) Close(ctx context.Context) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Unmount(f.path, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			f.bound = false
			return f.undo()
		}
		if err != unix.EBUSY {
			return fmt.Errorf("unmount %s: %w", f.path, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s is open: %w", f.path, export.ErrBusy)
		}
	}
}
