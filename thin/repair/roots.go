package repair

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
	"mica/thin"
)

// What a pool was found by.
const (
	FromSuperblock = "superblock"         // it is whole
	FromDamaged    = "damaged superblock" // its fields name trees that fit together
	FromSearch     = "search"             // through all blocks
	FromOptions    = "options"            // roots that the caller has named
)

// A state is one state of a pool: its fields and its two trees.
type state struct {
	from  string
	sb    thin.Superblock // its fields; which of them count, from says
	top   deviceTree
	det   detailsTree
	known bool // sb is whole: transaction id, time and space maps are those of this state
}

// superblock reads block 0. whole says that it can be believed; hint that it is damaged but
// still recognisable.
func superblock(d dev.Device, n block.Loc) (sb thin.Superblock, whole, hint bool, why string) {
	buf := make([]byte, block.Size)
	if _, err := d.ReadAt(buf, 0); err != nil {
		return sb, false, false, fmt.Sprintf("metadata block 0 cannot be read: %v", err)
	}
	sb = thin.DecodeSuperblock(buf)
	err := block.Verify(buf, 0, block.Superblock)
	if err == nil {
		err = sb.Validate(true)
	}
	if err == nil {
		err = plausible(&sb, n)
	}
	if err == nil {
		return sb, true, true, ""
	}
	if slices.Equal(buf, make([]byte, block.Size)) {
		return sb, false, false, "metadata block 0: superblock is all zeros"
	}
	return sb, false, sb.Validate(true) == nil, err.Error()
}

// plausible refuses numbers that the device cannot hold.
func plausible(sb *thin.Superblock, n block.Loc) error {
	switch {
	case sb.DataMap.NrBlocks/spacemap.EntriesPerBitmap > uint64(n) || sb.DataMap.NrBlocks > 1<<40:
		return block.Corruptf(0, "superblock counts %d data blocks, whose bitmaps do not fit %d metadata blocks", sb.DataMap.NrBlocks, n)
	case sb.Time >= thin.MaxTime:
		return block.Corruptf(0, "superblock time %d does not fit 24 bits", sb.Time)
	}
	return nil
}

// A finder chooses the state to repair.
type finder struct {
	o    *Options
	f    *forest
	rep  *Report
	scan *scan
}

// scanned reads all blocks, once.
func (x *finder) scanned() (*scan, error) {
	var err error
	if x.scan == nil {
		x.scan, err = newScan(x.f, func(done, total uint64) error { return x.o.progress("search", done, total) })
	}
	return x.scan, err
}

// find chooses the state, and sets what the forest must know before mappings are looked at.
func (x *finder) find() (*state, error) {
	sb, whole, hint, why := superblock(x.f.d, x.f.n)
	x.rep.Superblock = why
	st := &state{sb: sb, known: whole, from: FromSuperblock}
	if !whole {
		st.from = FromDamaged
		if err := x.fields(&st.sb, hint); err != nil {
			return nil, err
		}
	}
	x.override(&st.sb)
	if err := x.limits(st); err != nil {
		return nil, err
	}
	switch {
	case x.o.MappingRoot != 0 || x.o.DetailsRoot != 0:
		st.from = FromOptions
		if x.o.MappingRoot != 0 {
			st.sb.MappingRoot = x.o.MappingRoot
		}
		if x.o.DetailsRoot != 0 {
			st.sb.DetailsRoot = x.o.DetailsRoot
		}
		fallthrough
	case whole:
		x.readTrees(st)
		if empty(st.top.roots, st.top.gaps) && empty(st.det.details, st.det.gaps) && st.from == FromSuperblock {
			return x.search(st)
		}
	case hint:
		if x.readTrees(st); !x.fits(st) {
			return x.search(st)
		}
	default:
		return x.search(st)
	}
	return st, nil
}

func (x *finder) readTrees(st *state) {
	st.top = readDeviceTree(x.f.cache, st.sb.MappingRoot)
	st.det = readDetailsTree(x.f.cache, st.sb.DetailsRoot)
}

// fits reports whether the trees that a damaged superblock names belong together: the same ids,
// and as many mappings as the details say wherever a tree can be read.
func (x *finder) fits(st *state) bool {
	if empty(st.top.roots, st.top.gaps) || empty(st.det.details, st.det.gaps) {
		return false
	}
	if len(st.top.gaps)+len(st.det.gaps) == 0 && !slices.Equal(slices.Sorted(maps.Keys(st.top.roots)), slices.Sorted(maps.Keys(st.det.details))) {
		return false
	}
	for id, root := range st.top.roots {
		if n := x.f.look(root); n.state == usable && n.lossless {
			if d, ok := st.det.details[id]; ok && d.MappedBlocks != n.entries {
				return false
			}
		}
	}
	return true
}

// fields completes the fields of a superblock that is not whole: from what it still says, from a
// copy of it (a metadata snapshot), from the options.
func (x *finder) fields(sb *thin.Superblock, hint bool) error {
	if hint {
		return nil
	}
	*sb = thin.Superblock{DataBlockSize: uint32(x.o.DataBlockSize / 512)}
	s, err := x.scanned()
	if err != nil {
		return err
	}
	for _, loc := range s.supers {
		b, err := x.f.cache.Read(loc, block.Superblock)
		if err != nil {
			continue
		}
		if c := thin.DecodeSuperblock(b); loc != 0 && c.Time >= sb.Time {
			sb.DataBlockSize, sb.Time, sb.TransactionID = c.DataBlockSize, c.Time, c.TransactionID
		}
	}
	if sb.DataBlockSize == 0 {
		return errors.New("the superblock is lost, and with it the pool's block size: give it (--block-size)")
	}
	return nil
}

// override puts what the caller knows in place of what was found.
func (x *finder) override(sb *thin.Superblock) {
	if x.o.DataBlockSize != 0 {
		sb.DataBlockSize = uint32(x.o.DataBlockSize / 512)
	}
	if x.o.TransactionID != nil {
		sb.TransactionID = *x.o.TransactionID
	}
	if x.o.DataBlocks != 0 {
		sb.DataMap.NrBlocks = x.o.DataBlocks
	}
}

// limits checks block size and number of blocks, and tells the forest.
func (x *finder) limits(st *state) error {
	sb := &st.sb
	size := int64(sb.DataBlockSize) * 512
	if err := thin.CheckBlockSize(size); err != nil {
		return err
	}
	if !st.known && x.o.DataBlocks == 0 {
		// The length of the data device is sure, what a damaged superblock says is not.
		switch have := uint64(x.o.DataBytes / size); {
		case x.o.DataBytes > 0 && (sb.DataMap.NrBlocks == 0 || sb.DataMap.NrBlocks > have):
			sb.DataMap.NrBlocks = have
		case sb.DataMap.NrBlocks == 0:
			return errors.New("the superblock is lost, and with it the length of the data device: give the data device, or its length (--data-size)")
		}
	}
	if sb.Time >= thin.MaxTime {
		sb.Time = 0 // what is found says more
	}
	if err := plausible(sb, x.f.n); err != nil {
		return err
	}
	x.f.dataBlocks = sb.DataMap.NrBlocks
	if st.known {
		x.f.time = sb.Time
	}
	return nil
}
