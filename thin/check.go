package thin

import (
	"fmt"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// CheckOptions say what to check and what may be changed.
type CheckOptions struct {
	// SuperblockOnly looks at nothing but the superblock.
	SuperblockOnly bool
	// SkipMappings leaves out the mapping trees, which are most of the metadata.
	SkipMappings bool
	// MetadataSnap looks at the trees of the metadata snapshot only and compares no counts: this
	// may be done while somebody (a kernel, say) has the pool open, as long as the snapshot is
	// held. ErrNotFound if there is none.
	MetadataSnap bool
	// ClearNeedsCheck takes the needs_check mark away if the check is clean.
	ClearNeedsCheck bool
	// RepairLeaks lowers counts that are too high to what they must be, if there are no fatal
	// findings, and checks again.
	RepairLeaks bool
	// MaxFindings bounds how many findings are kept; more are only counted. 0: 100,000.
	MaxFindings int
	// Progress, if set, is called now and then with the blocks walked and an estimate of all;
	// an error ends the check with that error.
	Progress func(done, total uint64) error
}

// Check reads the whole metadata of a pool that nobody has open and reports everything that is
// wrong with it. It trusts nothing: every block is read from the device and verified, every
// pointer counted, both space maps are compared with the counts.
//
// The error is about the check itself (an unreadable superblock, a failed repair); what is
// wrong with the pool is in the report. The device is written only by the options that say so.
func Check(d dev.Device, o CheckOptions) (*Report, error) {
	sb := make([]byte, block.Size)
	if d.Size() < block.Size {
		return nil, fmt.Errorf("metadata device of %d bytes has no superblock", d.Size())
	}
	if _, err := d.ReadAt(sb, 0); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	c := newChecker(d, sb, o)
	if err := c.run(); err != nil {
		return nil, err
	}
	if o.RepairLeaks && c.rep.Fatals == 0 && c.rep.Leaks > 0 && !c.rep.Partial {
		n, err := c.repairLeaks()
		if err != nil {
			return c.rep, err
		}
		o.RepairLeaks = false
		again, err := Check(d, o)
		if err == nil {
			again.Repaired = n
		}
		return again, err
	}
	if o.ClearNeedsCheck && c.rep.NeedsCheck && c.rep.Clean() && !c.rep.Partial {
		clearNeedsCheck(sb)
		if _, err := d.WriteAt(sb, 0); err != nil {
			return c.rep, fmt.Errorf("clear needs_check: %w", err)
		}
		if err := d.Flush(); err != nil {
			return c.rep, fmt.Errorf("clear needs_check: %w", err)
		}
		c.rep.NeedsCheck, c.rep.NeedsCheckCleared = false, true
	}
	return c.rep, nil
}

// Check checks the state that the view holds, of a pool that is in use. Nothing is changed;
// options that would are refused.
func (v *View) Check(o CheckOptions) (*Report, error) {
	if o.ClearNeedsCheck || o.RepairLeaks {
		return nil, fmt.Errorf("check of a pool in use: nothing can be repaired or cleared")
	}
	c := newChecker(v.d, v.buf, o)
	if err := c.run(); err != nil {
		return nil, err
	}
	return c.rep, nil
}

func clearNeedsCheck(sb []byte) {
	s := DecodeSuperblock(sb)
	s.Flags &^= flagNeedsCheck
	s.Encode(sb)
	block.Seal(sb, superblockAt, block.Superblock)
}

// A checker is one run of Check.
type checker struct {
	d    dev.Device
	o    CheckOptions
	raw  []byte // superblock
	sb   Superblock
	rep  *Report
	stop error // why the walk ends early: Progress said so

	meta  tally          // references to metadata blocks, and what the map says
	data  tally          // the same for data blocks
	use   []use          // what each metadata block is used as
	info  [][]nodeInfo   // what is known of each node, in pages of infoPage
	bufs  [][]byte       // by depth
	walks uint64         // blocks read
	index []indexedEntry // bitmaps of the data map
}

const infoPage = 1024

func newChecker(d dev.Device, sb []byte, o CheckOptions) *checker {
	if o.MaxFindings <= 0 {
		o.MaxFindings = 100000
	}
	return &checker{d: d, o: o, raw: sb, rep: &Report{Findings: []Finding{}}}
}

func (c *checker) add(f Finding) {
	switch f.Severity {
	case Fatal:
		c.rep.Fatals++
	case Leak:
		c.rep.Leaks++
	case Warning:
		c.rep.Warnings++
	}
	if len(c.rep.Findings) < c.o.MaxFindings {
		c.rep.Findings = append(c.rep.Findings, f)
	} else {
		c.rep.Omitted++
	}
}

// run walks everything. The order is such that each map is compared when all that it counts
// has been seen: the data index (for its size), the trees, the data map, the metadata map.
func (c *checker) run() error {
	if !c.superblock() || c.o.SuperblockOnly {
		return nil
	}
	n := min(c.sb.MetaMap.NrBlocks, uint64(c.d.Size()/block.Size), spacemap.MaxMetaBlocks)
	c.meta = newTally(whereMetaMap, n)
	c.use = make([]use, n)
	c.info = make([][]nodeInfo, (n+infoPage-1)/infoPage)
	c.claim(place{where: whereSuper}, useSuper, superblockAt)
	if c.o.MetadataSnap {
		if c.sb.HeldRoot == 0 {
			return fmt.Errorf("check the metadata snapshot: none is held: %w", ErrNotFound)
		}
		c.rep.Partial = true
		c.heldRoot()
		return c.stop
	}
	c.dataIndex()
	c.devices(&c.sb, whereSuper, false)
	c.exclusiveTimes()
	if c.sb.HeldRoot != 0 {
		c.heldRoot()
	}
	c.dataMap()
	c.metaMap()
	if c.stop != nil {
		return c.stop
	}
	c.rep.MetaUsed = c.meta.used()
	c.rep.DataUsed = c.data.used()
	return nil
}

// read fetches and verifies a block. It reports what is wrong and returns nil.
func (c *checker) read(at place, k block.Kind, depth int) []byte {
	if c.stop != nil {
		c.rep.Partial = true
		return nil
	}
	for len(c.bufs) <= depth {
		c.bufs = append(c.bufs, make([]byte, block.Size))
	}
	if c.walks++; c.walks%1024 == 0 && c.o.Progress != nil {
		c.stop = c.o.Progress(c.walks, max(c.walks, c.sb.MetaMap.NrAllocated))
	}
	b := c.bufs[depth]
	if _, err := c.d.ReadAt(b, int64(at.block)*block.Size); err != nil {
		c.fatal(at, "unreadable: %v", err)
		c.rep.Partial = true
		return nil
	}
	if err := block.Verify(b, at.block, k); err != nil {
		c.fatal(at, "%s", err.(*block.CorruptError).What)
		c.rep.Partial = true
		return nil
	}
	return b
}

// repairLeaks lowers the counts that are too high, in one commit.
func (c *checker) repairLeaks() (uint64, error) {
	m, err := Open(keepOpen{c.d}, OpenOptions{})
	if err != nil {
		return 0, fmt.Errorf("repair leaks: %w", err)
	}
	n := uint64(0)
	drop := func(t *tally, stored func(uint64) uint32, dec func(uint64) error) error {
		for b := uint64(0); b < t.n; b++ {
			have, want := stored(b), t.walked(b)
			if have > want {
				n++
			}
			for ; have > want; have-- {
				if err := dec(b); err != nil {
					return fmt.Errorf("repair leaks: %w", err)
				}
			}
		}
		return nil
	}
	m.mu.Lock()
	m.changed = true
	err = drop(&c.data, m.data.Count, m.data.Dec)
	if err == nil {
		err = drop(&c.meta, func(b uint64) uint32 { return m.meta.Count(block.Loc(b)) },
			func(b uint64) error { _, err := m.meta.Dec(block.Loc(b)); return err })
	}
	m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if _, err := m.Commit(nil); err != nil {
		return 0, fmt.Errorf("repair leaks: %w", err)
	}
	return n, nil
}

// keepOpen is a device that somebody else closes.
type keepOpen struct{ dev.Device }

func (keepOpen) Close() error { return nil }
