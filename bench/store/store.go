// Package store sets up containerd snapshotters on a directory: those that come with containerd,
// from its own library, and mica's, over its socket.
package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/blockfile"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	overlay "github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"golang.org/x/sys/unix"

	"mica/export/loop"
)

// A Store is a snapshotter with its own place on the medium.
type Store struct {
	Name string
	snapshots.Snapshotter
	// Copies: a snapshot is a copy of its parent, as long as the parent is.
	Copies bool
	used   func(ctx context.Context) (int64, error)
	undo   []func() error // last first
	daemon *Daemon        // of mica's
}

// Daemon is mica's daemon behind the snapshotter; nil for others.
func (s *Store) Daemon() *Daemon { return s.daemon }

// Used is what all snapshots of the store occupy on its medium, in bytes, after a sync.
func (s *Store) Used(ctx context.Context) (int64, error) { return s.used(ctx) }

// Close takes the store away; its snapshots are unmounted.
func (s *Store) Close() error {
	var errs []error
	if s.Snapshotter != nil {
		errs = append(errs, s.Snapshotter.Close())
	}
	for i := len(s.undo) - 1; i >= 0; i-- {
		errs = append(errs, s.undo[i]())
	}
	return errors.Join(errs...)
}

func (s *Store) onClose(f func() error) { s.undo = append(s.undo, f) }

// A Maker makes one kind of store in a directory that it makes. Size is room for what is stored,
// for those that must know.
type Maker struct {
	Name string
	Make func(ctx context.Context, dir string, size int64) (*Store, error)
}

// ErrUnavailable: the store cannot be had on this machine, or in this build.
var ErrUnavailable = errors.New("not available here")

// Overlayfs keeps snapshots as directories of a host file system.
var Overlayfs = Maker{"overlayfs", func(_ context.Context, dir string, _ int64) (*Store, error) {
	sn, err := overlay.NewSnapshotter(dir)
	return onDirectory("overlayfs", dir, sn, err)
}}

// Native copies directories.
var Native = Maker{"native", func(_ context.Context, dir string, _ int64) (*Store, error) {
	sn, err := native.NewSnapshotter(dir)
	s, err := onDirectory("native", dir, sn, err)
	if s != nil {
		s.Copies = true
	}
	return s, err
}}

// Blockfile copies files with an ext4 in each.
var Blockfile = Maker{"blockfile", func(ctx context.Context, dir string, size int64) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	scratch := filepath.Join(dir, "empty")
	if err := image(scratch, size); err != nil {
		return nil, err
	}
	if err := run(ctx, "mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", scratch); err != nil {
		return nil, err
	}
	sn, err := blockfile.NewSnapshotter(dir, blockfile.WithScratchFile(scratch), blockfile.WithFSType("ext4"))
	s, err := onDirectory("blockfile", dir, sn, err)
	if s != nil {
		s.Copies = true
	}
	return s, err
}}

func onDirectory(name, dir string, sn snapshots.Snapshotter, err error) (*Store, error) {
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s := &Store{Name: name, Snapshotter: sn}
	s.used = func(context.Context) (int64, error) { return diskUsage(filepath.Join(dir, "snapshots")) }
	return s, nil
}

// diskUsage is what the files below a directory occupy.
func diskUsage(dir string) (total int64, err error) {
	unix.Sync()
	err = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		total += st.Blocks * 512
		return nil
	})
	return total, err
}

func image(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// btrfsMount makes a btrfs in a file below dir and mounts it.
func btrfsMount(ctx context.Context, dir string, size int64) (mountpoint string, undo func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, err
	}
	file := filepath.Join(dir, "image")
	if err := image(file, max(size, 512<<20)); err != nil {
		return "", nil, err
	}
	if err := run(ctx, "mkfs.btrfs", "-q", file); err != nil {
		return "", nil, err
	}
	d, err := loop.Attach(ctx, loop.Config{Backing: file})
	if err != nil {
		return "", nil, err
	}
	detach := func() error { return loop.Detach(context.Background(), d, loop.DetachOptions{Backing: file}) }
	mountpoint = filepath.Join(dir, "mnt")
	if err = os.Mkdir(mountpoint, 0o700); err == nil {
		err = unix.Mount(d.Node, mountpoint, "btrfs", 0, "")
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("mount btrfs: %w", err), detach())
	}
	return mountpoint, func() error { return errors.Join(unix.Unmount(mountpoint, 0), detach()) }, nil
}

// statfsUsed is what a mounted file system has in use.
func statfsUsed(mountpoint string) (int64, error) {
	fd, err := unix.Open(mountpoint, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return 0, err
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}
