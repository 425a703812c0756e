package user

import (
	"bytes"
	"sync"
	"sync/atomic"

	"mica/dev"
	"mica/thin"
)

// Which 4 KiB parts of a block are zero is remembered, so that a block whose parts have been
// zeroed one by one (small files that were deleted) can be unmapped. What is remembered is a
// hint, bounded in memory and dropped at will: before a block is unmapped, its content is read
// and compared (see unmapZero).
//
// A leaf in which something is remembered has a zeroDir. Writers that overwrite mapped blocks
// of such a leaf in place say so (enter, exit), so that a block is never unmapped under one.

const (
	partBytes = 4096
	// partsMaxBlock is the largest block whose parts are remembered, in bytes.
	partsMaxBlock = 4 << 20
	// partsMaxBytes bounds the memory of all maps of a pool.
	partsMaxBytes = 4 << 20
)

// A zeroMap has a bit for each part of one block that is zero, as far as is known.
type zeroMap struct {
	gone  atomic.Bool // dropped to save memory
	words []atomic.Uint64
}

// A zeroDir holds the maps of a leaf, and keeps unmapping and writing in place apart.
type zeroDir struct {
	writers   atomic.Int64
	unmapping atomic.Int64
	maps      [leafBlocks]atomic.Pointer[zeroMap]
}

// enter announces a write in place. False: a block is being unmapped, the write must take the
// block's stripe.
func (z *zeroDir) enter() bool {
	z.writers.Add(1)
	if z.unmapping.Load() != 0 {
		z.writers.Add(-1)
		return false
	}
	return true
}

func (z *zeroDir) exit() { z.writers.Add(-1) }

// zeroMaps bounds the maps of a pool: a new one pushes out the oldest.
type zeroMaps struct {
	parts int // of a block; 0: blocks are too large
	mu    sync.Mutex
	ring  []*zeroMap // guarded by mu
	next  int        // guarded by mu
}

func (m *zeroMaps) init(bs int64) {
	if bs <= partsMaxBlock {
		m.parts = int(bs / partBytes)
	}
}

func (m *zeroMaps) add(z *zeroMap) {
	limit := partsMaxBytes / (64 + 8*len(z.words))
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ring) < limit {
		m.ring = append(m.ring, z)
		return
	}
	if old := m.ring[m.next]; old != nil {
		old.gone.Store(true)
	}
	m.ring[m.next] = z
	m.next = (m.next + 1) % len(m.ring)
}

// newParts returns a map of a block of which bytes [lo, hi) are not zero, and the others are if
// zero is set; or nil if parts are not remembered here. With an external origin they are not:
// unmapping would show the origin.
func (t *Thin) newParts(zero bool, lo, hi int64) *zeroMap {
	n := t.p.zeroMaps.parts
	if n == 0 || t.origin != nil {
		return nil
	}
	z := &zeroMap{words: make([]atomic.Uint64, (n+63)/64)}
	if zero {
		z.set(0, lo)
		z.set(hi, t.bs)
	}
	return z
}

// set marks the parts that lie wholly in bytes [lo, hi).
func (z *zeroMap) set(lo, hi int64) {
	for i := (lo + partBytes - 1) / partBytes; i < hi/partBytes; i++ {
		z.words[i/64].Or(1 << (i % 64))
	}
}

// clear marks the parts that touch bytes [lo, hi) as not known to be zero.
func (z *zeroMap) clear(lo, hi int64) {
	for i := lo / partBytes; i < (hi+partBytes-1)/partBytes; i++ {
		if w := &z.words[i/64]; w.Load()&(1<<(i%64)) != 0 {
			w.And(^uint64(1 << (i % 64)))
		}
	}
}

// scan marks the parts of w, which lies at byte at of the block, that are zero.
func (z *zeroMap) scan(w []byte, at int64) {
	if z == nil {
		return
	}
	for i := int64(0); i+partBytes <= int64(len(w)); i += partBytes {
		if bytes.Equal(w[i:i+partBytes], zeroBuf[:partBytes]) {
			z.set(at+i, at+i+partBytes)
		}
	}
}

// full reports whether all n parts are marked.
func (z *zeroMap) full(n int) bool {
	for i := range z.words {
		want := ^uint64(0)
		if left := n - i*64; left < 64 {
			want = 1<<left - 1
		}
		if z.words[i].Load() != want {
			return false
		}
	}
	return true
}

// parts returns the map of a block, or nil.
func (l *leaf) parts(v thin.VBlock) *zeroMap {
	d := l.zero.Load()
	if d == nil {
		return nil
	}
	if z := d.maps[v%leafBlocks].Load(); z != nil && !z.gone.Load() {
		return z
	}
	return nil
}

// setParts replaces the map of a block. The caller holds its stripe.
func (l *leaf) setParts(v thin.VBlock, z *zeroMap) {
	d := l.zero.Load()
	if d == nil {
		if z == nil {
			return
		}
		l.zero.CompareAndSwap(nil, new(zeroDir))
		d = l.zero.Load()
	}
	d.maps[v%leafBlocks].Store(z)
	if z != nil {
		l.dev.p.zeroMaps.add(z)
	}
}

// clearParts notes that bytes [off, off+n) of the device, within one leaf, are written.
func (t *Thin) clearParts(d *zeroDir, off, n int64) {
	for n > 0 {
		v := off / t.bs
		in := off - v*t.bs
		c := min(n, t.bs-in)
		if z := d.maps[uint64(v)%leafBlocks].Load(); z != nil {
			z.clear(in, in+c)
		}
		off, n = off+c, n-c
	}
}

// noteZero notes that bytes [lo, hi) of block v, whose data block is b, have been zeroed. It
// reports whether all of the block may be zero now. The caller holds v's stripe.
func (t *Thin) noteZero(l *leaf, v thin.VBlock, b thin.DataBlock, lo, hi int64) bool {
	z := l.parts(v)
	if z == nil {
		if z = t.newParts(false, 0, 0); z == nil {
			return false
		}
		// What was never written may still be a hole of the data file.
		if x, ok := t.p.data.Device.(dev.Extenter); ok {
			pos := t.p.data.pos(b)
			if es, err := x.Extents(pos, t.bs); err == nil {
				for _, e := range es {
					if e.Zero {
						z.set(e.Off-pos, e.Off-pos+e.Len)
					}
				}
			}
		}
		l.setParts(v, z)
	}
	z.set(lo, hi)
	return z.full(t.p.zeroMaps.parts)
}

// A zeroBlock is a block that may be all zero, as a write-zeroes left it.
type zeroBlock struct {
	l *leaf
	v thin.VBlock
}

// unmapZero unmaps blocks that are all zero. The caller holds no token. What cannot be unmapped
// now stays mapped, and zero.
//
// Writers that found the leaf without a zeroDir are waited for; those that came later have
// entered it or wait for the block's stripe. So with no writer in it, nobody changes the block
// while it is compared and unmapped.
func (t *Thin) unmapZero(blocks []zeroBlock) {
	t.d.w.drain()
	token, err := t.enterWrite()
	if err != nil {
		return
	}
	defer t.d.w.exit(token)
	for _, b := range blocks {
		t.unmapOneZero(b.l, b.v)
	}
}

func (t *Thin) unmapOneZero(l *leaf, v thin.VBlock) {
	t.d.lockStripes(v, 1)
	defer t.d.unlockStripes(v, 1)
	dir, z := l.zero.Load(), l.parts(v)
	if z == nil || t.d.table.at(v) != l {
		return
	}
	dir.unmapping.Add(1)
	defer dir.unmapping.Add(-1)
	e := l.entries[v%leafBlocks].Load()
	if e == absent || dir.writers.Load() != 0 || !z.full(t.p.zeroMaps.parts) {
		return
	}
	if zero, err := t.p.isZeroBlock(thin.UnpackMapping(e).Block); err != nil || !zero {
		l.setParts(v, nil) // the hint was wrong
		return
	}
	if t.p.admit(1, true) != nil {
		return
	}
	if ok, _ := t.d.record(l, v, 1, absent); !ok {
		t.p.unadmit(1)
		return
	}
	l.setParts(v, nil)
}

// isZeroBlock reads a data block and reports whether it is all zeros.
func (p *Pool) isZeroBlock(b thin.DataBlock) (bool, error) {
	buf := p.copyBuffer()
	defer func() { p.copies <- buf }()
	for at := int64(0); at < p.bs; at += int64(len(buf)) {
		w := buf[:min(int64(len(buf)), p.bs-at)]
		if _, err := p.data.ReadAt(w, p.data.pos(b)+at); err != nil {
			return false, err
		}
		if !bytes.Equal(w, zeroBuf[:len(w)]) {
			return false, nil
		}
	}
	return true, nil
}
