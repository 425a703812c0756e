//go:build cgo && !no_btrfs

package store

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/plugins/snapshots/btrfs"
)

// Btrfs keeps snapshots as subvolumes of a btrfs in a file.
var Btrfs = Maker{"btrfs", func(ctx context.Context, dir string, size int64) (*Store, error) {
	mountpoint, undo, err := btrfsMount(ctx, dir, size)
	if err != nil {
		return nil, err
	}
	sn, err := btrfs.NewSnapshotter(mountpoint)
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	s := &Store{Name: "btrfs", Snapshotter: sn}
	s.used = func(context.Context) (int64, error) { return statfsUsed(mountpoint) }
	s.onClose(undo)
	return s, nil
}}
