package journal

import (
	"cmp"
	"fmt"
	"slices"

	"mica/thin"
)

// content is what can be read from the bytes of a journal.
type content struct {
	header
	failed bool
	done   *State // the superblock that a reader's own commit was to write
	gens   []readGeneration
}

// A readGeneration is a generation with what could be read of it.
type readGeneration struct {
	number  uint64
	follows State
	toCome  *State
	written bool    // toCome is on the medium
	entries []Entry // in order
}

// readers know how to read journals, by version: this one, and the one before it.
var readers = map[uint32]func(b []byte) (*content, error){
	1: read1,
}

// read reads a journal of any known version. It trusts nothing.
func read(b []byte) (*content, error) {
	v, ok := isJournal(b)
	if !ok {
		return nil, fmt.Errorf("%d bytes that do not begin as a journal: %w", len(b), ErrDamaged)
	}
	r := readers[v]
	if r == nil {
		return nil, fmt.Errorf("version %d, this build reads %d: %w", v, version, ErrVersion)
	}
	return r(b)
}

func read1(b []byte) (*content, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return nil, err
	}
	if h.size != int64(len(b)) {
		return nil, fmt.Errorf("file of %d bytes, its header says %d: %w", len(b), h.size, ErrDamaged)
	}
	c := &content{header: h, failed: order.Uint64(b[failedAt:]) != 0}
	if _, s, ok := readRecord(b[doneAt:], markDone); ok {
		c.done = &s
	}
	for area := uint64(0); area < 2; area++ {
		page := b[generationAt+area*pageBytes:]
		number, follows, ok := readRecord(page, markFollows)
		if !ok || number%2 != area {
			continue
		}
		g := readGeneration{number: number, follows: follows}
		if n, s, ok := readRecord(page[toComeAt:], markToCome); ok && n == number {
			g.toCome = &s
			g.written = order.Uint64(page[writtenAt:]) == number
		}
		g.entries = readArea(b, number)
		c.gens = append(c.gens, g)
	}
	slices.SortFunc(c.gens, func(a, b readGeneration) int { return cmp.Compare(a.number, b.number) })
	// The record of the older generation is needed for its number only.
	if len(c.gens) == 1 && c.gens[0].number > 1 {
		g := readGeneration{number: c.gens[0].number - 1}
		g.entries = readArea(b, g.number)
		c.gens = []readGeneration{g, c.gens[0]}
	}
	return c, nil
}

// readArea returns the valid slots of a generation.
func readArea(b []byte, number uint64) []Entry {
	n := slotsPer(int64(len(b)))
	slots := b[slotsAt+number%2*n*slotBytes:][:n*slotBytes]
	var out []Entry
	for i := uint64(0); i < n; i++ {
		if e, ok := readSlot(slots[i*slotBytes:][:slotBytes], number, i); ok {
			out = append(out, e)
		}
	}
	return out
}

// choose returns the entries that a pool lacks whose superblock on the medium is the one named by
// disk, in order. why is not empty if there are entries and nobody can say whether the pool has
// them; lost is how many.
func (c *content) choose(disk State) (entries []Entry, lost int, why string) {
	n := len(c.gens)
	if n == 0 {
		return nil, 0, "neither of its generations can be read"
	}
	for _, g := range c.gens {
		lost += len(g.entries)
	}
	if lost == 0 || c.done != nil && *c.done == disk {
		return nil, 0, ""
	}
	newest := c.gens[n-1]
	both := newest.entries
	if n > 1 && c.gens[n-2].number == newest.number-1 {
		both = append(slices.Clip(c.gens[n-2].entries), newest.entries...)
	}
	switch {
	case c.failed:
		return nil, lost, "the pool had failed: what it acknowledged since its last commit is as after power loss"
	case newest.follows == disk && !newest.written: // asked first: what is the same as before and after is taken in full
		return both, 0, ""
	case newest.toCome != nil && *newest.toCome == disk:
		return newest.entries, 0, ""
	}
	return nil, lost, fmt.Sprintf("the pool is not as its last opener left it: it has %v; the journal follows %v", disk, newest.follows)
}

// A Change is what became of one virtual block.
type Change struct {
	VBlock  thin.VBlock
	Block   thin.DataBlock
	Removed bool
}

// Fold reduces entries to the last change of each block. fn gets them by device and, within a
// device, in ascending order: those of one group of GroupBlocks at a time. The slice is fn's until
// it returns. entries are reordered.
func Fold(entries []Entry, fn func(id thin.DevID, changes []Change) error) error {
	group := func(e Entry) thin.VBlock { return e.VBlock / GroupBlocks }
	slices.SortStableFunc(entries, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(group(a), group(b)))
	})
	var last [GroupBlocks]Change
	var is [GroupBlocks]bool
	out := make([]Change, 0, GroupBlocks)
	for i := 0; i < len(entries); {
		first := entries[i]
		is = [GroupBlocks]bool{}
		for ; i < len(entries) && entries[i].ID == first.ID && group(entries[i]) == group(first); i++ {
			e := entries[i]
			for k := uint64(0); k < e.Len; k++ {
				at := uint64(e.VBlock)%GroupBlocks + k
				is[at] = true
				last[at] = Change{VBlock: e.VBlock + thin.VBlock(k), Removed: e.Removed}
				if !e.Removed {
					last[at].Block = e.Block + thin.DataBlock(k)
				}
			}
		}
		out = out[:0]
		for at := range last {
			if is[at] {
				out = append(out, last[at])
			}
		}
		if err := fn(first.ID, out); err != nil {
			return err
		}
	}
	return nil
}
