package thin

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
)

// An RmapRange is a run of data blocks and where a device maps them: data block Begin+i is
// virtual block VBegin+i of Device.
type RmapRange struct {
	Begin  DataBlock
	Len    uint64
	Device DevID
	VBegin VBlock
}

// RmapOptions bound Rmap.
type RmapOptions struct {
	// MaxRanges is how many ranges are held in memory; more go through an unnamed temporary
	// file. 0: one million, about 32 MiB.
	MaxRanges int
}

// Rmap calls fn for every run of data blocks in regions that some device maps, by data block,
// device and virtual block, until fn returns an error. Blocks that several devices share come
// once for each.
func (v *View) Rmap(regions []DataRun, o RmapOptions, fn func(RmapRange) error) error {
	want, err := mergeRegions(regions)
	if err != nil {
		return err
	}
	devs, err := v.Devices()
	if err != nil {
		return err
	}
	s := rmapSorter{limit: o.MaxRanges}
	if s.limit <= 0 {
		s.limit = 1 << 20
	}
	defer s.close()
	for _, d := range devs {
		var run RmapRange
		var bad error
		err := v.Walk(d.ID, 0, func(e Entry) bool {
			if !want.has(e.Block) {
				return true
			}
			if run.Len > 0 && e.Block == run.Begin+DataBlock(run.Len) && e.VBlock == run.VBegin+VBlock(run.Len) {
				run.Len++
				return true
			}
			bad = s.add(run)
			run = RmapRange{e.Block, 1, d.ID, e.VBlock}
			return bad == nil
		})
		if err == nil && bad == nil {
			err = s.add(run)
		}
		if err == nil {
			err = bad
		}
		if err != nil {
			return fmt.Errorf("reverse map of thin %d: %w", d.ID, err)
		}
	}
	return s.each(fn)
}

// WriteRmap writes the runs as thin_rmap does, one a line; the ends are exclusive.
func (v *View) WriteRmap(w io.Writer, regions []DataRun, o RmapOptions) error {
	b := bufio.NewWriterSize(w, 1<<16)
	err := v.Rmap(regions, o, func(r RmapRange) error {
		_, err := fmt.Fprintf(b, "data %d..%d -> thin(%d) %d..%d\n", r.Begin, uint64(r.Begin)+r.Len, r.Device, r.VBegin, uint64(r.VBegin)+r.Len)
		return err
	})
	if err != nil {
		return err
	}
	return b.Flush()
}

// dataRegions are ascending and do not touch each other.
type dataRegions []DataRun

func mergeRegions(list []DataRun) (dataRegions, error) {
	rs := slices.Clone(list)
	slices.SortFunc(rs, func(a, b DataRun) int { return cmp.Compare(a.Begin, b.Begin) })
	var out dataRegions
	for _, r := range rs {
		if r.Len == 0 || r.Len > math.MaxUint64-uint64(r.Begin) {
			return nil, fmt.Errorf("region of %d data blocks from %d on", r.Len, r.Begin)
		}
		if n := len(out); n > 0 && uint64(r.Begin) <= uint64(out[n-1].Begin)+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, uint64(r.Begin)+r.Len-uint64(out[n-1].Begin))
			continue
		}
		out = append(out, r)
	}
	return out, nil
}

func (rs dataRegions) has(b DataBlock) bool {
	i := sort.Search(len(rs), func(i int) bool { return rs[i].Begin > b }) - 1
	return i >= 0 && uint64(b)-uint64(rs[i].Begin) < rs[i].Len
}
