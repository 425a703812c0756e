package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/engine"
)

// extendEvery is how often the pool's fill is looked at, beside the events that the pool sends.
const extendEvery = 10 * time.Second

// An extender grows the pool's data file when it fills up, and tells when the host's file system
// under it gets full: a sparse file can promise more than there is.
type extender struct {
	pool engine.Pool
	c    config.AutoExtend
	log  *slog.Logger
	// volume, if not nil, is the LVM volume under the pool, which grows by a policy of its own.
	volume *volumeExtender
	// host returns the size and the free space of the file system under the data file in
	// bytes; ok is false for block devices.
	host   func() (total, free int64, ok bool)
	tell   func(kind, object, detail string)
	warned bool // that the host, or the volume group, is full
}

// run looks at the pool when poked and from time to time, until ctx ends.
func (x *extender) run(ctx context.Context, poke <-chan struct{}) {
	t := time.NewTicker(extendEvery)
	defer t.Stop()
	for {
		if err := x.step(ctx); err != nil && ctx.Err() == nil {
			x.log.Error("auto-extension of the pool", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-poke:
		}
	}
}

// step grows the pool as far as it must and may.
func (x *extender) step(ctx context.Context) error {
	st, err := x.pool.Status(ctx)
	if err != nil || st.DataBlocks == 0 {
		return err
	}
	if x.volume != nil {
		return x.extendVolume(ctx, st)
	}
	x.watchHost()
	if !x.c.Enabled || st.DataUsed*100 < uint64(x.c.Threshold)*st.DataBlocks {
		return nil
	}
	size, reason := x.next(st)
	if size <= int64(st.DataBlocks)*st.BlockSize {
		x.log.Debug("pool is not extended", "reason", reason)
		return nil
	}
	if err := x.pool.GrowData(ctx, size); err != nil {
		return err
	}
	detail := fmt.Sprintf("data file from %d to %d bytes: %d of %d blocks were used", int64(st.DataBlocks)*st.BlockSize, size, st.DataUsed, st.DataBlocks)
	x.log.Info("pool extended", "detail", detail)
	x.tell(api.EventGrow, "pool", detail)
	return nil
}

// next is the size in bytes that the data file should get, or why it stays.
func (x *extender) next(st engine.Status) (size int64, reason string) {
	now := int64(st.DataBlocks) * st.BlockSize
	step := max(now/100*int64(x.c.Step)+now%100*int64(x.c.Step)/100, st.BlockSize)
	size = now + step
	if m := int64(x.c.Max); m > 0 && size > m {
		size, reason = m, "it has its largest size"
	}
	total, free, ok := x.host()
	if !ok {
		return now, "it is a block device"
	}
	// What is promised already but not written yet must fit too.
	unwritten := now - int64(st.DataUsed)*st.BlockSize
	room := free - total/100*int64(x.c.HostFree) - unwritten
	if size-now > room {
		size, reason = now+max(0, room), "the host's file system has no room"
	}
	return size / st.BlockSize * st.BlockSize, reason
}

// watchHost sends an event when the host's file system has less free space than it should keep,
// once until it has more again.
func (x *extender) watchHost() {
	total, free, ok := x.host()
	if !ok {
		return
	}
	low := free < total/100*int64(x.c.HostFree)
	if low && !x.warned {
		x.tell(api.EventHostSpace, "pool", fmt.Sprintf("the file system under the data file has %d of %d bytes free", free, total))
	}
	x.warned = low
}

// hostSpace asks the file system under a file.
func hostSpace(path string) (total, free int64, ok bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0, false
	}
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) != nil {
		return 0, 0, false
	}
	return int64(fs.Blocks) * fs.Bsize, int64(fs.Bavail) * fs.Bsize, true
}
