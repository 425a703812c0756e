package dev

import (
	"fmt"
	"math/rand/v2"
	"sync"
)

// A CrashLog records what happens to one or several devices, on one clock, and builds the
// images that a power cut at any moment may leave behind.
//
// The clock counts beginnings and ends of requests. A write is certain to survive a cut once a
// flush of its device that began after the write's end has itself ended before the cut. Of the
// other writes that began before the cut each may be kept, lost, or torn into units of which
// some are kept.
type CrashLog struct {
	mu    sync.Mutex
	clock int          // guarded by mu, as is the rest
	recs  [][]crashRec // by device
	base  []*Mem       // contents when recording began
	size  []int64      // present sizes
	ends  []int        // clock at the end of each flush that succeeded
}

type crashRec struct {
	flush      bool
	begin, end int    // clock; end is 0 while in flight or if the request failed
	off, n     int64  //
	data       []byte // nil for zeros
}

// NewCrashLog returns an empty log.
func NewCrashLog() *CrashLog { return &CrashLog{} }

// Wrap begins to record d, whose present contents are taken as durable.
func (l *CrashLog) Wrap(d Device) (*Recorder, error) {
	base := NewMem(d.Size())
	if err := copyDevice(base, d); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recs = append(l.recs, nil)
	l.base = append(l.base, base)
	l.size = append(l.size, d.Size())
	return &Recorder{forward: forward{d}, log: l, id: len(l.recs) - 1}, nil
}

func copyDevice(dst *Mem, src Device) error {
	if m, ok := src.(*Mem); ok {
		c := m.Clone()
		dst.data = c.data
		return nil
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < src.Size(); {
		p := buf[:min(int64(len(buf)), src.Size()-off)]
		if _, err := src.ReadAt(p, off); err != nil {
			return fmt.Errorf("copy device: %w", err)
		}
		for i := 0; i < len(p); i += memChunk {
			c := p[i:min(i+memChunk, len(p))]
			if allZero(c) {
				continue
			}
			if _, err := dst.WriteAt(c, off+int64(i)); err != nil {
				return err
			}
		}
		off += int64(len(p))
	}
	return nil
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// Now returns the clock: everything acknowledged before the call has a smaller time.
func (l *CrashLog) Now() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	return l.clock
}

// FlushEnds returns the times just after each flush that succeeded, of any device.
func (l *CrashLog) FlushEnds() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]int(nil), l.ends...)
}

func (l *CrashLog) begin(dev int, r crashRec) int {
	if r.data != nil {
		r.data = append([]byte(nil), r.data...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	r.begin = l.clock
	l.recs[dev] = append(l.recs[dev], r)
	return len(l.recs[dev]) - 1
}

func (l *CrashLog) done(dev, i int, err error) {
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	l.recs[dev][i].end = l.clock
	if l.recs[dev][i].flush {
		l.ends = append(l.ends, l.clock)
	}
}

// A CrashMode says what becomes of writes that no flush covers.
type CrashMode int

const (
	CrashKeep   CrashMode = iota // all kept
	CrashLose                    // all lost
	CrashRandom                  // each kept or lost by chance, which also reorders them
	CrashTorn                    // each unit of each write kept or lost by chance
)

func (m CrashMode) String() string {
	return [...]string{"keep", "lose", "random", "torn"}[m]
}

// Image builds the contents of r's device as a power cut at time cut may leave them. gran is
// the unit, in bytes, that the medium writes as a whole (CrashTorn); rng decides what is kept.
func (l *CrashLog) Image(r *Recorder, cut int, mode CrashMode, gran int64, rng *rand.Rand) *Mem {
	l.mu.Lock()
	recs, size := l.recs[r.id], l.size[r.id]
	base := l.base[r.id]
	l.mu.Unlock()
	m := base.Clone()
	if size > m.size {
		m.size = size // growth is durable at once; new bytes are zero until written
	}
	// durableBefore: writes that ended before this time are certain.
	durableBefore := 0
	for _, f := range recs {
		if f.flush && f.end != 0 && f.end <= cut {
			durableBefore = max(durableBefore, f.begin)
		}
	}
	for _, w := range recs {
		if w.flush || w.begin > cut {
			continue
		}
		certain := w.end != 0 && w.end < durableBefore
		switch {
		case certain || mode == CrashKeep:
			w.apply(m, 0, w.n)
		case mode == CrashLose:
		case mode == CrashRandom:
			if rng.IntN(2) == 0 {
				w.apply(m, 0, w.n)
			}
		case mode == CrashTorn:
			for o := int64(0); o < w.n; {
				c := min(gran-(w.off+o)%gran, w.n-o)
				if rng.IntN(2) == 0 {
					w.apply(m, o, c)
				}
				o += c
			}
		}
	}
	return m
}

func (w *crashRec) apply(m *Mem, o, n int64) {
	var err error
	if w.data == nil {
		err = m.WriteZeroes(w.off+o, n, false)
	} else {
		_, err = m.WriteAt(w.data[o:o+n], w.off+o)
	}
	if err != nil {
		panic(fmt.Sprintf("crash image: %v", err))
	}
}

// A Recorder is a device whose requests go into a CrashLog on their way to the device below.
// Discards are recorded as writes of zeros, so a device below must do that (Mem and File do).
type Recorder struct {
	forward
	log *CrashLog
	id  int
}

func (r *Recorder) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, int64(len(p)), r.Size()); err != nil {
		return 0, fmt.Errorf("write: %w", err)
	}
	if len(p) == 0 {
		return r.Device.WriteAt(p, off)
	}
	i := r.log.begin(r.id, crashRec{off: off, n: int64(len(p)), data: p})
	n, err := r.Device.WriteAt(p, off)
	r.log.done(r.id, i, err)
	return n, err
}

func (r *Recorder) Flush() error {
	i := r.log.begin(r.id, crashRec{flush: true})
	err := r.Device.Flush()
	r.log.done(r.id, i, err)
	return err
}

func (r *Recorder) zero(off, n int64, do func() error) error {
	if err := CheckRange(off, n, r.Size()); err != nil {
		return fmt.Errorf("write zeroes: %w", err)
	}
	i := r.log.begin(r.id, crashRec{off: off, n: n})
	err := do()
	r.log.done(r.id, i, err)
	return err
}

func (r *Recorder) Discard(off, n int64) error {
	return r.zero(off, n, func() error { return r.forward.Discard(off, n) })
}

func (r *Recorder) WriteZeroes(off, n int64, keepAllocated bool) error {
	return r.zero(off, n, func() error { return r.forward.WriteZeroes(off, n, keepAllocated) })
}

func (r *Recorder) Resize(sizeBytes int64) error {
	if err := r.forward.Resize(sizeBytes); err != nil {
		return err
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	r.log.size[r.id] = max(r.log.size[r.id], sizeBytes)
	return nil
}
