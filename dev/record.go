package dev

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// A CrashLog records what happens to one or several devices, on one clock, and builds the
// images that a power cut at any moment may leave behind.
//
// The clock counts beginnings and ends of requests. A write is certain to survive a cut once a
// flush of its device that began after the write's end has itself ended before the cut. Of the
// other writes that began before the cut each may be kept, lost, or torn into units of which
// some are kept. Growth of a device is a write in this sense.
type CrashLog struct {
	clock *atomic.Int64

	mu   sync.Mutex
	recs [][]crashRec // guarded by mu, as is the rest; by device, beginnings rise
	base []*Mem       // contents when recording began
	ends []int        // clock at the end of each flush that succeeded
}

type crashKind uint8

const (
	crashWrite crashKind = iota
	crashFlush
	crashGrow
)

type crashRec struct {
	kind       crashKind
	whole      bool   // never torn
	lost       bool   // no later flush makes it certain
	begin, end int    // clock; end is 0 while in flight or if the request failed
	off, n     int64  // of growth: 0 and the new size
	data       []byte // nil for zeros
}

// NewCrashLog returns an empty log.
func NewCrashLog() *CrashLog { return NewCrashLogOn(new(atomic.Int64)) }

// NewCrashLogOn returns an empty log whose clock may be shared with another process.
func NewCrashLogOn(clock *atomic.Int64) *CrashLog { return &CrashLog{clock: clock} }

// Wrap begins to record d, whose present contents are taken as durable.
func (l *CrashLog) Wrap(d Device) (*Recorder, error) {
	base := NewMem(d.Size())
	if err := copyDevice(base, d); err != nil {
		return nil, err
	}
	return l.WrapOn(d, base), nil
}

// WrapOn is Wrap for a device whose contents are those of base, which the log clones.
func (l *CrashLog) WrapOn(d Device, base *Mem) *Recorder {
	return &Recorder{forward: forward{d}, log: l, id: l.add(base.Clone(), nil)}
}

func (l *CrashLog) add(base *Mem, recs []crashRec) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recs = append(l.recs, recs)
	l.base = append(l.base, base)
	return len(l.recs) - 1
}

// A CrashRecord is one request of a device that was recorded elsewhere, on the same clock. End is
// 0 if it did not succeed. Flush, or else Truncate (to N bytes), or else a write of Data at Off,
// which is never torn if it is Whole (a file that appears by a rename).
type CrashRecord struct {
	Begin, End      int
	Flush, Truncate bool
	Whole           bool
	Off, N          int64
	Data            []byte
}

// Load adds a device that was empty at first and recorded elsewhere. The Recorder serves to name
// it; it has no device. Shrinking is not followed.
func (l *CrashLog) Load(rs []CrashRecord) *Recorder {
	var recs []crashRec
	for _, r := range rs {
		c := crashRec{whole: r.Whole, begin: r.Begin, end: r.End, off: r.Off, n: int64(len(r.Data)), data: r.Data}
		switch {
		case r.Flush:
			c.kind = crashFlush
			if r.End != 0 {
				l.mu.Lock()
				l.ends = append(l.ends, r.End)
				l.mu.Unlock()
			}
		case r.Truncate:
			c.kind, c.off, c.n = crashGrow, 0, r.N
		}
		recs = append(recs, c)
	}
	slices.SortStableFunc(recs, func(a, b crashRec) int { return a.begin - b.begin })
	return &Recorder{log: l, id: l.add(NewMem(0), recs)}
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
func (l *CrashLog) Now() int { return int(l.clock.Add(1)) }

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
	r.begin = l.Now()
	l.recs[dev] = append(l.recs[dev], r)
	return len(l.recs[dev]) - 1
}

func (l *CrashLog) done(dev, i int, err error) {
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &l.recs[dev][i]
	r.end = l.Now()
	if r.kind == crashFlush {
		l.ends = append(l.ends, r.end)
	}
}

// A Recorder is a device whose requests go into a CrashLog on their way to the device below.
// Discards are recorded as writes of zeros, so a device below must do that (Mem and File do).
type Recorder struct {
	forward
	log *CrashLog
	id  int
}

// Forget makes what was written so far and is not certain yet be lost at any cut, or kept, as
// chance will have it, whatever is flushed later: what Linux does with dirty pages when a sync has
// failed.
func (r *Recorder) Forget() {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	durable := 0
	for _, f := range l.recs[r.id] {
		if f.kind == crashFlush && f.end != 0 {
			durable = max(durable, f.begin)
		}
	}
	for i := range l.recs[r.id] {
		if w := &l.recs[r.id][i]; w.end == 0 || w.end >= durable {
			w.lost = true
		}
	}
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
	i := r.log.begin(r.id, crashRec{kind: crashFlush})
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

// Resize records growth. Bytes that are cut off stay in the images.
func (r *Recorder) Resize(sizeBytes int64) error {
	if sizeBytes <= r.Size() {
		return r.forward.Resize(sizeBytes)
	}
	i := r.log.begin(r.id, crashRec{kind: crashGrow, n: sizeBytes})
	err := r.forward.Resize(sizeBytes)
	r.log.done(r.id, i, err)
	return err
}
