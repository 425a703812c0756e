package fuse

import (
	"context"
	"fmt"
	"os"
	"time"

	"mica/export/loop"
)

type resizeArgs struct {
	Node    string `json:"node"`
	Backing string `json:"backing"`
}

func resizeLoop(a resizeArgs) error {
	// Kernels before 6.16 take the size that they know; this makes them ask for it.
	if _, err := os.Stat(a.Backing); err != nil {
		return err
	}
	return loop.Resize(a.Node)
}

type detachArgs struct {
	Device  loop.Device   `json:"device"`
	Backing string        `json:"backing"`
	Link    string        `json:"link,omitempty"` // removed before the minor is released
	Wait    time.Duration `json:"wait"`           // for openers that are not mounts
}

func detachLoop(ctx context.Context, a detachArgs) error {
	o := loop.DetachOptions{Backing: a.Backing, Wait: a.Wait}
	if a.Link != "" {
		target, err := os.Readlink(a.Link)
		if err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("link: %w", err)
		}
		if err == nil {
			o.Release = func() error { return os.Remove(a.Link) }
			o.Restore = func() { os.Symlink(target, a.Link) }
		}
	}
	return loop.Detach(ctx, a.Device, o)
}
