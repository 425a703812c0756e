package dev

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

// A CrashMode says what becomes of writes that no flush covers.
type CrashMode int

const (
	CrashKeep   CrashMode = iota // all kept
	CrashLose                    // all lost
	CrashRandom                  // each kept or lost by chance, which also reorders them
	CrashTorn                    // each unit of each write kept or lost by chance
	CrashPrefix                  // those begun before a random moment kept, later ones lost
	CrashDrop                    // all kept but one
	CrashOnly                    // all lost but one
	crashModes
)

func (m CrashMode) String() string {
	return [...]string{"keep", "lose", "random", "torn", "prefix", "drop one", "only one"}[m]
}

// AnyCrashMode picks a mode by chance, the random ones more often: they have more outcomes.
func AnyCrashMode(rng *rand.Rand) CrashMode {
	modes := [...]CrashMode{CrashKeep, CrashLose, CrashRandom, CrashRandom, CrashTorn, CrashTorn, CrashPrefix, CrashPrefix, CrashDrop, CrashOnly}
	return modes[rng.IntN(len(modes))]
}

// Unit512 and Unit4096 are media that write 512 or 4096 bytes as a whole. UnitMetadata is the
// medium that the pool's format asks for: 4096 bytes, of the superblock 512.
func Unit512(int64) int64  { return 512 }
func Unit4096(int64) int64 { return 4096 }
func UnitMetadata(off int64) int64 {
	if off < 4096 {
		return 512
	}
	return 4096
}

// A CrashCursor builds the images of many cuts in rising order. What is certain at a cut is kept
// from one to the next, so that an image costs what is not certain, and what is written to it.
// Not safe for concurrent use; several cursors of one log are.
type CrashCursor struct {
	log  *CrashLog
	cut  int
	devs []crashState
}

type crashState struct {
	recs    []crashRec // as of the making of the cursor
	flushes []crashSpan
	sure    *Mem // everything certain
	next    int  // first record that begins after the cut
	flushed int  // first flush that ends after the cut
	durable int  // writes that ended before this time are certain
	pending []pendingRec
}

type crashSpan struct{ begin, end int }

// A pendingRec is a write that is not certain. over are certain writes begun after it to the same
// bytes: they lie over it if it is kept.
type pendingRec struct {
	r    *crashRec
	over []*crashRec
}

// Cursor returns a cursor at time 0 over what has been recorded so far.
func (l *CrashLog) Cursor() *CrashCursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &CrashCursor{log: l, devs: make([]crashState, len(l.recs))}
	for i := range c.devs {
		s := &c.devs[i]
		s.recs = slices.Clone(l.recs[i])
		s.sure = l.base[i].Clone()
		for _, r := range s.recs {
			if r.kind == crashFlush && r.end != 0 {
				s.flushes = append(s.flushes, crashSpan{r.begin, r.end})
			}
		}
		slices.SortFunc(s.flushes, func(a, b crashSpan) int { return a.end - b.end })
	}
	return c
}

// Seek goes on to a cut that is not before the last one.
func (c *CrashCursor) Seek(cut int) {
	if cut < c.cut {
		panic(fmt.Sprintf("crash cursor: seek back from %d to %d", c.cut, cut))
	}
	c.cut = cut
	for i := range c.devs {
		c.devs[i].seek(cut)
	}
}

func (s *crashState) seek(cut int) {
	for ; s.flushed < len(s.flushes) && s.flushes[s.flushed].end <= cut; s.flushed++ {
		s.durable = max(s.durable, s.flushes[s.flushed].begin)
	}
	for ; s.next < len(s.recs) && s.recs[s.next].begin <= cut; s.next++ {
		if s.recs[s.next].kind != crashFlush {
			s.pending = append(s.pending, pendingRec{r: &s.recs[s.next]})
		}
	}
	left := s.pending[:0]
	for _, p := range s.pending {
		if p.r.end == 0 || p.r.end >= s.durable || p.r.lost {
			left = append(left, p)
			continue
		}
		p.r.apply(s.sure, 0, p.r.n)
		for _, o := range p.over {
			o.overlay(s.sure, p.r)
		}
		for k := range left {
			if left[k].r.overlaps(p.r) {
				left[k].over = append(left[k].over, p.r)
			}
		}
	}
	clear(s.pending[len(left):])
	s.pending = left
}

// Pending counts the writes to r that are not certain at the cut.
func (c *CrashCursor) Pending(r *Recorder) int { return len(c.devs[r.id].pending) }

// Image builds the contents of r's device as a power cut now may leave them. unit says how many
// bytes at an offset the medium writes as a whole (CrashTorn); rng decides what is kept.
func (c *CrashCursor) Image(r *Recorder, mode CrashMode, unit func(off int64) int64, rng *rand.Rand) *Mem {
	s := &c.devs[r.id]
	m := s.sure.Clone()
	one := 0
	if n := len(s.pending); n > 0 {
		one = rng.IntN(n)
	}
	for i, p := range s.pending {
		keep := false
		switch mode {
		case CrashKeep:
			keep = true
		case CrashRandom:
			keep = rng.IntN(2) == 0
		case CrashPrefix:
			keep = i < one
		case CrashDrop:
			keep = i != one
		case CrashOnly:
			keep = i == one
		case CrashTorn:
			p.r.tear(m, unit, rng)
		}
		if keep {
			p.r.apply(m, 0, p.r.n)
		}
		if keep || mode == CrashTorn {
			for _, o := range p.over {
				o.overlay(m, p.r)
			}
		}
	}
	return m
}

// Image is that of a cursor at one cut. gran is the unit of the whole device.
func (l *CrashLog) Image(r *Recorder, cut int, mode CrashMode, gran int64, rng *rand.Rand) *Mem {
	c := l.Cursor()
	c.Seek(cut)
	return c.Image(r, mode, func(int64) int64 { return gran }, rng)
}

// apply does bytes [o, o+n) of a write. Growth lasts if a write beyond it does.
func (w *crashRec) apply(m *Mem, o, n int64) {
	var err error
	if end := w.off + o + n; end > m.size {
		m.size = end
	}
	switch {
	case w.kind == crashGrow:
	case w.data == nil:
		err = m.WriteZeroes(w.off+o, n, false)
	default:
		_, err = m.WriteAt(w.data[o:o+n], w.off+o)
	}
	if err != nil {
		panic(fmt.Sprintf("crash image: %v", err))
	}
}

// tear does some units of a write.
func (w *crashRec) tear(m *Mem, unit func(off int64) int64, rng *rand.Rand) {
	if w.kind == crashGrow || w.whole {
		if rng.IntN(2) == 0 {
			w.apply(m, 0, w.n)
		}
		return
	}
	for o := int64(0); o < w.n; {
		u := unit(w.off + o)
		c := min(u-(w.off+o)%u, w.n-o)
		if rng.IntN(2) == 0 {
			w.apply(m, o, c)
		}
		o += c
	}
}

func (w *crashRec) overlaps(o *crashRec) bool {
	return w.kind == crashWrite && o.kind == crashWrite && w.off < o.off+o.n && o.off < w.off+w.n
}

// overlay repeats the part of a write that lies over w.
func (o *crashRec) overlay(m *Mem, w *crashRec) {
	lo, hi := max(o.off, w.off), min(o.off+o.n, w.off+w.n)
	o.apply(m, lo-o.off, hi-lo)
}
