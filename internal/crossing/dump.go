package crossing

import (
	"encoding/xml"
	"fmt"
	"io"
	"os/exec"
	"slices"
)

// A Dump is a pool's metadata as thin_dump prints it.
type Dump struct {
	Transaction uint64       `xml:"transaction,attr"`
	Time        uint32       `xml:"time,attr"`
	BlockSecs   int64        `xml:"data_block_size,attr"`
	DataBlocks  int64        `xml:"nr_data_blocks,attr"`
	Devices     []DumpDevice `xml:"device"`
}

// A DumpDevice is one thin device of a Dump.
type DumpDevice struct {
	ID          uint32
	Mapped      int64
	Transaction uint64
	Created     uint32
	SnapTime    uint32
	Mappings    []DumpRun
}

// A DumpRun is Length blocks mapped from virtual block Origin to data block Data.
type DumpRun struct {
	Origin, Data, Length int64
	Time                 uint32
}

// UnmarshalXML keeps single and range mappings in one list, in order.
func (d *DumpDevice) UnmarshalXML(dec *xml.Decoder, start xml.StartElement) error {
	attr := func(e xml.StartElement, name string) (v int64) {
		for _, a := range e.Attr {
			if a.Name.Local == name {
				fmt.Sscan(a.Value, &v)
			}
		}
		return v
	}
	d.ID, d.Mapped = uint32(attr(start, "dev_id")), attr(start, "mapped_blocks")
	d.Transaction = uint64(attr(start, "transaction"))
	d.Created, d.SnapTime = uint32(attr(start, "creation_time")), uint32(attr(start, "snap_time"))
	for {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		switch e := tok.(type) {
		case xml.StartElement:
			switch e.Name.Local {
			case "single_mapping":
				d.Mappings = append(d.Mappings, DumpRun{attr(e, "origin_block"), attr(e, "data_block"), 1, uint32(attr(e, "time"))})
			case "range_mapping":
				d.Mappings = append(d.Mappings, DumpRun{attr(e, "origin_begin"), attr(e, "data_begin"), attr(e, "length"), uint32(attr(e, "time"))})
			default:
				return fmt.Errorf("device %d: element %q", d.ID, e.Name.Local)
			}
		case xml.EndElement:
			if e.Name == start.Name {
				return nil
			}
		}
	}
}

// ParseDump reads the XML of thin_dump.
func ParseDump(text []byte) (*Dump, error) {
	var d Dump
	if err := xml.Unmarshal(text, &d); err != nil {
		return nil, fmt.Errorf("thin_dump: %w", err)
	}
	return &d, nil
}

// ThinDump runs thin-provisioning-tools' thin_dump on a metadata file.
func ThinDump(metadata string) (*Dump, error) {
	out, err := exec.Command("thin_dump", metadata).Output()
	if err != nil {
		return nil, fmt.Errorf("thin_dump %s: %w", metadata, err)
	}
	return ParseDump(out)
}

// ThinCheck runs thin_check on a metadata file; what it prints is in the error.
func ThinCheck(metadata string) error {
	out, err := exec.Command("thin_check", metadata).CombinedOutput()
	if err != nil {
		return fmt.Errorf("thin_check %s: %w\n%s", metadata, err, out)
	}
	return nil
}

// Device returns a device of the dump.
func (d *Dump) Device(id uint32) (DumpDevice, bool) {
	i := slices.IndexFunc(d.Devices, func(dev DumpDevice) bool { return dev.ID == id })
	if i < 0 {
		return DumpDevice{}, false
	}
	return d.Devices[i], true
}

// A DumpReader reads a thin device by its dump from the data device: a reader that shares no code
// with either engine.
type DumpReader struct {
	Data       io.ReaderAt
	BlockBytes int64
	Device     DumpDevice
}

// ReadAt reads zeros where nothing is mapped, without an end.
func (r DumpReader) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		block, in := (off+int64(done))/r.BlockBytes, (off+int64(done))%r.BlockBytes
		part := p[done:min(int64(len(p)), int64(done)+r.BlockBytes-in)]
		i, _ := slices.BinarySearchFunc(r.Device.Mappings, block, func(m DumpRun, b int64) int {
			if m.Origin+m.Length <= b {
				return -1
			}
			return 1
		})
		if i < len(r.Device.Mappings) && r.Device.Mappings[i].Origin <= block {
			m := r.Device.Mappings[i]
			if n, err := r.Data.ReadAt(part, (m.Data+block-m.Origin)*r.BlockBytes+in); n < len(part) {
				return done, fmt.Errorf("device %d block %d at data block %d: %w", r.Device.ID, block, m.Data+block-m.Origin, err)
			}
		} else {
			clear(part)
		}
		done += len(part)
	}
	return done, nil
}
