package thin

import (
	"cmp"
	"io"

	"mica/dev"
)

// DumpOptions say what to dump.
type DumpOptions struct {
	// MetadataSnap dumps the pool's metadata snapshot.
	MetadataSnap bool
	// Devices, if not nil, are the only devices to dump, in ascending order.
	Devices []DevID
	// DataBlocks is the number of data blocks to name, where the state does not have it: that of
	// a metadata snapshot. 0: as the state says.
	DataBlocks uint64
}

// Dump writes the pool of a device that nobody has open as portable XML. The space maps are
// not read: Restore makes them anew.
func Dump(d dev.Device, w io.Writer, o DumpOptions) error {
	v, err := OpenView(d)
	if err != nil {
		return err
	}
	return v.Dump(w, o)
}

// Dump writes the state of the view as portable XML, which Restore and thin_restore accept: a
// run of mappings goes on while virtual block and data block both advance by one and the time
// is the same.
func (v *View) Dump(w io.Writer, o DumpOptions) error {
	if o.MetadataSnap {
		s, err := v.MetadataSnap()
		if err != nil {
			return err
		}
		v = s
	}
	devs, err := v.dumpedDevices(o.Devices)
	if err != nil {
		return err
	}
	x := newXMLWriter(w)
	x.open(0, `superblock uuid=""`)
	x.attr("time", uint64(v.sb.Time))
	x.attr("transaction", v.sb.TransactionID)
	x.attr("flags", 0)
	x.attr("version", superblockVersion)
	x.attr("data_block_size", uint64(v.sb.DataBlockSize))
	x.attr("nr_data_blocks", cmp.Or(o.DataBlocks, v.sb.DataMap.NrBlocks))
	if err := x.end(""); err != nil {
		return err
	}
	for _, d := range devs {
		if err := v.dumpDevice(x, d); err != nil {
			return err
		}
	}
	if err := x.endTag(0, "superblock"); err != nil {
		return err
	}
	return x.w.Flush()
}

func (v *View) dumpedDevices(ids []DevID) ([]DeviceInfo, error) {
	devs, err := v.Devices()
	if err != nil || ids == nil {
		return devs, err
	}
	var some []DeviceInfo
	for _, id := range ids {
		if _, err := v.root(id); err != nil {
			return nil, err
		}
		for _, d := range devs {
			if d.ID == id {
				some = append(some, d)
			}
		}
	}
	return some, nil
}

func (v *View) dumpDevice(x *xmlWriter, d DeviceInfo) error {
	x.open(1, "device")
	x.attr("dev_id", uint64(d.ID))
	x.attr("mapped_blocks", d.MappedBlocks)
	x.attr("transaction", d.TransactionID)
	x.attr("creation_time", uint64(d.CreationTime))
	x.attr("snap_time", uint64(d.SnapshottedTime))
	if err := x.end(""); err != nil {
		return err
	}
	var run mappingRun
	var werr error
	err := v.Walk(d.ID, 0, func(e Entry) bool {
		if !run.extend(e) {
			werr = run.write(x)
			run = mappingRun{e, 1}
		}
		return werr == nil
	})
	if err == nil {
		err = werr
	}
	if err == nil {
		err = run.write(x)
	}
	if err == nil {
		err = x.endTag(1, "device")
	}
	return err
}

// A mappingRun is n neighbouring mappings of one time.
type mappingRun struct {
	Entry
	n uint64
}

func (r *mappingRun) extend(e Entry) bool {
	if r.n == 0 || e.VBlock != r.VBlock+VBlock(r.n) || e.Block != r.Block+DataBlock(r.n) || e.Time != r.Time {
		return false
	}
	r.n++
	return true
}

func (r *mappingRun) write(x *xmlWriter) error {
	switch r.n {
	case 0:
		return nil
	case 1:
		x.open(2, "single_mapping")
		x.attr("origin_block", uint64(r.VBlock))
		x.attr("data_block", uint64(r.Block))
	default:
		x.open(2, "range_mapping")
		x.attr("origin_begin", uint64(r.VBlock))
		x.attr("data_begin", uint64(r.Block))
		x.attr("length", r.n)
	}
	x.attr("time", uint64(r.Time))
	return x.end("/")
}
