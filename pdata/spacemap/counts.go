// Package spacemap counts references to blocks and hands out free ones. The counts are arrays
// in memory, two bytes a block; at a commit the bitmaps that changed are written out.
//
// Counts holds what both maps share. Meta is the map of the metadata device, which stores
// itself; Data is the map of the data device.
package spacemap

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"mica/pdata/block"
)

// ErrNoSpace: there is no free block.
var ErrNoSpace = errors.New("no free block")

// States of a block, as bits. A block may be handed out only when none is set.
const (
	stMapped   = 1 << iota // count > 0
	stReserved             // handed out, nothing refers to it yet
	stFrozen               // freed, but the committed state or a reader may still use it
	stNew                  // went from free to counted in the open transaction: if freed in it, it is free at once
)

// big marks a count that does not fit a byte; the count is then in Counts.big.
const big = 255

// Counts is the part that both space maps share: reference counts and states of blocks, and
// what of them is not on the medium yet. It has no lock of its own.
type Counts struct {
	name      string            // "data" or "metadata", for errors
	st        []uint8           // state bits
	counts    []uint8           // reference counts, or big
	big       map[uint64]uint32 // counts of big and more
	mapped    uint64            // blocks with stMapped
	reserved  uint64            // blocks with stReserved
	frozen    uint64            // blocks with stFrozen
	newBlocks []uint64          // may have stNew
	freed     []uint64          // frozen in the open transaction

	dirtyBitmaps  map[uint64]struct{} // bitmaps that differ from the medium
	dirtyOverflow map[uint64]struct{} // blocks whose overflow entry may differ
	overflowed    uint64              // blocks with a count of 3 and more
	shared        uint64              // blocks with a count of 2 and more
}

func newCounts(name string) Counts {
	return Counts{name: name, big: map[uint64]uint32{},
		dirtyBitmaps: map[uint64]struct{}{}, dirtyOverflow: map[uint64]struct{}{}}
}

func (c *Counts) grow(n uint64) {
	c.st = append(c.st, make([]uint8, n-uint64(len(c.st)))...)
	c.counts = append(c.counts, make([]uint8, n-uint64(len(c.counts)))...)
}

// Len is the number of blocks that are counted.
func (c *Counts) Len() uint64 { return uint64(len(c.st)) }

// Free is the number of blocks that may be handed out now.
func (c *Counts) Free() uint64 { return c.Len() - c.mapped - c.reserved - c.frozen }

// Count is the number of references to b; 0 beyond the end.
func (c *Counts) Count(b uint64) uint32 {
	if b >= c.Len() {
		return 0
	}
	if n := c.counts[b]; n != big {
		return uint32(n)
	}
	return c.big[b]
}

func (c *Counts) set(b uint64, n uint32) {
	if n < big {
		if c.counts[b] == big {
			delete(c.big, b)
		}
		c.counts[b] = uint8(n)
	} else {
		c.counts[b] = big
		c.big[b] = n
	}
}

// load sets a count as it is on the medium.
func (c *Counts) load(b uint64, n uint32) {
	was := c.Count(b)
	c.set(b, n)
	if was == 0 && n > 0 {
		c.mapped++
		c.st[b] |= stMapped
	}
	c.census(was, n)
}

// census keeps the numbers of blocks with high counts.
func (c *Counts) census(was, n uint32) {
	if was < 3 && n >= 3 {
		c.overflowed++
	} else if was >= 3 && n < 3 {
		c.overflowed--
	}
	if was < 2 && n >= 2 {
		c.shared++
	} else if was >= 2 && n < 2 {
		c.shared--
	}
}

// change sets a count and notes what has to be written.
func (c *Counts) change(b uint64, was, n uint32) {
	c.set(b, n)
	if min(was, 3) != min(n, 3) {
		c.dirtyBitmaps[b/EntriesPerBitmap] = struct{}{}
	}
	if was >= 3 || n >= 3 {
		c.dirtyOverflow[b] = struct{}{}
	}
	c.census(was, n)
}

func (c *Counts) corrupt(b uint64, what string) error {
	return fmt.Errorf("%s block %d of %d: %s: %w", c.name, b, c.Len(), what, block.ErrCorrupt)
}

// Inc adds a reference. A reserved block gets its first one this way.
func (c *Counts) Inc(b uint64) error {
	if b >= c.Len() {
		return c.corrupt(b, "count raised beyond the end")
	}
	was := c.Count(b)
	if was == 1<<32-1 {
		return c.corrupt(b, "count does not fit 32 bits")
	}
	if was == 0 {
		if c.st[b]&stReserved == 0 {
			return c.corrupt(b, "count raised of a block that is not allocated")
		}
		c.st[b] = stMapped | stNew
		c.reserved--
		c.mapped++
		c.newBlocks = append(c.newBlocks, b)
	}
	c.change(b, was, was+1)
	return nil
}

// Dec drops a reference and returns what is left. A block whose last reference goes is frozen
// until its transaction is committed, unless nothing but this transaction ever knew it.
func (c *Counts) Dec(b uint64) (uint32, error) {
	was := c.Count(b)
	if was == 0 {
		return 0, c.corrupt(b, "count dropped below 0")
	}
	c.change(b, was, was-1)
	if was == 1 {
		c.mapped--
		if c.st[b]&stNew != 0 && c.name == metaName {
			c.st[b] = 0
		} else {
			c.st[b] = stFrozen
			c.frozen++
			c.freed = append(c.freed, b)
		}
	}
	return was - 1, nil
}

// closeTxn forgets what was new in the transaction and returns what it freed, in no order.
func (c *Counts) closeTxn() []uint64 {
	for _, b := range c.newBlocks {
		c.st[b] &^= stNew
	}
	c.newBlocks = c.newBlocks[:0]
	f := c.freed
	c.freed = nil
	return f
}

// thaw makes a frozen block free.
func (c *Counts) thaw(b uint64) {
	if c.st[b]&stFrozen != 0 {
		c.st[b] &^= stFrozen
		c.frozen--
	}
}

// nextFree returns the first free block in [from, to).
func (c *Counts) nextFree(from, to uint64) (uint64, bool) {
	if from >= to {
		return 0, false
	}
	i := bytes.IndexByte(c.st[from:to], 0)
	if i < 0 {
		return 0, false
	}
	return from + uint64(i), true
}

// runFree is the length of the run of free blocks at from, at most want.
func (c *Counts) runFree(from, want uint64) uint64 {
	n := uint64(0)
	for n < want && from+n < c.Len() && c.st[from+n] == 0 {
		n++
	}
	return n
}

func sortedKeys(m map[uint64]struct{}) []uint64 {
	k := make([]uint64, 0, len(m))
	for b := range m {
		k = append(k, b)
	}
	slices.Sort(k)
	return k
}
