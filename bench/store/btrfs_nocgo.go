//go:build !cgo || no_btrfs

package store

import (
	"context"
	"fmt"
)

// Btrfs needs cgo: containerd's snapshotter for it includes kernel headers.
var Btrfs = Maker{"btrfs", func(context.Context, string, int64) (*Store, error) {
	return nil, fmt.Errorf("built without cgo: %w", ErrUnavailable)
}}
