package lvm

import (
	"context"
	"fmt"
	"strconv"
)

// group is a volume group's size and the unit in which it is handed out, in bytes.
type group struct{ size, extent int64 }

func groupOf(ctx context.Context, name string) (g group, err error) {
	rows, err := report(ctx, "vgs", "vg_size,vg_extent_size", name)
	if err != nil {
		return g, err
	}
	if len(rows) != 1 {
		return g, fmt.Errorf("%w: no volume group %s", ErrNotFound, name)
	}
	for column, dst := range map[string]*int64{"vg_size": &g.size, "vg_extent_size": &g.extent} {
		if *dst, err = strconv.ParseInt(rows[0][column], 10, 64); err != nil || *dst <= 0 {
			return g, fmt.Errorf("vgs: %s is %q", column, rows[0][column])
		}
	}
	return g, nil
}

// Limits of the metadata of a thin pool, lvmthin(7): 2 MiB and 15.81 GiB.
const (
	minMetadata = 2 << 20
	maxMetadata = 16978542592
)

// share divides a volume group: whole extents, the metadata at least one and within its limits,
// the data no more than what metadata and the spare of the metadata leave.
func (g group) share(c Config) (metadata, data int64) {
	down := func(n int64) int64 { return n / g.extent * g.extent }
	metadata = down(min(g.size/100*int64(c.MetadataPercent), maxMetadata))
	if metadata < minMetadata {
		metadata = (minMetadata + g.extent - 1) / g.extent * g.extent
	}
	data = min(down(g.size/100*int64(c.DataPercent)), down(g.size-2*metadata))
	return metadata, max(data, 0)
}
