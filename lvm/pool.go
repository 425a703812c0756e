package lvm

import (
	"context"
	"fmt"
	"slices"
	"strconv"
)

// A Pool is an active thin pool that LVM manages.
type Pool struct {
	Config
	// Bytes and MetadataBytes are the sizes of data and metadata, FreeBytes what the volume
	// group has left for extension.
	Bytes, MetadataBytes, FreeBytes int64
	// ThinVolumes are LVM's own thin volumes in the pool. mica uses only pools without any.
	ThinVolumes int
	// Monitored says that dmeventd watches the pool and extends it.
	Monitored bool
}

// Open activates a thin pool and returns it. ErrNotFound if there is no thin pool of that name.
func Open(ctx context.Context, c Config) (*Pool, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	if there, err := exists(ctx, c.VolumeGroup); err != nil {
		return nil, err
	} else if !there {
		return nil, fmt.Errorf("%w: no volume group %s (is one of its devices missing: %v?)", ErrNotFound, c.VolumeGroup, c.Devices)
	}
	if _, err := run(ctx, "lvchange", "--activate", "y", c.FullName()); err != nil {
		return nil, err
	}
	p := &Pool{Config: c}
	return p, p.Refresh(ctx)
}

// Refresh asks LVM for the sizes again.
func (p *Pool) Refresh(ctx context.Context) error {
	rows, err := report(ctx, "lvs", "lv_size,lv_metadata_size,vg_free,thin_count,seg_monitor,segtype,chunk_size", p.FullName())
	if err != nil {
		return err
	}
	if len(rows) != 1 || rows[0]["segtype"] != "thin-pool" {
		return fmt.Errorf("%w: %s is no thin pool", ErrNotFound, p.FullName())
	}
	r := rows[0]
	for column, dst := range map[string]*int64{
		"lv_size": &p.Bytes, "lv_metadata_size": &p.MetadataBytes, "vg_free": &p.FreeBytes, "chunk_size": &p.BlockSize,
	} {
		if *dst, err = strconv.ParseInt(r[column], 10, 64); err != nil {
			return fmt.Errorf("lvs: %s: %w", column, err)
		}
	}
	if p.ThinVolumes, err = strconv.Atoi(r["thin_count"]); err != nil {
		return fmt.Errorf("lvs: thin_count: %w", err)
	}
	p.Monitored = r["seg_monitor"] == "monitored"
	return nil
}

// AddDevices takes further devices into the volume group and extends the pool over them: data and
// metadata grow by the configured percentages of what is new. LVM reloads the pool while it is in
// use; writers that wait for space go on. force takes devices that carry a signature.
func (p *Pool) AddDevices(ctx context.Context, file string, devices []string, force bool) error {
	next := p.Config
	next.Devices = append(slices.Clone(p.Devices), devices...)
	if err := next.Validate(); err != nil {
		return err
	}
	if err := checkDevices(ctx, devices, force); err != nil {
		return err
	}
	s, ok, err := load(file)
	if err != nil {
		return err
	}
	if !ok || !s.Done {
		return fmt.Errorf("%s: %w: its set-up is not complete", p.FullName(), ErrNotFound)
	}
	wipe := []string{"--yes"}
	if force {
		wipe = append(wipe, "--force", "--force")
	}
	if _, err := run(ctx, "pvcreate", append(wipe, devices...)...); err != nil {
		return err
	}
	if _, err := run(ctx, "vgextend", append([]string{"--yes", p.VolumeGroup}, devices...)...); err != nil {
		_, uerr := run(ctx, "pvremove", append([]string{"--yes"}, devices...)...)
		return joined(err, uerr)
	}
	s.Devices = next.Devices
	if err := s.save(file); err != nil {
		return err
	}
	p.Config = next
	return p.extendTo(ctx)
}

// extendTo makes metadata and data as large as their percentages of the volume group are now. What
// is that large already stays, so repeating an interrupted growth does no harm.
func (p *Pool) extendTo(ctx context.Context) error {
	g, err := groupOf(ctx, p.VolumeGroup)
	if err != nil {
		return err
	}
	metadata, data := g.share(p.Config)
	for _, v := range []struct {
		option    string
		now, want int64
	}{{"--poolmetadatasize", p.MetadataBytes, metadata}, {"--size", p.Bytes, data}} {
		if v.want <= v.now {
			continue
		}
		if _, err := run(ctx, "lvextend", "--yes", v.option, strconv.FormatInt(v.want, 10)+"b", p.FullName()); err != nil {
			return err
		}
	}
	return p.Refresh(ctx)
}

// Extend does what dmeventd does when a pool fills up: if more of data or metadata is used than
// the threshold, it grows by the step. Where the volume group has less than that left, the data
// takes all of it; where it has nothing, the error is ErrNoRoom. It reports whether the pool grew.
func (p *Pool) Extend(ctx context.Context) (bool, error) {
	before := p.Bytes + p.MetadataBytes
	if _, err := run(ctx, "lvextend", "--yes", "--use-policies", p.FullName()); err != nil {
		if rerr := p.Refresh(ctx); rerr != nil {
			return false, joined(err, rerr)
		}
		if p.FreeBytes == 0 {
			return false, fmt.Errorf("%s: %w: add a device with mica pool grow --device", p.FullName(), ErrNoRoom)
		}
		if _, lerr := run(ctx, "lvextend", "--yes", "--extents", "+100%FREE", p.FullName()); lerr != nil {
			return false, joined(err, lerr)
		}
	}
	if err := p.Refresh(ctx); err != nil {
		return false, err
	}
	return p.Bytes+p.MetadataBytes > before, nil
}

// ThinVolumes tells how many thin volumes LVM itself holds in the pool that device-mapper knows as
// dmName; managed is false if the pool is not LVM's.
func ThinVolumes(ctx context.Context, dmName string) (n int, managed bool, err error) {
	rows, err := report(ctx, "lvs", "vg_name,lv_name,segtype,thin_count", "--all", "--select", "segtype=thin-pool")
	if err != nil {
		return 0, false, err
	}
	for _, r := range rows {
		name := escape(r["vg_name"]) + "-" + escape(r["lv_name"])
		if name == dmName || name+"-tpool" == dmName {
			n, err = strconv.Atoi(r["thin_count"])
			return n, true, err
		}
	}
	return 0, false, nil
}
