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
	buf  []byte // superblock
	sb   Superblock
	read btree.Blocks
	m    *Metadata // nil: nobody else has the pool open
	pin  *spacemap.Pin
}

// Pin holds the last committed state. Metadata blocks that are freed later are not reused until
// Unpin, so a view must not be kept for long.
func (m *Metadata) Pin() *View {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &View{d: m.d, buf: m.committed, sb: m.csb, read: m.cache, m: m, pin: m.meta.Pin()}
}

// Unpin lets go. The view must not be used afterwards; a second call does nothing.
func (v *View) Unpin() {
	v.m.mu.Lock()
	defer v.m.mu.Unlock()
	v.m.meta.Unpin(v.pin)
}

// Superblock is the one of the state.
func (v *View) Superblock() Superblock { return v.sb }

func (v *View) reader(size int) btree.Reader {
	return btree.Reader{Blocks: v.read, ValueSize: size}
}

// Devices lists the devices, by id.
func (v *View) Devices() ([]DeviceInfo, error) {
	var list []DeviceInfo
	err := v.reader(detailsSize).Walk(v.sb.DetailsRoot, 0, func(k uint64, b []byte) bool {
		list = append(list, DeviceInfo{DevID(k), decodeDetails(b)})
		return true
	})
	return list, err
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
