package kernel

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"mica/internal/dmioctl"
	"mica/thin"
)

// maxDiscardRuns bounds how many runs of blocks are remembered of a device that is to be deleted.
// What lies behind them is left to a trim.
const maxDiscardRuns = 1 << 16

// A blockRun is Len virtual blocks from Begin on.
type blockRun struct {
	Begin thin.VBlock
	Len   uint64
}

// discardOwn gives the blocks back to the host that only a device which is about to be deleted can
// have: those that it provisioned since it was made. The kernel passes discards down, where nobody
// else has the block, but not deletes. A device that shares all that it has costs one look.
//
// It is a favour to the host: errors are logged, and the delete goes on. Interrupted, the device is
// still there, with fewer mappings.
func (p *Pool) discardOwn(ctx context.Context, id thin.DevID) error {
	st, err := p.poolStatus(true)
	if err != nil || st.Failed || st.Mode == "ro" || st.Discard != "discard_passdown" {
		return nil
	}
	runs, err := p.ownRuns(ctx, id)
	if errors.Is(err, thin.ErrNotFound) {
		return nil // the delete says so
	}
	if err == nil && len(runs) > 0 {
		err = p.discardRuns(ctx, id, runs)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted, it has lost some of its blocks: %w", ctx.Err())
	}
	if err != nil {
		p.log.Warn("give the blocks of a deleted device back to the host", "device", id, "error", err)
	}
	return nil
}

// ownRuns lists the runs of mappings that are as young as the device.
func (p *Pool) ownRuns(ctx context.Context, id thin.DevID) (runs []blockRun, err error) {
	err = p.look(ctx, func(v *thin.View) error {
		runs = runs[:0]
		info, err := v.Device(id)
		if err != nil {
			return err
		}
		return v.Walk(id, 0, func(e thin.Entry) bool {
			if e.Time < info.CreationTime {
				return true
			}
			if l := len(runs); l > 0 && runs[l-1].Begin+thin.VBlock(runs[l-1].Len) == e.VBlock {
				runs[l-1].Len++
				return true
			}
			if len(runs) == maxDiscardRuns {
				return false
			}
			runs = append(runs, blockRun{e.VBlock, 1})
			return ctx.Err() == nil
		})
	})
	return runs, errors.Join(err, ctx.Err())
}

// discardStepBytes bounds one discard, so that others get their turn, and an interruption is heard.
const discardStepBytes = 1 << 30

// discardRuns discards through a node of its own. The caller holds the device's name.
func (p *Pool) discardRuns(ctx context.Context, id thin.DevID, runs []blockRun) (err error) {
	last := runs[len(runs)-1]
	blocks := uint64(last.Begin) + last.Len
	name := thinName(p.id, id)
	info, err := p.activateThin(name, false, dmioctl.ThinTarget(p.num, uint32(id), blocks*uint64(p.bs/sectorSize), ""))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removePatiently(context.WithoutCancel(ctx), p.dm, name)) }()
	if err := ensureNode(info.Node(), info.Dev); err != nil {
		return err
	}
	d, err := openDirect(info.Node(), false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	for _, r := range runs {
		for step := uint64(max(1, discardStepBytes/p.bs)); r.Len > 0; {
			n := min(step, r.Len)
			if err := d.discard(int64(r.Begin)*p.bs, int64(n)*p.bs); err != nil {
				if errors.Is(err, unix.EOPNOTSUPP) {
					return nil // the pool ignores them
				}
				return err
			}
			r.Begin, r.Len = r.Begin+thin.VBlock(n), r.Len-n
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return nil
}
