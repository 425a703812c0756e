package thin

import (
	"bytes"
	"fmt"

	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// superblock checks block 0 and reports whether it can be followed.
func (c *checker) superblock() bool {
	at := place{where: whereSuper, block: superblockAt}
	if allZero(c.raw) {
		c.fatal(at, "%s", noPool)
		return false
	}
	if err := block.Verify(c.raw, superblockAt, block.Superblock); err != nil {
		c.fatal(at, "%s", err.(*block.CorruptError).What)
		return false
	}
	c.sb = DecodeSuperblock(c.raw)
	s, r := &c.sb, c.rep
	if s.Magic != superblockMagic {
		c.fatal(at, "magic %d, want %d", s.Magic, superblockMagic)
		return false
	}
	r.TransactionID, r.Time, r.NeedsCheck = s.TransactionID, s.Time, s.Flags&flagNeedsCheck != 0
	r.HeldRoot, r.DataBlockSize = uint64(s.HeldRoot), int64(s.DataBlockSize)*sectorSize
	r.DataBlocks, r.MetaBlocks = s.DataMap.NrBlocks, s.MetaMap.NrBlocks

	c.superblockFields(at, s, c.raw)
	if n := uint64(c.d.Size() / block.Size); s.MetaMap.NrBlocks > n {
		c.fatal(at, "counts %d metadata blocks, the device has %d", s.MetaMap.NrBlocks, n)
	}
	if s.MetaMap.NrBlocks > spacemap.MaxMetaBlocks {
		c.fatal(at, "counts %d metadata blocks, more than %d", s.MetaMap.NrBlocks, spacemap.MaxMetaBlocks)
	}
	if s.DataMap.NrBlocks > 1<<40 {
		c.fatal(at, "counts %d data blocks, more than 40 bits", s.DataMap.NrBlocks)
	}
	if s.MetaBlocksThen > s.MetaMap.NrBlocks {
		c.warn(at, "was formatted with %d metadata blocks, more than the %d there are now", s.MetaBlocksThen, s.MetaMap.NrBlocks)
	}
	if c.o.SuperblockOnly {
		c.superblockRoots(at, s)
	}
	return true
}

// superblockRoots checks the places that the superblock names, which the walk does otherwise.
func (c *checker) superblockRoots(at place, s *Superblock) {
	for _, root := range []struct {
		u   use
		loc block.Loc
	}{
		{useTop, s.MappingRoot}, {useDetails, s.DetailsRoot}, {useDataIndex, s.DataMap.BitmapRoot}, {useDataOver, s.DataMap.Overflow},
		{useMetaIndex, s.MetaMap.BitmapRoot}, {useMetaOver, s.MetaMap.Overflow}, {useHeld, s.HeldRoot},
	} {
		if uint64(root.loc) >= s.MetaMap.NrBlocks || root.loc == 0 && root.u != useHeld {
			c.fatal(at, "block %d of %d is named as %v", root.loc, s.MetaMap.NrBlocks, root.u)
		}
	}
}

// superblockFields checks what a superblock and its copy have in common.
func (c *checker) superblockFields(at place, s *Superblock, raw []byte) {
	if s.Version != superblockVersion {
		c.warn(at, "version %d, want %d", s.Version, superblockVersion)
	}
	if s.Flags&^flagNeedsCheck != 0 {
		c.warn(at, "flags %#x, only bit 0 is defined", s.Flags)
	}
	if s.Time >= MaxTime {
		c.fatal(at, "time %d does not fit 24 bits", s.Time)
	}
	if err := CheckBlockSize(int64(s.DataBlockSize) * sectorSize); err != nil {
		c.fatal(at, "%v", err)
	}
	if s.MetaBlockSize != metaSectors {
		c.fatal(at, "metadata block size %d sectors, want %d", s.MetaBlockSize, metaSectors)
	}
	if s.IncompatFlags != 0 || s.CompatROFlags != 0 {
		c.fatal(at, "features that nobody knows: incompatible %#x, read-only compatible %#x", s.IncompatFlags, s.CompatROFlags)
	}
	if s.CompatFlags != 0 {
		c.warn(at, "features that nobody knows: compatible %#x", s.CompatFlags)
	}
	for _, z := range []struct {
		name       string
		begin, end int
	}{
		{"data space map root", 64 + 32, 64 + smRootSlot},
		{"metadata space map root", 64 + smRootSlot + 32, 64 + 2*smRootSlot},
		{"fields", superblockUsed, block.Size},
	} {
		if !allZero(raw[z.begin:z.end]) {
			c.warn(at, "bytes after the %s, %d to %d, are not zero", z.name, z.begin, z.end-1)
		}
	}
}

var zeroBlock [block.Size]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

// heldRoot checks the metadata snapshot: a superblock of its own whose trees count too.
func (c *checker) heldRoot() {
	at := place{where: whereHeld, block: c.sb.HeldRoot}
	if !c.claim(at, useHeld, c.sb.HeldRoot) {
		return
	}
	b := c.read(at, block.Superblock, 0)
	if b == nil {
		return
	}
	raw := append([]byte(nil), b...)
	s := DecodeSuperblock(raw)
	if s.Magic != superblockMagic {
		c.fatal(at, "magic %d, want %d", s.Magic, superblockMagic)
		c.rep.Partial = true
		return
	}
	c.superblockFields(at, &s, raw)
	if s.HeldRoot != 0 {
		c.fatal(at, "has a metadata snapshot %d of its own", s.HeldRoot)
	}
	if !allZero(raw[64 : 64+32]) {
		c.warn(at, "has a data space map root")
	}
	if !allZero(raw[64+smRootSlot : 64+smRootSlot+32]) {
		c.warn(at, "has a metadata space map root")
	}
	if s.DataBlockSize != c.sb.DataBlockSize {
		c.fatal(at, "data block size %d sectors, the pool's is %d", s.DataBlockSize, c.sb.DataBlockSize)
	}
	if s.Time > c.sb.Time {
		c.fatal(at, "time %d, the pool's is %d", s.Time, c.sb.Time)
	}
	if s.MetaBlocksThen > c.sb.MetaMap.NrBlocks {
		c.warn(at, "was formatted with %d metadata blocks, more than the %d there are now", s.MetaBlocksThen, c.sb.MetaMap.NrBlocks)
	}
	c.devices(&s, whereHeld, !c.o.MetadataSnap)
}

// A place is where the walk is, for findings.
type place struct {
	where  string
	device DevID
	dev    bool // device is set
	block  block.Loc
	path   []block.Loc // from the root to block
	keys   *Span
}

func (at place) span(begin, end uint64) place {
	at.keys = &Span{begin, end}
	return at
}

func (c *checker) report(s Severity, at place, format string, args []any) {
	f := Finding{Severity: s, Where: at.where, Block: &at.block, Keys: at.keys, What: fmt.Sprintf(format, args...)}
	if at.dev {
		f.Device = &at.device
	}
	if len(at.path) > 0 {
		f.Path = append([]block.Loc(nil), at.path...)
	}
	c.add(f)
}

func (c *checker) fatal(at place, format string, args ...any) { c.report(Fatal, at, format, args) }
func (c *checker) warn(at place, format string, args ...any)  { c.report(Warning, at, format, args) }
