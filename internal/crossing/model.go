package crossing

import (
	"fmt"
	"slices"
)

// A Device is what the model knows of one thin device: for every sector the seed of the write it
// holds (0: zeros), and which blocks the kernel would have mapped.
type Device struct {
	SizeBytes int64
	Seeds     []uint32
	Mapped    map[int64]bool // by virtual block
}

func (d *Device) clone() *Device {
	m := make(map[int64]bool, len(d.Mapped))
	for b := range d.Mapped {
		m[b] = true
	}
	return &Device{SizeBytes: d.SizeBytes, Seeds: slices.Clone(d.Seeds), Mapped: m}
}

// A Model is a pool in memory.
type Model struct {
	BlockBytes    int64
	Devices       map[uint32]*Device
	TransactionID uint64
	Held          bool  // a metadata snapshot is held
	DataBytes     int64 // size of the data device
	MetadataBytes int64
}

// NewModel returns an empty pool.
func NewModel(blockBytes, dataBytes, metadataBytes int64) *Model {
	return &Model{BlockBytes: blockBytes, Devices: map[uint32]*Device{}, DataBytes: dataBytes, MetadataBytes: metadataBytes}
}

// IDs returns the device ids in ascending order.
func (m *Model) IDs() []uint32 {
	ids := make([]uint32, 0, len(m.Devices))
	for id := range m.Devices {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// Apply changes the model as the operation changes a pool. A script that could not run is a
// defect of the test and panics.
func (m *Model) Apply(ops ...Op) {
	for _, o := range ops {
		if err := m.apply(o); err != nil {
			panic(fmt.Sprintf("crossing: %v: %v", o, err))
		}
	}
}

func (m *Model) apply(o Op) error {
	d := m.Devices[o.Dev]
	switch o.Kind {
	case CreateThin, CreateSnap:
		if d != nil {
			return fmt.Errorf("device exists")
		}
	case Delete, Write, Scatter, Discard, Zero, Flush:
		if d == nil {
			return fmt.Errorf("no such device")
		}
	}
	switch o.Kind {
	case CreateThin:
		m.Devices[o.Dev] = &Device{SizeBytes: o.Size, Seeds: make([]uint32, o.Size/SectorSize), Mapped: map[int64]bool{}}
	case CreateSnap:
		origin := m.Devices[o.Origin]
		if origin == nil {
			return fmt.Errorf("no such origin")
		}
		m.Devices[o.Dev] = origin.clone()
	case Delete:
		delete(m.Devices, o.Dev)
	case Write:
		if o.Seed == 0 {
			return fmt.Errorf("a write needs a seed")
		}
		return m.write(d, o.Off, o.Len, o.Seed)
	case Scatter:
		for i := int64(0); i < o.Count; i++ {
			if err := m.write(d, o.Off+i*o.Stride, o.Len, o.Seed); err != nil {
				return err
			}
		}
	case Discard:
		if o.Off < 0 || o.Off+o.Len > d.SizeBytes {
			return fmt.Errorf("beyond the device's %d bytes", d.SizeBytes)
		}
		first, last := (o.Off+m.BlockBytes-1)/m.BlockBytes, (o.Off+o.Len)/m.BlockBytes
		for b := first; b < last; b++ {
			delete(d.Mapped, b)
			clear(d.Seeds[b*m.BlockBytes/SectorSize : (b+1)*m.BlockBytes/SectorSize])
		}
	case Zero: // mapped as the kernel does it: it writes zeros
		return m.write(d, o.Off, o.Len, 0)
	case SetTransaction:
		if m.TransactionID != o.Old {
			return fmt.Errorf("transaction id is %d", m.TransactionID)
		}
		m.TransactionID = o.New
	case Reserve, Release:
		if m.Held == (o.Kind == Reserve) {
			return fmt.Errorf("held: %v", m.Held)
		}
		m.Held = !m.Held
	case GrowData:
		m.DataBytes = o.Size
	case GrowMetadata:
		m.MetadataBytes = o.Size
	}
	return nil
}

func (m *Model) write(d *Device, off, n int64, seed uint32) error {
	if off < 0 || n <= 0 || off%SectorSize != 0 || n%SectorSize != 0 || off+n > d.SizeBytes {
		return fmt.Errorf("write [%d, +%d) seed %d to a device of %d bytes", off, n, seed, d.SizeBytes)
	}
	for s := off / SectorSize; s < (off+n)/SectorSize; s++ {
		d.Seeds[s] = seed
	}
	for b := off / m.BlockBytes; b <= (off+n-1)/m.BlockBytes; b++ {
		d.Mapped[b] = true
	}
	return nil
}

// Read fills p with what the device must hold at off; both are multiples of SectorSize.
func (d *Device) Read(p []byte, off int64) {
	for len(p) > 0 {
		Fill(p[:SectorSize], d.Seeds[off/SectorSize], off)
		p, off = p[SectorSize:], off+SectorSize
	}
}

// ReadAt makes a device an io.ReaderAt over its expected contents.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	d.Read(p, off)
	return len(p), nil
}
