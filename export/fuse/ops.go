package fuse

import (
	"context"
	"fmt"
	"os"
	"time"

	"mica/export/loop"
)

// ops are the calls that can wait for a device that this process serves: opening the file of a
// mount, changing a loop device. If a thread of the serving process made them and the
// process were killed at the wrong moment, that thread would wait for an answer that nobody can
// give, and would keep the process's descriptors and locks. So they are made by a helper process
// (helperOps); localOps make them here, for programs that serve for a short time.
type ops interface {
	attach(ctx context.Context, c loop.Config) (loop.Device, error)
	resize(ctx context.Context, a resizeArgs) error
	detach(ctx context.Context, a detachArgs) error
	// pid is the process that makes the calls, 0 if it is this one.
	pid() int
	close() error
}

type resizeArgs struct {
	Node    string `json:"node"`
	Backing string `json:"backing"`
}

type detachArgs struct {
	Device  loop.Device   `json:"device"`
	Backing string        `json:"backing"`
	Link    string        `json:"link,omitempty"` // removed before the minor is released
	Wait    time.Duration `json:"wait"`           // for openers that are not mounts
}

type localOps struct{}

func (localOps) close() error { return nil }

func (localOps) pid() int { return 0 }

func (localOps) attach(ctx context.Context, c loop.Config) (loop.Device, error) {
	return loop.Attach(ctx, c)
}

func (localOps) resize(_ context.Context, a resizeArgs) error {
	// Kernels before 6.16 take the size that they know; this makes them ask for it.
	if _, err := os.Stat(a.Backing); err != nil {
		return err
	}
	return loop.Resize(a.Node)
}

func (localOps) detach(ctx context.Context, a detachArgs) error {
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
