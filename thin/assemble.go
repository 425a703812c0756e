package thin

import (
	"errors"
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// An Assembly describes a pool whose mapping trees are on the metadata device already. The
// caller has put every node of them there, sealed, and has counted.
type Assembly struct {
	Time          uint32
	TransactionID uint64
	DataBlockSize int64 // bytes
	DataBlocks    uint64
	Devices       []AssembledDevice // ascending by id
	// MetaCount is how often a metadata block is referred to: a node of a mapping tree by
	// distinct nodes, and by each device whose root it is. It is 0 for everything else but the
	// superblock, whose count is set.
	MetaCount func(block.Loc) uint32
	// DataCount is how many entries of distinct leaves name a data block.
	DataCount func(DataBlock) uint32
}

// An AssembledDevice is a device and the root of its mapping tree.
type AssembledDevice struct {
	DeviceInfo
	Root block.Loc
}

// Assemble makes the pool: new trees of devices over the mapping trees, new space maps, and last
// the superblock. Blocks with a count of 0 are used for that. The whole device becomes the
// pool's metadata. Block 0 must be all zeros before; after an error it still is.
// ErrNoMetaSpace if there are too few blocks.
func Assemble(d dev.Device, a Assembly) error {
	if err := a.check(); err != nil {
		return fmt.Errorf("assemble pool: %w", err)
	}
	late := &lateSuperblock{Device: d}
	err := assemble(late, a)
	if errors.Is(err, spacemap.ErrNoSpace) || errors.Is(err, ErrNoMetaSpace) {
		return fmt.Errorf("assemble pool: the metadata device of %d blocks is too small: %w", d.Size()/block.Size, ErrNoMetaSpace)
	}
	if err != nil {
		return fmt.Errorf("assemble pool: %w", err)
	}
	return late.finish()
}

func (a *Assembly) check() error {
	if err := CheckBlockSize(a.DataBlockSize); err != nil {
		return err
	}
	if a.Time >= MaxTime {
		return fmt.Errorf("time %d does not fit 24 bits", a.Time)
	}
	for i, v := range a.Devices {
		if err := checkID(v.ID); err != nil {
			return err
		}
		if i > 0 && v.ID <= a.Devices[i-1].ID {
			return fmt.Errorf("device %d after %d", v.ID, a.Devices[i-1].ID)
		}
		if v.CreationTime > v.SnapshottedTime || v.SnapshottedTime > a.Time {
			return fmt.Errorf("device %d: created at time %d, last in a snapshot at time %d, the pool's time is %d",
				v.ID, v.CreationTime, v.SnapshottedTime, a.Time)
		}
	}
	return nil
}

func assemble(d dev.Device, a Assembly) error {
	n := min(uint64(d.Size()/block.Size), spacemap.MaxMetaBlocks)
	if a.DataBlocks/spacemap.EntriesPerBitmap > n {
		return fmt.Errorf("bitmaps of %d data blocks: %w", a.DataBlocks, ErrNoMetaSpace)
	}
	m := newMetadata(d, 0)
	m.sb = Superblock{Magic: superblockMagic, Version: superblockVersion, Time: a.Time, TransactionID: a.TransactionID,
		DataBlockSize: uint32(a.DataBlockSize / sectorSize), MetaBlockSize: metaSectors, MetaBlocksThen: n}
	var err error
	if m.meta, err = spacemap.RebuildMeta(m.tm, n, func(b block.Loc) uint32 {
		if b == superblockAt {
			return 1
		}
		return a.MetaCount(b)
	}); err != nil {
		return err
	}
	if m.data, err = spacemap.RebuildData(m.tm, a.DataBlocks, func(b uint64) uint32 { return a.DataCount(DataBlock(b)) }); err != nil {
		return err
	}
	m.trees()
	if m.sb.MappingRoot, err = m.top.Empty(); err != nil {
		return err
	}
	if m.sb.DetailsRoot, err = m.details.Empty(); err != nil {
		return err
	}
	for _, v := range a.Devices {
		if err := m.addLocked(v.ID, &device{Details: v.Details, root: v.Root}); err != nil {
			return err
		}
	}
	m.changed = true
	_, err = m.Commit(nil)
	return err
}
