package user

import (
	"fmt"

	"mica/dev"
	"mica/thin"
)

// ReadAt reads mapped blocks from the data device, each contiguous run with one read, and the
// rest as zeros or from the external origin.
func (t *Thin) ReadAt(p []byte, off int64) (int, error) {
	n, end := dev.CheckRead(off, len(p), t.size.Load())
	if n == 0 {
		if end == nil && t.closed.Load() {
			end = dev.ErrClosed
		}
		return 0, end
	}
	token, err := t.enterRead()
	if err != nil {
		return 0, t.wrap("read", err)
	}
	defer t.d.r.exit(token)
	for done := 0; done < n; {
		c, err := t.readRun(p[done:n], off+int64(done))
		if err != nil {
			return done, fmt.Errorf("thin %d: read %d bytes at %d: %w", t.d.id, n, off, err)
		}
		done += c
	}
	return n, end
}

// readRun reads the first run of a range and returns its length. The caller holds a token.
func (t *Thin) readRun(p []byte, off int64) (int, error) {
	l, err := t.d.leafOf(thin.VBlock(off / t.bs))
	if err != nil {
		return 0, err
	}
	n, pos := t.runIn(l, off, int64(len(p)))
	if pos < 0 {
		return int(n), t.readOrigin(p[:n], off)
	}
	_, err = t.p.data.ReadAt(p[:n], pos)
	return int(n), err
}

// runIn returns the length of the run that begins at off, within one leaf, and its position on
// the data device, or -1 if it is not mapped.
func (t *Thin) runIn(l *leaf, off, want int64) (n, pos int64) {
	vb := uint64(off / t.bs)
	in := off - int64(vb)*t.bs
	i := vb % leafBlocks
	e := l.entries[i].Load()
	n = t.bs - in
	if e == absent {
		for i++; n < want && i < leafBlocks && l.entries[i].Load() == absent; i++ {
			n += t.bs
		}
		return min(n, want), -1
	}
	b := e / thin.MaxTime
	next := b + 1
	for i++; n < want && i < leafBlocks; i++ {
		if f := l.entries[i].Load(); f == absent || f/thin.MaxTime != next {
			break
		}
		n += t.bs
		next++
	}
	return min(n, want), int64(b)*t.bs + in
}

// TryReadAt reads if every block is mapped, or known not to be, without waiting for metadata.
func (t *Thin) TryReadAt(p []byte, off int64) error {
	if dev.CheckRange(off, int64(len(p)), t.size.Load()) != nil {
		return dev.ErrWouldBlock // ReadAt says what is wrong
	}
	token, ok := t.d.r.tryEnter()
	if !ok {
		return dev.ErrWouldBlock
	}
	defer t.d.r.exit(token)
	if t.closed.Load() {
		return dev.ErrWouldBlock
	}
	for len(p) > 0 {
		l := t.d.table.at(thin.VBlock(off / t.bs))
		if l == nil {
			return dev.ErrWouldBlock
		}
		n, pos := t.runIn(l, off, int64(len(p)))
		if pos < 0 {
			if t.originBytes(off) > 0 {
				return dev.ErrWouldBlock
			}
			clear(p[:n])
		} else if _, err := t.p.data.ReadAt(p[:n], pos); err != nil {
			return dev.ErrWouldBlock
		}
		p, off = p[n:], off+n
	}
	return nil
}

// extentsMax bounds the extents of one answer.
const extentsMax = 1024

// Extents tells mapped blocks from holes. A hole reads as zeros, or as the external origin.
func (t *Thin) Extents(off, n int64) ([]dev.Extent, error) {
	if err := dev.CheckRange(off, n, t.size.Load()); err != nil {
		return nil, t.wrap("extents", err)
	}
	token, err := t.enterRead()
	if err != nil {
		return nil, t.wrap("extents", err)
	}
	defer t.d.r.exit(token)
	var out []dev.Extent
	add := func(e dev.Extent) {
		if k := len(out); k > 0 && out[k-1].Hole == e.Hole && out[k-1].Zero == e.Zero {
			out[k-1].Len += e.Len
		} else {
			out = append(out, e)
		}
	}
	for n > 0 && len(out) < extentsMax {
		vb := thin.VBlock(off / t.bs)
		l, skip, err := t.d.leafOrHole(vb, thin.VBlock((off+n+t.bs-1)/t.bs))
		if err != nil {
			return nil, t.wrap("extents", err)
		}
		c, hole := min(n, int64(skip)*t.bs-off), true
		if l != nil {
			var pos int64
			c, pos = t.runIn(l, off, n)
			hole = pos < 0
		}
		if z := t.originBytes(off); hole && z > 0 {
			c = min(c, z)
			add(dev.Extent{Off: off, Len: c, Hole: true})
		} else {
			add(dev.Extent{Off: off, Len: c, Hole: hole, Zero: hole})
		}
		off, n = off+c, n-c
	}
	return out, nil
}

// leafOrHole returns the leaf of vb; or, if it is not in memory and vb is not mapped, a block up
// to which nothing is mapped, at most end. So a walk over a large empty device fills no leaves.
func (d *device) leafOrHole(vb, end thin.VBlock) (l *leaf, hole thin.VBlock, err error) {
	if l := d.table.at(vb); l != nil {
		return l, 0, nil
	}
	// The tree is right for leaves that are not in memory now; so memory is asked first.
	next := d.table.firstLeaf(vb, end)
	err = d.p.meta.LookupRange(d.id, vb, next, func(e thin.Entry) bool {
		next = e.VBlock
		return false
	})
	if err != nil {
		return nil, 0, fmt.Errorf("look up block %d: %w", vb, err)
	}
	if next > vb {
		return nil, next, nil
	}
	l, err = d.leafOf(vb)
	return l, 0, err
}
