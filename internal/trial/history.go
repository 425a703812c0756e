package trial

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"

	"mica/engine"
	"mica/thin"
)

// A version is one change of a sector.
type version struct {
	stamp uint64
	begin int // clock
	end   int // clock when it was acknowledged; 0: it was not
}

// A span is a request's time. end is 0 if it did not succeed.
type span struct{ begin, end int }

// A Device is one thin device from its creation to its deletion, and what each of its sectors may
// hold. Each sector is changed by one worker.
type Device struct {
	ID     thin.DevID
	slot   int
	serial uint64

	mu       sync.Mutex
	sectors  [][]version // guarded by mu, as is the rest
	base     []uint64    // contents at the creation
	void     []uint64    // what an unmapped sector shows; nil: zeros
	flushes  []span
	created  span
	deleted  span
	number   uint64  // of writes
	reverted bool    // reopened in a failed pool: what was not durable may be gone
	maybe    bool    // the creation failed: it may be there
	madeFrom *Device // of such a device
	h        engine.Thin
}

func stampOf(serial uint64, sector int64, number uint64) uint64 {
	return serial<<48 | uint64(sector)<<28 | number
}

func describe(stamp uint64) string {
	if stamp == 0 {
		return "zeros"
	}
	return fmt.Sprintf("device #%d, sector %d, write %d", stamp>>48, stamp>>28&(1<<20-1), stamp&(1<<28-1))
}

// fillStamp fills a sector.
func fillStamp(b []byte, stamp uint64) {
	binary.LittleEndian.PutUint64(b, stamp)
	for n := 8; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

// readStamp reads a sector's stamp; ok is false if the sector does not hold one alone.
func readStamp(b []byte) (stamp uint64, ok bool) {
	return binary.LittleEndian.Uint64(b), bytes.Equal(b[:SectorBytes-8], b[8:SectorBytes])
}

// begin adds a version to sectors [off, off+n) and returns the number of its write.
func (d *Device) begin(off, n int64, now int, stamp func(sector int64, number uint64) uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.number++
	for s := off; s < off+n; s++ {
		d.sectors[s] = append(d.sectors[s], version{stamp(s, d.number), now, 0})
	}
}

// done notes that the last version of the sectors was acknowledged.
func (d *Device) done(off, n int64, now int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := off; s < off+n; s++ {
		d.sectors[s][len(d.sectors[s])-1].end = now
	}
}

func (d *Device) flushed(f span) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes = append(d.flushes, f)
}

func (d *Device) handle() engine.Thin {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.h
}

func (d *Device) setHandle(h engine.Thin) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.h = h
}

func (d *Device) voidAt(s int64) uint64 {
	if d.void == nil {
		return 0
	}
	return d.void[s]
}

// durableBefore returns the time before which acknowledged writes must survive a cut.
func (d *Device) durableBefore(cut int) int {
	t := 0
	for _, f := range d.flushes {
		if f.end != 0 && f.end <= cut {
			t = max(t, f.begin)
		}
	}
	return t
}

func (d *Device) revert() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reverted = true
}

// liveSure is the time before which acknowledged writes must be seen in the running pool.
func (d *Device) liveSure(now int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reverted {
		return d.durableBefore(now)
	}
	return now
}

// may reports whether a sector may hold a stamp: of the versions begun by cut, the last one
// acknowledged before time sure, or a later one.
func (d *Device) may(s int64, stamp uint64, sure, cut int) bool {
	vs := d.sectors[s]
	for i := len(vs) - 1; i >= 0; i-- {
		if vs[i].begin > cut {
			continue
		}
		if vs[i].stamp == stamp {
			return true
		}
		if vs[i].end != 0 && vs[i].end < sure {
			return false
		}
	}
	return stamp == d.base[s]
}

// ever reports whether a sector may have held a stamp at any time.
func (d *Device) ever(s int64, stamp uint64) bool {
	if stamp == d.base[s] || stamp == d.voidAt(s) {
		return true
	}
	for _, v := range d.sectors[s] {
		if v.stamp == stamp {
			return true
		}
	}
	return d.madeFrom != nil && d.madeFrom != d && d.madeFrom.ever(s, stamp)
}

// wrong says how a sector contradicts the history.
func (d *Device) wrong(s int64, b []byte, sure, cut int) error {
	got, whole := readStamp(b)
	if !whole {
		other := got
		for j := 8; j < SectorBytes; j += 8 {
			if v := binary.LittleEndian.Uint64(b[j:]); v != got {
				other = v
				break
			}
		}
		return fmt.Errorf("thin %d (#%d), sector %d is torn: %s and %s", d.ID, d.serial, s, describe(got), describe(other))
	}
	vs := d.sectors[s]
	last, n := d.base[s], 0
	for _, v := range vs {
		if v.end != 0 && v.end < sure {
			last, n = v.stamp, n+1
		}
	}
	return fmt.Errorf("thin %d (#%d), sector %d holds %s, want %s (%d of its %d versions are durable) or a later one",
		d.ID, d.serial, s, describe(got), describe(last), n, len(vs))
}

// check judges sectors from first on by what a device returned. Times as in may; deleting: the
// device may have lost blocks.
func (d *Device) check(p []byte, first int64, sure, cut int, deleting bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := int64(0); i < int64(len(p))/SectorBytes; i++ {
		s, b := first+i, p[i*SectorBytes:(i+1)*SectorBytes]
		stamp, whole := readStamp(b)
		if !whole {
			return d.wrong(s, b, sure, cut)
		}
		switch {
		case d.maybe && d.ever(s, stamp):
		case deleting && stamp == d.voidAt(s):
		case d.may(s, stamp, sure, cut):
		default:
			return d.wrong(s, b, sure, cut)
		}
	}
	return nil
}

// peeked judges what was read while the device may have been changed: each sector must be whole
// and hold what it held at some time.
func (d *Device) peeked(p []byte, first int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := int64(0); i < int64(len(p))/SectorBytes; i++ {
		s, b := first+i, p[i*SectorBytes:(i+1)*SectorBytes]
		if stamp, whole := readStamp(b); !whole || !d.ever(s, stamp) {
			return d.wrong(s, b, 0, 0)
		}
	}
	return nil
}
