package dev

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
)

// memChunk is the unit in which a Mem allocates, in bytes.
const memChunk = 4096

// A Mem is a device in memory, sparse in units of 4 KiB. Flush does nothing: everything
// survives until the process ends.
//
// It accepts any offset and length, discards and writes zeros (both free whole chunks), tells
// holes from data and can be resized. Safe for concurrent use.
type Mem struct {
	busy inflight
	mu   sync.RWMutex // size and the map; contents of a chunk are guarded by its own lock
	size int64
	data map[int64]*memBlock // by chunk number
}

type memBlock struct {
	mu sync.RWMutex
	// shared: a clone has this block too, and nobody writes it any more. Set under mu, never
	// cleared.
	shared atomic.Bool
	b      [memChunk]byte
}

// NewMem returns a device of sizeBytes zero bytes.
func NewMem(sizeBytes int64) *Mem {
	return &Mem{size: sizeBytes, data: map[int64]*memBlock{}}
}

// Clone returns an independent copy of what m holds now. Chunks are shared until one of the two
// changes them, so a clone costs little more than its map.
func (m *Mem) Clone() *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, b := range m.data {
		if !b.shared.Load() {
			b.mu.Lock() // a write of this chunk is over, or will find the mark
			b.shared.Store(true)
			b.mu.Unlock()
		}
	}
	return &Mem{size: m.size, data: maps.Clone(m.data)}
}

func (m *Mem) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.size
}

func (m *Mem) chunk(i int64) *memBlock {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.data[i]
}

// change calls fn with the bytes of chunk i, which is allocated if it must be and made m's own if
// a clone has it too.
func (m *Mem) change(i int64, fn func(b *[memChunk]byte)) {
	for {
		b := m.chunk(i)
		if b != nil {
			b.mu.Lock()
			if !b.shared.Load() {
				fn(&b.b)
				b.mu.Unlock()
				return
			}
			b.mu.Unlock()
		}
		m.mu.Lock()
		if m.data[i] == b { // else somebody was quicker
			own := new(memBlock)
			if b != nil {
				own.b = b.b
			}
			m.data[i] = own
		}
		m.mu.Unlock()
	}
}

func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	if !m.busy.enter() {
		return 0, ErrClosed
	}
	defer m.busy.leave()
	n, end := CheckRead(off, len(p), m.Size())
	p = p[:n]
	for len(p) > 0 {
		in := off % memChunk
		c := min(int64(len(p)), memChunk-in)
		if b := m.chunk(off / memChunk); b != nil {
			b.mu.RLock()
			copy(p[:c], b.b[in:])
			b.mu.RUnlock()
		} else {
			clear(p[:c])
		}
		p, off = p[c:], off+c
	}
	return n, end
}

func (m *Mem) WriteAt(p []byte, off int64) (int, error) {
	if !m.busy.enter() {
		return 0, ErrClosed
	}
	defer m.busy.leave()
	if err := CheckRange(off, int64(len(p)), m.Size()); err != nil {
		return 0, fmt.Errorf("write: %w", err)
	}
	n := len(p)
	for len(p) > 0 {
		in := off % memChunk
		c := min(int64(len(p)), memChunk-in)
		m.change(off/memChunk, func(b *[memChunk]byte) { copy(b[in:], p[:c]) })
		p, off = p[c:], off+c
	}
	return n, nil
}

func (m *Mem) Flush() error {
	if !m.busy.enter() {
		return ErrClosed
	}
	m.busy.leave()
	return nil
}

// Discard makes the range read as zeros.
func (m *Mem) Discard(off, n int64) error { return m.WriteZeroes(off, n, false) }

// DiscardZeroes is true.
func (m *Mem) DiscardZeroes() bool { return true }

func (m *Mem) WriteZeroes(off, n int64, keepAllocated bool) error {
	if !m.busy.enter() {
		return ErrClosed
	}
	defer m.busy.leave()
	if err := CheckRange(off, n, m.Size()); err != nil {
		return fmt.Errorf("write zeroes: %w", err)
	}
	for n > 0 {
		in := off % memChunk
		c := min(n, memChunk-in)
		i := off / memChunk
		switch {
		case c == memChunk && !keepAllocated:
			m.mu.Lock()
			delete(m.data, i)
			m.mu.Unlock()
		case keepAllocated || m.chunk(i) != nil:
			m.change(i, func(b *[memChunk]byte) { clear(b[in : in+c]) })
		}
		off, n = off+c, n-c
	}
	return nil
}

func (m *Mem) Extents(off, n int64) ([]Extent, error) {
	if !m.busy.enter() {
		return nil, ErrClosed
	}
	defer m.busy.leave()
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := CheckRange(off, n, m.size); err != nil {
		return nil, fmt.Errorf("extents: %w", err)
	}
	var out []Extent
	for n > 0 {
		c := min(n, memChunk-off%memChunk)
		_, data := m.data[off/memChunk]
		if k := len(out); k > 0 && out[k-1].Hole != data {
			out[k-1].Len += c
		} else {
			out = append(out, Extent{Off: off, Len: c, Hole: !data, Zero: !data})
		}
		off, n = off+c, n-c
	}
	return out, nil
}

// Resize changes the length. Bytes added read as zeros.
func (m *Mem) Resize(sizeBytes int64) error {
	if sizeBytes < 0 {
		return fmt.Errorf("resize to %d bytes: %w", sizeBytes, ErrOutOfRange)
	}
	if !m.busy.enter() {
		return ErrClosed
	}
	defer m.busy.leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, b := range m.data {
		switch {
		case i*memChunk >= sizeBytes:
			delete(m.data, i)
		case (i+1)*memChunk > sizeBytes:
			own := new(memBlock)
			b.mu.RLock()
			copy(own.b[:], b.b[:sizeBytes-i*memChunk])
			b.mu.RUnlock()
			m.data[i] = own
		}
	}
	m.size = sizeBytes
	return nil
}

// HostBytes counts the chunks that are allocated.
func (m *Mem) HostBytes() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.data)) * memChunk, nil
}

func (m *Mem) Close() error {
	m.busy.close()
	return nil
}
