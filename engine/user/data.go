package user

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"mica/dev"
	"mica/thin"
)

// data is the pool's data device: contents of data blocks, syncs, and what is known to be zero.
// Positions are bytes of the device.
type data struct {
	dev.Device
	fd      int   // of a file or a block device, or -1
	bs      int64 // bytes of a data block
	discard dev.Discarder
	zeroer  dev.Zeroer
	// punches: a discarded block reads as zeros.
	punches bool

	flushes atomic.Uint64
	syncs   syncs
	// dirty: something was written, or made a hole, that no sync which began later covers. Set
	// before a write is acknowledged. What an earlier opener left is not known.
	dirty atomic.Bool

	mu   sync.Mutex
	zero []uint64 // guarded by mu: one bit a block, see knownZero
}

func newData(d dev.Device, bs int64) *data {
	x := &data{Device: d, fd: -1, bs: bs}
	if f, ok := d.(dev.Descriptor); ok {
		x.fd = f.Descriptor()
	}
	x.syncs.cond.L = &x.syncs.mu
	x.dirty.Store(true)
	x.discard, _ = d.(dev.Discarder)
	x.zeroer, _ = d.(dev.Zeroer)
	if z, ok := d.(dev.DiscardZeroer); ok {
		x.punches = z.DiscardZeroes()
	}
	return x
}

// touched notes that there is something to sync.
func (x *data) touched() {
	if !x.dirty.Load() { // most often it is: no write to a line that all writers share
		x.dirty.Store(true)
	}
}

// WriteAt is that of the device.
func (x *data) WriteAt(p []byte, off int64) (int, error) {
	n, err := x.Device.WriteAt(p, off)
	x.touched()
	return n, err
}

func (x *data) pos(b thin.DataBlock) int64 { return int64(b) * x.bs }

// A block is known to be zero if it was a hole of the device when the pool was opened, or was
// punched since. The mark is taken away when the block is handed out, whether or not what it
// was handed out for succeeds.

// findZero marks the blocks from first to n that lie in holes.
func (x *data) findZero(first, n uint64) error {
	x.mu.Lock()
	for uint64(len(x.zero))*64 < n {
		x.zero = append(x.zero, 0)
	}
	x.mu.Unlock()
	e, ok := x.Device.(dev.Extenter)
	if !ok {
		return nil
	}
	end := int64(n) * x.bs
	for off := int64(first) * x.bs; off < end; {
		es, err := e.Extents(off, end-off)
		if errors.Is(err, dev.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for holes in the data device: %w", err)
		}
		for _, e := range es {
			if e.Hole && e.Zero {
				b := (e.Off + x.bs - 1) / x.bs
				x.setZero(thin.DataRun{Begin: thin.DataBlock(b), Len: uint64(max(0, (e.Off+e.Len)/x.bs-b))})
			}
			off = e.Off + e.Len
		}
	}
	return nil
}

func (x *data) setZero(r thin.DataRun) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for b := uint64(r.Begin); b < uint64(r.Begin)+r.Len; b++ {
		x.zero[b/64] |= 1 << (b % 64)
	}
}

// takeZero reports whether a block is known to be zero, and forgets it.
func (x *data) takeZero(b thin.DataBlock) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	w, bit := &x.zero[b/64], uint64(1)<<(b%64)
	was := *w&bit != 0
	*w &^= bit
	return was
}

// isZero reports whether a block is known to be zero.
func (x *data) isZero(b thin.DataBlock) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.zero[b/64]&(1<<(b%64)) != 0
}

// punch gives the contents of free blocks back to the host and reports whether it did. The
// blocks are out of everybody's reach.
func (x *data) punch(r thin.DataRun) bool {
	if x.discard != nil {
		err := x.discard.Discard(x.pos(r.Begin), int64(r.Len)*x.bs)
		x.touched() // a hole that does not outlive a power cut would show what was there
		if err == nil {
			if x.punches {
				x.setZero(r)
				return true
			}
			x.forgetZero(r)
			return true
		}
	}
	x.forgetZero(r)
	return false
}

func (x *data) forgetZero(r thin.DataRun) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for b := uint64(r.Begin); b < uint64(r.Begin)+r.Len; b++ {
		x.zero[b/64] &^= 1 << (b % 64)
	}
}

// writeZeros zeroes a range of mapped blocks, which stay allocated.
func (x *data) writeZeros(off, n int64) error {
	if n > int64(len(zeroBuf)) && x.zeroer != nil {
		err := x.zeroer.WriteZeroes(off, n, true)
		x.touched()
		if !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
	}
	for n > 0 {
		c := min(n, int64(len(zeroBuf)))
		if _, err := x.WriteAt(zeroBuf[:c], off); err != nil {
			return err
		}
		off, n = off+c, n-c
	}
	return nil
}

// syncs lets flushes share: a sync serves all who asked before it began.
type syncs struct {
	mu      sync.Mutex
	cond    sync.Cond
	running bool
	started uint64
	done    uint64 // all syncs up to this one have succeeded
	err     error  // of the one that failed: it is never tried again
}

// sync makes everything written before the call durable; it costs nothing if nothing was. Once it
// has failed it fails for ever: the kernel reports a lost write once and forgets it.
func (x *data) sync() error {
	s := &x.syncs
	s.mu.Lock()
	defer s.mu.Unlock()
	want := s.started + 1
	if !x.dirty.Load() {
		want-- // the last one that began covers all: it is done, or under way
	}
	for s.done < want {
		if s.err != nil {
			return s.err
		}
		if s.running {
			s.cond.Wait()
			continue
		}
		s.running = true
		s.started++
		n := s.started
		x.dirty.Store(false)
		s.mu.Unlock()
		x.flushes.Add(1)
		err := x.Device.Flush()
		s.mu.Lock()
		s.running = false
		if err != nil {
			s.err = fmt.Errorf("sync data device: %w", err)
		} else if s.err == nil {
			s.done = n
		}
		s.cond.Broadcast()
	}
	return nil
}
