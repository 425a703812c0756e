package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/engine"
	"mica/lvm"
)

// lvmFile remembers in ROOT from what the thin pool was made.
const lvmFile = "lvm.json"

// openVolume makes or activates the thin pool that the configuration wants from LVM, and puts its
// name where that of a thin pool is configured; nil if it wants none.
func openVolume(ctx context.Context, c *config.Config, log *slog.Logger) (*lvm.Pool, error) {
	if len(c.LVM.Devices) == 0 {
		return nil, nil
	}
	p, err := CreateVolume(ctx, *c)
	if err != nil {
		return nil, err
	}
	log.Info("thin pool on LVM", "pool", p.FullName(), "bytes", p.Bytes, "metadata", p.MetadataBytes, "devices", p.Devices, "dmeventd", p.Monitored)
	c.Pool.ThinPool = p.DMName()
	return p, nil
}

// refuseThinVolumes refuses a thin pool in which LVM holds volumes of its own, also ones that are
// not active. Where LVM's tools are missing, LVM does not manage it.
func refuseThinVolumes(ctx context.Context, pool string) error {
	if lvm.Available() != nil {
		return nil
	}
	n, managed, err := lvm.ThinVolumes(ctx, filepath.Base(pool))
	if err != nil {
		return fmt.Errorf("ask LVM about thin pool %s: %w", pool, err)
	}
	if managed && n > 0 {
		return fmt.Errorf("thin pool %s: LVM holds %d thin volumes in it: make a thin pool of its own for mica", pool, n)
	}
	return nil
}

// CreateVolume makes the thin pool that a configuration wants from LVM, or activates it if it is
// there already. It is what a daemon does with that configuration when it starts.
func CreateVolume(ctx context.Context, c config.Config) (*lvm.Pool, error) {
	p, err := lvm.Ensure(ctx, filepath.Join(c.Root, lvmFile), c.LVM.Config(c.Pool.BlockSize))
	if err != nil {
		return nil, fmt.Errorf("thin pool on LVM: %w", err)
	}
	return p, nil
}

// addDevices is what the server grows the pool with, or nil.
func (d *daemon) addDevices() func(context.Context, []string, bool) error {
	if d.volume == nil {
		return nil
	}
	return func(ctx context.Context, devices []string, force bool) error {
		if err := d.volume.AddDevices(ctx, filepath.Join(d.c.Root, lvmFile), devices, force); err != nil {
			return api.Errorf(api.CodeInvalid, "add %v to %s: %v", devices, d.volume.FullName(), err)
		}
		return nil
	}
}

// A volumeExtender grows a volume by a policy of its own when more than threshold percent of data
// or metadata are used, and reports whether it did.
type volumeExtender struct {
	threshold uint64
	extend    func(ctx context.Context) (bool, error)
}

// volumeExtender is that of the volume under the pool, if its policy is ever to extend.
func (d *daemon) volumeExtender() *volumeExtender {
	if d.volume == nil || d.volume.ExtendThreshold >= 100 {
		return nil
	}
	return &volumeExtender{uint64(d.volume.ExtendThreshold), d.volume.Extend}
}

// extendVolume has LVM extend the pool if data or metadata are used past the threshold. dmeventd
// may do the same at the same time: LVM's own lock keeps them apart, and one of them finds nothing
// to do.
func (x *extender) extendVolume(ctx context.Context, st engine.Status) error {
	past := func(used, all uint64) bool { return used*100 >= x.volume.threshold*all }
	if !past(st.DataUsed, st.DataBlocks) && !past(st.MetaUsed, st.MetaBlocks) {
		return nil
	}
	grew, err := x.volume.extend(ctx)
	if errors.Is(err, lvm.ErrNoRoom) {
		if !x.warned {
			x.tell(api.EventHostSpace, "pool", err.Error())
		}
		x.warned = true
		return nil
	}
	if err != nil {
		return err
	}
	x.warned = false
	if grew {
		detail := fmt.Sprintf("thin pool on LVM extended: %d of %d blocks were used", st.DataUsed, st.DataBlocks)
		x.log.Info("pool extended", "detail", detail)
		x.tell(api.EventGrow, "pool", detail)
	}
	return nil
}
