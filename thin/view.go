package thin

import (
	"encoding/binary"
	"fmt"
	"math"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/spacemap"
)

// A View is one committed state of a pool, for long walks: it stands still while commits go on,
// and takes no lock of the metadata while it reads. Safe for concurrent use.
type View struct {
	d    dev.Device
	buf  []byte     // superblock of the pool
	pool Superblock // the same, decoded
	sb   Superblock // of the state: pool, or the metadata snapshot
	read btree.Blocks
	m    *Metadata // nil: the view is not of an opened Metadata
	pin  *spacemap.Pin
}

// Pin holds the last committed state. Metadata blocks that are freed later are not reused until
// Unpin, so a view must not be kept for long.
func (m *Metadata) Pin() *View {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &View{d: m.d, buf: m.committed, pool: m.csb, sb: m.csb, read: m.cache, m: m, pin: m.meta.Pin()}
}

// Unpin lets go. The view, and what MetadataSnap made of it, must not be used afterwards; a
// second call does nothing.
func (v *View) Unpin() {
	if v.m == nil {
		return
	}
	v.m.mu.Lock()
	defer v.m.mu.Unlock()
	v.m.meta.Unpin(v.pin)
}

// viewCacheBytes bounds the cache of a view that OpenView makes.
const viewCacheBytes = 32 << 20

// OpenView reads the committed state of a pool that nobody writes to, without its space maps:
// damage there does not matter. The device stays the caller's.
//
// A pool that is in use (by a kernel, say) may be viewed only to look at its metadata snapshot,
// which stands still as long as it is held: MetadataSnap.
func OpenView(d dev.Device) (*View, error) {
	buf := make([]byte, block.Size)
	if err := readSuperblock(d, buf); err != nil {
		return nil, err
	}
	sb := DecodeSuperblock(buf)
	if err := sb.Validate(true); err != nil {
		return nil, err
	}
	return &View{d: d, buf: buf, pool: sb, sb: sb, read: block.NewCache(d, viewCacheBytes)}, nil
}

// MetadataSnap returns a view of the pool's metadata snapshot; ErrNotFound if none is held. It
// needs no Unpin of its own.
func (v *View) MetadataSnap() (*View, error) {
	if v.pool.HeldRoot == 0 {
		return nil, fmt.Errorf("metadata snapshot: none is held: %w", ErrNotFound)
	}
	b, err := v.read.Read(v.pool.HeldRoot, block.Superblock)
	if err != nil {
		return nil, fmt.Errorf("metadata snapshot: %w", err)
	}
	s := *v
	s.sb = DecodeSuperblock(b)
	if err := s.sb.Validate(true); err != nil {
		return nil, fmt.Errorf("metadata snapshot: %w", err)
	}
	return &s, nil
}

// Superblock is the one of the state; a metadata snapshot's has no space map roots.
func (v *View) Superblock() Superblock { return v.sb }

// DataBlockSize is the length of a data block in bytes.
func (v *View) DataBlockSize() int64 { return int64(v.sb.DataBlockSize) * sectorSize }

func (v *View) reader(size int) btree.Reader {
	return btree.Reader{Blocks: v.read, ValueSize: size}
}

// Devices lists the devices, by id.
func (v *View) Devices() ([]DeviceInfo, error) {
	var list []DeviceInfo
	var bad error
	err := v.reader(detailsSize).Walk(v.sb.DetailsRoot, 0, func(k uint64, b []byte) bool {
		if k > uint64(MaxDevID) {
			bad = fmt.Errorf("device id %d does not fit 24 bits: %w", k, ErrCorrupt)
			return false
		}
		list = append(list, DeviceInfo{DevID(k), decodeDetails(b)})
		return true
	})
	if err == nil {
		err = bad
	}
	return list, err
}

// Device returns the details of one device.
func (v *View) Device(id DevID) (DeviceInfo, error) {
	b, ok, err := v.reader(detailsSize).Lookup(v.sb.DetailsRoot, uint64(id))
	if err == nil && !ok {
		err = fmt.Errorf("thin %d: %w", id, ErrNotFound)
	}
	if err != nil {
		return DeviceInfo{}, err
	}
	return DeviceInfo{id, decodeDetails(b)}, nil
}

func (v *View) root(id DevID) (block.Loc, error) {
	b, ok, err := v.reader(8).Lookup(v.sb.MappingRoot, uint64(id))
	if err == nil && !ok {
		err = fmt.Errorf("thin %d: %w", id, ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	return block.Loc(binary.LittleEndian.Uint64(b)), nil
}

// Walk calls fn for every mapping of a device from begin on, ascending, until fn returns false.
func (v *View) Walk(id DevID, begin VBlock, fn func(Entry) bool) error {
	root, err := v.root(id)
	if err != nil {
		return err
	}
	return walkMappings(v.reader(8), root, begin, math.MaxUint64, fn)
}

// HighestMapped returns the last virtual block of a device that is mapped.
func (v *View) HighestMapped(id DevID) (VBlock, bool, error) {
	root, err := v.root(id)
	if err != nil {
		return 0, false, err
	}
	k, ok, err := v.reader(8).Last(root)
	return VBlock(k), ok, err
}

// A Listing is what is known of one device.
type Listing struct {
	DeviceInfo
	Usage
	Highest   VBlock // last virtual block that is mapped, if AnyMapped
	AnyMapped bool
}

// Ls lists the devices, by id, with their usage.
func (v *View) Ls() ([]Listing, error) {
	devs, err := v.Devices()
	if err != nil {
		return nil, err
	}
	usage, err := v.Usage()
	if err != nil {
		return nil, err
	}
	list := make([]Listing, len(devs))
	for i, d := range devs {
		list[i] = Listing{DeviceInfo: d, Usage: usage[d.ID]}
		if list[i].Highest, list[i].AnyMapped, err = v.HighestMapped(d.ID); err != nil {
			return nil, err
		}
	}
	return list, nil
}
