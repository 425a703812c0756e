package fuse

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"

	"mica/export/helper"
	"mica/export/loop"
)

// Calls are what can wait for a device that the exporter serves, for a helper process (see package
// helper): opening the file of a mount, changing a loop device. Errors goes with them.
var Calls = helper.Calls{
	"loop.attach": helper.Call(loop.Attach),
	"loop.resize": helper.Call(func(_ context.Context, a resizeArgs) (struct{}, error) { return struct{}{}, resizeLoop(a) }),
	"loop.detach": helper.Call(func(ctx context.Context, a detachArgs) (struct{}, error) { return struct{}{}, detachLoop(ctx, a) }),
}

// Errors are the conditions that Calls return.
var Errors = helper.Errors{"busy": loop.ErrBusy, "not_bound": loop.ErrNotBound, "not_synced": loop.ErrNotSynced}

// callTag names the thread that makes an attach, so that clean can see whether it still does.
func callTag(backing string) string {
	h := fnv.New32a()
	io.WriteString(h, backing)
	return fmt.Sprintf("mica-%08x", h.Sum32())
}
