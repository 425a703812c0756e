package user

import (
	"errors"

	"mica/dev"
	"mica/thin"
)

// Discard unmaps the blocks that lie wholly in the range; they read as zeros or as the external
// origin. The rest of the range keeps its contents, and so does what a snapshot shares and there are
// too few metadata blocks to take apart: a discard is a hint, and the kernel's pool does the same.
func (t *Thin) Discard(off, n int64) error {
	if err := t.checkChange(off, n); err != nil {
		return t.wrap("discard", err)
	}
	begin, end := (off+t.bs-1)/t.bs*t.bs, (off+n)/t.bs*t.bs
	if begin >= end {
		return nil
	}
	_, err := t.write(payload{nil, end - begin}, begin, t.unmapStep, false)
	if errors.Is(err, thin.ErrNoMetaSpace) {
		t.p.noMetaSpace(err)
		return nil
	}
	if err != nil {
		return t.wrap("discard", err)
	}
	return nil
}

// WriteZeroes makes the range read as zeros. Whole blocks are unmapped, unless they are to stay
// allocated or an external origin would show; parts of mapped blocks are overwritten, and a
// block that has become zero as a whole is unmapped too.
func (t *Thin) WriteZeroes(off, n int64, keepAllocated bool) error {
	if err := t.checkChange(off, n); err != nil {
		return t.wrap("write zeroes", err)
	}
	var zero []zeroBlock
	_, err := t.write(payload{nil, n}, off, func(s payload, off int64) (int64, error) {
		in := off % t.bs
		if whole := (s.n + in) / t.bs * t.bs; !keepAllocated && in == 0 && whole > 0 && t.originBytes(off) == 0 {
			return t.unmapStep(payload{nil, whole}, off)
		}
		return t.zeroStep(s.part(0, min(s.n, t.bs-in)), off, keepAllocated, &zero)
	}, false)
	if err != nil {
		return t.wrap("write zeroes", err)
	}
	if len(zero) > 0 {
		t.unmapZero(zero)
	}
	return nil
}

func (t *Thin) checkChange(off, n int64) error {
	if err := dev.CheckRange(off, n, t.size.Load()); err != nil {
		return err
	}
	if t.readOnly {
		return dev.ErrReadOnly
	}
	if t.closed.Load() {
		return dev.ErrClosed
	}
	return nil
}

// unmapStep unmaps the whole blocks of s: up to the end of a leaf, or a hole.
func (t *Thin) unmapStep(s payload, off int64) (int64, error) {
	d := t.d
	vb := thin.VBlock(off / t.bs)
	end := vb + thin.VBlock(s.n/t.bs)
	l, hole, err := d.leafOrHole(vb, end)
	if err != nil {
		return 0, err
	}
	if l == nil {
		return int64(hole-vb) * t.bs, nil
	}
	end = min(end, (vb/leafBlocks+1)*leafBlocks)
	for v := vb; v < end; v++ {
		if l.entries[v%leafBlocks].Load() == absent {
			continue
		}
		if ok, err := t.unmapBlock(l, v); err != nil || !ok {
			return int64(v-vb) * t.bs, err
		}
	}
	return int64(end-vb) * t.bs, nil
}

// unmapBlock removes one mapping. It reports false if the leaf was evicted.
func (t *Thin) unmapBlock(l *leaf, v thin.VBlock) (bool, error) {
	if err := t.p.admit(1, true); err != nil {
		return false, err
	}
	t.d.lockStripes(v, 1)
	defer t.d.unlockStripes(v, 1)
	if l.entries[v%leafBlocks].Load() == absent {
		t.p.unadmit(1)
		return true, nil
	}
	if ok, err := t.d.record(l, v, 1, absent); !ok {
		t.p.unadmit(1)
		return false, err
	}
	l.setParts(v, nil)
	return true, nil
}

// zeroStep zeroes s, which lies in one block.
func (t *Thin) zeroStep(s payload, off int64, keep bool, zero *[]zeroBlock) (int64, error) {
	v := thin.VBlock(off / t.bs)
	l, err := t.d.leafOf(v)
	if err != nil {
		return 0, err
	}
	in := off % t.bs
	e := l.entries[v%leafBlocks].Load()
	if e == absent && t.originBytes(int64(v)*t.bs) == 0 {
		return s.n, nil
	}
	n, err := t.writeBlocks(s, off) // provisions, breaks sharing, or overwrites in place
	if err != nil || n < s.n || keep || t.origin != nil {
		return n, err
	}
	t.d.lockStripes(v, 1)
	defer t.d.unlockStripes(v, 1)
	if l2 := t.d.table.at(v); l2 != l {
		return n, nil
	}
	if e = l.entries[v%leafBlocks].Load(); e != absent && t.noteZero(l, v, thin.UnpackMapping(e).Block, in, in+n) {
		*zero = append(*zero, zeroBlock{l, v})
	}
	return n, nil
}
