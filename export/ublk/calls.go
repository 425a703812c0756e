package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mica/export/helper"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// Calls are the driver's commands that can wait for the server of a device, for a helper process
// (see package helper). Errors goes with them.
var Calls = helper.Calls{
	"ublk.start": helper.Call(func(_ context.Context, a startArgs) (struct{}, error) {
		return struct{}{}, startDev(a.ID, a.PID)
	}),
	"ublk.stop": helper.Call(func(ctx context.Context, a stopArgs) (struct{}, error) {
		return struct{}{}, stopUnused(ctx, a)
	}),
	"ublk.delete": helper.Call(func(_ context.Context, a deleteArgs) (struct{}, error) {
		return struct{}{}, remove(a.ID, a.Cookie)
	}),
}

// Errors are the conditions that Calls return.
var Errors = helper.Errors{"busy": node.ErrBusy, "gone": node.ErrGone, "not_synced": node.ErrNotSynced}

type startArgs struct {
	ID  int `json:"id"`
	PID int `json:"pid"` // of the server
}

type stopArgs struct {
	ID     int           `json:"id"`
	Cookie uint64        `json:"cookie"`
	Link   string        `json:"link,omitempty"`
	Wait   time.Duration `json:"wait"`
}

type deleteArgs struct {
	ID     int    `json:"id"`
	Cookie uint64 `json:"cookie"`
}

// isOurs checks that a device is the one that the caller means.
func isOurs(id int, cookie uint64) error {
	i, err := getInfo(id)
	if errors.Is(err, unix.ENODEV) || err == nil && i.cookie != cookie {
		return fmt.Errorf("ublk device %d: %w", id, node.ErrGone)
	}
	return err
}

// stopUnused ends the block device of a ublk device that nobody uses.
func stopUnused(ctx context.Context, a stopArgs) error {
	if err := isOurs(a.ID, a.Cookie); err != nil {
		return err
	}
	number, err := node.Number(sysfsBlock(a.ID))
	if err != nil {
		return fmt.Errorf("%s: %w", nodeOf(a.ID), node.ErrGone) // it was stopped, and not yet deleted
	}
	return node.Release{Path: nodeOf(a.ID), Dev: number, Link: a.Link, Wait: a.Wait, Take: func() error {
		return stopDev(a.ID)
	}}.Do(ctx)
}

// remove stops a device, whoever uses it, and takes it away as soon as nobody has it open. What
// waits for it fails.
func remove(id int, cookie uint64) error {
	if err := isOurs(id, cookie); err != nil {
		if errors.Is(err, node.ErrGone) {
			return nil
		}
		return err
	}
	if err := stopDev(id); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	err := delDevAsync(id)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) { // before Linux 6.9
		err = delDev(id)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
