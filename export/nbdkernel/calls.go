package nbdkernel

import (
	"context"
	"fmt"
	"time"

	"mica/export/helper"
	"mica/export/node"
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
	number, err := node.Number(sysfs(a.Index))
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
