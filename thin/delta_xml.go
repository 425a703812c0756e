package thin

import "io"

// DeltaOptions say how WriteDelta writes.
type DeltaOptions struct {
	// Verbose writes the data blocks too: one range for each physically contiguous piece,
	// gathered under the name of their kind.
	Verbose bool
}

// WriteDelta writes the difference of two devices as the XML of thin_delta.
func (v *View) WriteDelta(w io.Writer, left, right DevID, o DeltaOptions) error {
	x := newXMLWriter(w)
	x.open(0, `superblock uuid=""`)
	x.attr("time", uint64(v.sb.Time))
	x.attr("transaction", v.sb.TransactionID)
	x.attr("data_block_size", uint64(v.sb.DataBlockSize))
	x.attr("nr_data_blocks", v.sb.DataMap.NrBlocks)
	if v.sb.HeldRoot != 0 {
		x.attr("metadata_snap", uint64(v.sb.HeldRoot))
	}
	if err := x.end(""); err != nil {
		return err
	}
	x.open(1, "diff")
	x.attr("left", uint64(left))
	x.attr("right", uint64(right))
	if err := x.end(""); err != nil {
		return err
	}
	write := v.writeDeltaPlain
	if o.Verbose {
		write = v.writeDeltaVerbose
	}
	if err := write(x, left, right); err != nil {
		return err
	}
	if err := x.endTag(1, "diff"); err != nil {
		return err
	}
	if err := x.endTag(0, "superblock"); err != nil {
		return err
	}
	return x.w.Flush()
}

// writeDeltaPlain joins neighbouring runs of a kind, whatever their data blocks.
func (v *View) writeDeltaPlain(x *xmlWriter, left, right DevID) error {
	var run DeltaRange
	flush := func() error {
		if run.Len == 0 {
			return nil
		}
		x.open(2, run.Kind)
		x.attr("begin", uint64(run.Begin))
		x.attr("length", run.Len)
		return x.end("/")
	}
	err := v.Delta(left, right, func(d DeltaRange) error {
		if run.Len > 0 && d.Kind == run.Kind && d.Begin == run.Begin+VBlock(run.Len) {
			run.Len += d.Len
			return nil
		}
		err := flush()
		run = d
		return err
	})
	if err != nil {
		return err
	}
	return flush()
}

func (v *View) writeDeltaVerbose(x *xmlWriter, left, right DevID) error {
	kind := ""
	closeKind := func() error {
		if kind == "" {
			return nil
		}
		return x.endTag(2, kind)
	}
	err := v.Delta(left, right, func(d DeltaRange) error {
		if d.Kind != kind {
			if err := closeKind(); err != nil {
				return err
			}
			kind = d.Kind
			x.open(2, kind)
			if err := x.end(""); err != nil {
				return err
			}
		}
		x.open(3, "range")
		x.attr("begin", uint64(d.Begin))
		switch d.Kind {
		case DeltaDifferent:
			x.attr("left_data_begin", uint64(d.Left))
			x.attr("right_data_begin", uint64(d.Right))
		case DeltaRightOnly:
			x.attr("data_begin", uint64(d.Right))
		default:
			x.attr("data_begin", uint64(d.Left))
		}
		x.attr("length", d.Len)
		return x.end("/")
	})
	if err != nil {
		return err
	}
	return closeKind()
}
