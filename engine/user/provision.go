package user

import (
	"bytes"
	"errors"
	"fmt"

	"mica/thin"
)

// pieceBytes bounds the piece of a block that is prepared at a time.
const pieceBytes = 1 << 20

// copyBytes bounds the memory of all pieces that are being prepared in a pool.
const copyBytes = 16 << 20

// initCopies sets up the pool-wide limit on pieces in preparation; buffers are made on first use.
func (p *Pool) initCopies() {
	n := int(copyBytes / min(p.bs, pieceBytes))
	p.copies = make(chan []byte, n)
	for range n {
		p.copies <- nil
	}
}

func (p *Pool) copyBuffer() []byte {
	b := <-p.copies
	if b == nil {
		b = make([]byte, min(p.bs, pieceBytes)) // page-aligned, being larger than 32 KiB
	}
	return b
}

// lockStripes locks the stripes of n neighbouring blocks, at most maxRun.
func (d *device) lockStripes(vb thin.VBlock, n uint64) {
	first := uint64(vb) % stripeCount
	if over := first + n; over > stripeCount { // those that wrap around have the lower numbers
		for i := uint64(0); i < over-stripeCount; i++ {
			d.stripes[i].Lock()
		}
	}
	for i := first; i < min(first+n, stripeCount); i++ {
		d.stripes[i].Lock()
	}
}

func (d *device) unlockStripes(vb thin.VBlock, n uint64) {
	for i := uint64(0); i < n; i++ {
		d.stripes[(uint64(vb)+i)%stripeCount].Unlock()
	}
}

// needsBlock reports whether a write to the block of entry e needs a new data block.
func (d *device) needsBlock(e uint64) bool { return e == absent || d.shared(e) }

// writeBlocks writes the beginning of s to blocks that need a new data block, or to one that is
// being looked at for zeros. It returns how much it wrote; 0 without an error means: look again, the
// first block has got its place meanwhile, or its leaf was evicted.
func (t *Thin) writeBlocks(s payload, off int64) (int64, error) {
	d := t.d
	vb := thin.VBlock(off / t.bs)
	l, err := d.leafOf(vb)
	if err != nil {
		return 0, err
	}
	in := off - int64(vb)*t.bs
	// How many blocks of this leaf, from the first on, want a place of their own.
	i := uint64(vb) % leafBlocks
	most := min(uint64((in+s.n+t.bs-1)/t.bs), leafBlocks-i, maxRun)
	if s.p == nil {
		most = 1 // zeros go block by block
	}
	want := func(n uint64) uint64 {
		k := uint64(0)
		for k < n && d.needsBlock(l.entries[i+k].Load()) {
			k++
		}
		return k
	}
	n := max(1, want(most))
	d.lockStripes(vb, n)
	defer d.unlockStripes(vb, n)
	if d.table.at(vb) != l {
		return 0, nil // evicted meanwhile: its entries may be old
	}
	// From here on the entries of these blocks stay as they are, in this leaf and in any that
	// takes its place.
	k := want(n)
	if k == 0 {
		return t.writeLocked(l, s, off)
	}
	if err := t.p.admit(int(k), false); err != nil {
		if k == 1 || !errors.Is(err, errWantMeta) {
			return 0, err
		}
		k = 1 // metadata is short: one at a time
		if err := t.p.admit(1, false); err != nil {
			return 0, err
		}
	}
	run, err := d.alloc(vb, k)
	if err != nil {
		t.p.unadmit(int(k))
		return 0, err
	}
	t.p.unadmit(int(k - run.Len))
	k = run.Len
	total := min(s.n, int64(k)*t.bs-in)
	err = t.fillBlocks(l, vb, run, s.part(0, total), in)
	if err == nil {
		err = t.recordRun(l, vb, run)
	} else {
		t.p.unadmit(int(k))
	}
	if err != nil {
		t.p.meta.UnreserveData(run)
		return 0, err
	}
	if t.p.outOfSpace.Load() {
		t.p.hostSpaceAgain()
	}
	return total, nil
}

// writeLocked overwrites a part of one mapped block that is the device's own; the caller holds
// its stripe, so it is not being unmapped.
func (t *Thin) writeLocked(l *leaf, s payload, off int64) (int64, error) {
	n, pos := t.ownRun(l, off, min(s.n, t.bs-off%t.bs))
	if n == 0 {
		return 0, nil
	}
	if z := l.zero.Load(); z != nil {
		t.clearParts(z, off, n)
	}
	var err error
	if s.p == nil {
		err = t.p.data.writeZeros(pos, n)
	} else {
		_, err = t.p.data.WriteAt(s.p[:n], pos)
	}
	if err != nil {
		return 0, err // not done: who waits for the host's space does it again
	}
	return n, nil
}

// recordRun enters new mappings, all or none. Their contents are complete.
func (t *Thin) recordRun(l *leaf, vb thin.VBlock, run thin.DataRun) error {
	d := t.d
	val := thin.Mapping{Block: run.Begin, Time: t.p.meta.Time()}.Pack()
	for {
		ok, err := d.record(l, vb, run.Len, val)
		if err == nil && !ok { // the leaf was evicted
			l, err = d.leafOf(vb)
		}
		if err != nil {
			t.p.unadmit(int(run.Len))
			return err
		}
		if ok {
			return nil
		}
	}
}

// fillBlocks prepares new data blocks for virtual blocks from vb on, where s begins at byte in of
// the first one: as few writes as can be, and one read of an old block that s covers in part.
func (t *Thin) fillBlocks(l *leaf, vb thin.VBlock, run thin.DataRun, s payload, in int64) error {
	end := in + s.n     // relative to the first block, as are from and to:
	from, to := in, end // what is written as it is, in one piece
	for k := int64(0); k < int64(run.Len); k++ {
		v, b := vb+thin.VBlock(k), run.Begin+thin.DataBlock(k)
		known := t.p.data.takeZero(b)
		lo, hi := max(0, in-k*t.bs), min(t.bs, end-k*t.bs)
		old := l.entries[uint64(v)%leafBlocks].Load()
		whole := lo == 0 && hi == t.bs
		if whole {
			l.setParts(v, nil)
		} else if old == absent && t.originBytes(int64(v)*t.bs) == 0 && (known || t.p.opts.SkipBlockZeroing) {
			l.setParts(v, t.newParts(known, lo, hi))
			whole = true
		}
		if whole {
			if known && s.p == nil { // zeros, block by block
				from = to
			}
			continue
		}
		// The first or the last block of the run, covered in part.
		if err := t.prepare(l, v, old, b, known, s.part(k*t.bs+lo-in, k*t.bs+hi-in), lo); err != nil {
			return err
		}
		if k == 0 {
			from = hi
		} else {
			to = k * t.bs
		}
	}
	for from < to {
		n := to - from
		if s.p == nil {
			n = min(n, int64(len(zeroBuf)))
		}
		if _, err := t.p.data.WriteAt(s.slice(from-in, from-in+n), t.p.data.pos(run.Begin)+from); err != nil {
			return fmt.Errorf("write data block %d: %w", run.Begin, err)
		}
		from += n
	}
	return nil
}

// prepare gives one new data block the content of virtual block v (its old data block, the
// external origin, or zeros) with s over it from byte in. Each piece is read at most once, and
// written once. known: the new block is zero already.
func (t *Thin) prepare(l *leaf, v thin.VBlock, old uint64, b thin.DataBlock, known bool, s payload, in int64) error {
	fresh := old == absent && t.originBytes(int64(v)*t.bs) == 0
	parts := t.newParts(fresh, in, in+s.n)
	buf := t.p.copyBuffer()
	defer func() { t.p.copies <- buf }()
	for at, n := int64(0), int64(0); at < t.bs; at += n {
		n = min(int64(len(buf)), t.bs-at)
		// The caller's bytes of this piece, relative to it.
		lo, hi := max(0, min(n, in-at)), max(0, min(n, in+s.n-at))
		w, pos := buf[:n], t.p.data.pos(b)+at
		switch {
		case hi-lo == n:
			w = s.slice(at-in, at-in+n)
		case fresh && known && hi == lo:
			continue
		case fresh && known:
			w, pos = s.slice(at+lo-in, at+hi-in), pos+lo
		default:
			if fresh {
				clear(w)
			} else if err := t.readOld(w, lo, hi, v, old, at); err != nil {
				return err
			}
			if hi > lo {
				copy(w[lo:hi], s.slice(at+lo-in, at+hi-in))
			}
			if !fresh {
				parts.scan(w, at)
				if known && bytes.Equal(w, zeroBuf[:n]) {
					continue // a hole stays a hole
				}
			}
		}
		if _, err := t.p.data.WriteAt(w, pos); err != nil {
			return fmt.Errorf("write data block %d: %w", b, err)
		}
	}
	l.setParts(v, parts)
	return nil
}

// readOld reads a piece of what virtual block v holds, but for bytes [lo, hi) of it if they are
// at one of its ends.
func (t *Thin) readOld(w []byte, lo, hi int64, v thin.VBlock, old uint64, at int64) error {
	if hi > lo && lo == 0 {
		w, at = w[hi:], at+hi
	} else if hi > lo && hi == int64(len(w)) {
		w = w[:lo]
	}
	if old == absent {
		return t.readOrigin(w, int64(v)*t.bs+at)
	}
	b := thin.UnpackMapping(old).Block
	if _, err := t.p.data.ReadAt(w, t.p.data.pos(b)+at); err != nil {
		return fmt.Errorf("read data block %d: %w", b, err)
	}
	return nil
}
