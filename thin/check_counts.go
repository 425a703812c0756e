package thin

import "fmt"

// Bits of tally.st beside the two of the stored count.
const (
	stStored   = 3  // 0, 1, 2, or 3 for "3 or more"
	stOverSeen = 4  // has an overflow entry
	stOwned    = 8  // data: mapped at or after the device's last snapshot
	stUnknown  = 16 // its bitmap could not be read
)

// A tally holds, for the blocks of one space map, how often they are referred to and what the
// map says: two bytes a block, and more for counts above 254.
type tally struct {
	where string
	n     uint64
	seen  []uint8 // 255: in big
	big   map[uint64]uint32
	st    []uint8
}

func newTally(where string, n uint64) tally {
	return tally{where: where, n: n, seen: make([]uint8, n), big: map[uint64]uint32{}, st: make([]uint8, n)}
}

// ref counts a reference.
func (t *tally) ref(b uint64) {
	if t.seen[b] < 254 {
		t.seen[b]++
		return
	}
	if t.seen[b] == 254 {
		t.seen[b], t.big[b] = 255, 254
	}
	t.big[b]++
}

// walked is how often b was referred to.
func (t *tally) walked(b uint64) uint32 {
	if s := t.seen[b]; s != 255 {
		return uint32(s)
	}
	return t.big[b]
}

func (t *tally) used() uint64 {
	n := uint64(0)
	for _, s := range t.seen {
		if s != 0 {
			n++
		}
	}
	return n
}

// A diffRun gathers neighbouring blocks whose counts differ in the same way into one finding.
type diffRun struct {
	c         *checker
	t         *tally
	begin, n  uint64
	got, want uint32
}

func (r *diffRun) add(b uint64, got, want uint32) {
	if got == want || got > want && r.c.rep.Partial {
		return
	}
	if r.n > 0 && r.begin+r.n == b && r.got == got && r.want == want {
		r.n++
		return
	}
	r.flush()
	r.begin, r.n, r.got, r.want = b, 1, got, want
}

func (r *diffRun) flush() {
	if r.n == 0 {
		return
	}
	f := Finding{Severity: Fatal, Where: r.t.where, Keys: &Span{r.begin, r.begin + r.n},
		What: fmt.Sprintf("count %d, %d references", r.got, r.want)}
	if r.got > r.want {
		f.Severity = Leak
		if r.t.where == whereDataMap {
			r.c.rep.LeakedData += r.n
		} else {
			r.c.rep.LeakedMeta += r.n
		}
	}
	r.c.add(f)
	r.n = 0
}

// An overEntry is one entry of an overflow tree.
type overEntry struct {
	b     uint64
	count uint32
}

// overflow compares one overflow entry with its bitmap entry and with the walk.
func (c *checker) overflow(t *tally, at place, r *diffRun, e overEntry) {
	at = at.span(e.b, e.b+1)
	if e.b >= t.n {
		c.fatal(at, "count of a block that does not exist")
		return
	}
	st := &t.st[e.b]
	if *st&stUnknown == 0 && *st&stStored != 3 {
		c.fatal(at, "count %d, the bitmap says %d", e.count, *st&stStored)
	}
	if e.count < 3 {
		c.fatal(at, "count %d, an overflow count is at least 3", e.count)
	}
	*st |= stOverSeen
	if *st&stStored == 3 {
		r.add(e.b, e.count, t.walked(e.b))
	}
}

// compare reports the counts of the bitmaps that are not what the walk has counted. The
// overflow tree has been compared; whole says that all of it could be read.
func (c *checker) compare(t *tally, whole bool) {
	r := diffRun{c: c, t: t}
	for b := uint64(0); b < t.n; b++ {
		st := t.st[b]
		switch s := st & stStored; {
		case st&stUnknown != 0:
		case s != 3:
			if uint8(s) != t.seen[b] {
				r.add(b, uint32(s), t.walked(b))
			}
		case st&stOverSeen == 0 && whole:
			c.add(Finding{Severity: Fatal, Where: t.where, Keys: &Span{b, b + 1},
				What: fmt.Sprintf("the bitmap says 3 or more, there is no overflow entry (%d references)", t.walked(b))})
		}
	}
	r.flush()
}
