package nbdkernel

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"mica/export/helper"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// Calls are what can wait for the server of a device, for a helper process (see package helper).
// Errors goes with them.
var Calls = helper.Calls{
	"nbd.disconnect": helper.Call(func(ctx context.Context, a disconnectArgs) (struct{}, error) {
		return struct{}{}, disconnectUnused(ctx, a)
	}),
	"nbd.drop": helper.Call(func(_ context.Context, a dropArgs) (struct{}, error) {
		return struct{}{}, drop(a)
	}),
}

// Errors are the conditions that Calls return.
var Errors = helper.Errors{"busy": node.ErrBusy, "gone": node.ErrGone, "not_synced": node.ErrNotSynced}

type disconnectArgs struct {
	Index   int           `json:"index"`
	Backend string        `json:"backend"`
	Link    string        `json:"link,omitempty"`
	Wait    time.Duration `json:"wait"`
}

type dropArgs struct {
	Index   int    `json:"index"`
	Backend string `json:"backend"`
}

// disconnectUnused disconnects a device that nobody uses.
func disconnectUnused(ctx context.Context, a disconnectArgs) error {
	if backendOf(a.Index) != a.Backend {
		return fmt.Errorf("%s: %w", nodeOf(a.Index), node.ErrGone)
	}
	number, err := deviceNumber(a.Index)
	if err != nil {
		return fmt.Errorf("%s: %w", nodeOf(a.Index), node.ErrGone)
	}
	return node.Release{Path: nodeOf(a.Index), Dev: number, Link: a.Link, Wait: a.Wait, Take: func() error {
		if backendOf(a.Index) != a.Backend {
			return fmt.Errorf("%s: %w", nodeOf(a.Index), node.ErrGone)
		}
		return with(func(k *control) error { return k.disconnect(a.Index) })
	}}.Do(ctx)
}

// drop disconnects a device, whoever uses it. What waits for it fails.
func drop(a dropArgs) error {
	if backendOf(a.Index) != a.Backend {
		return nil
	}
	return with(func(k *control) error { return k.disconnect(a.Index) })
}

// ensureNode makes the device file if it is missing. On a host devtmpfs has made it.
func ensureNode(index int) error {
	want, err := deviceNumber(index)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	path := nodeOf(index)
	err = unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == want:
		return nil
	case err == nil:
		return fmt.Errorf("%s is not device %d:%d", path, unix.Major(want), unix.Minor(want))
	case err != unix.ENOENT:
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(want)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s is missing and cannot be made: %w", path, err)
	}
	return nil
}

// deviceNumber reads a device's number from sysfs.
func deviceNumber(index int) (uint64, error) {
	b, err := os.ReadFile(sysfs(index) + "/dev")
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(b)), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s/dev says %q: want MAJOR:MINOR", sysfs(index), b)
	}
	return unix.Mkdev(major, minor), nil
}
