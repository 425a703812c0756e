package user

import (
	"math/bits"
	"sync"

	"mica/thin"
)

// extentMax bounds an extent: 1024 blocks and 64 MiB.
const (
	extentMax      = 1024
	extentMaxBytes = 64 << 20
	extentMin      = 16
)

// An extent is a run of reserved data blocks that one device takes new blocks from, so that
// what it writes in sequence lies in sequence while others allocate too. It is counted nowhere
// on the medium; what is left of it goes back before the pool says that it is full.
//
// A window of virtual blocks is laid over the extent, so that neighbouring writes that arrive
// out of order still get neighbouring places.
type extent struct {
	mu    sync.Mutex
	begin thin.DataBlock         // guarded by mu, as is the rest
	n     uint64                 // blocks, 0: none
	vbase thin.VBlock            // virtual block that belongs at begin
	free  [extentMax / 64]uint64 // a bit for each block that is left
	left  uint64                 // blocks that are left
	next  uint64                 // size of the next extent
}

func (e *extent) isFree(i uint64) bool { return i < e.n && e.free[i/64]&(1<<(i%64)) != 0 }

// take gives out up to want neighbouring blocks for vb and the blocks after it.
func (e *extent) take(vb thin.VBlock, want uint64) (thin.DataRun, bool) {
	if e.left == 0 {
		return thin.DataRun{}, false
	}
	i := uint64(vb - e.vbase)
	if !e.isFree(i) {
		for w, f := range e.free {
			if f != 0 {
				i = uint64(w*64 + bits.TrailingZeros64(f))
				break
			}
		}
		e.vbase = vb - thin.VBlock(i)
	}
	n := uint64(0)
	for n < want && e.isFree(i+n) {
		e.free[(i+n)/64] &^= 1 << ((i + n) % 64)
		n++
	}
	e.left -= n
	return thin.DataRun{Begin: e.begin + thin.DataBlock(i), Len: n}, true
}

func (e *extent) set(r thin.DataRun, vb thin.VBlock) {
	e.begin, e.n, e.left, e.vbase = r.Begin, r.Len, r.Len, vb
	e.free = [extentMax / 64]uint64{}
	for i := uint64(0); i < r.Len; i++ {
		e.free[i/64] |= 1 << (i % 64)
	}
}

// alloc reserves up to want neighbouring data blocks for vb and its successors. errWantData if
// there is none, not even in the extents of other devices.
func (d *device) alloc(vb thin.VBlock, want uint64) (thin.DataRun, error) {
	p := d.p
	e := &d.extent
	e.mu.Lock()
	run, ok := e.take(vb, want)
	if ok {
		e.mu.Unlock()
		p.extentFree.Add(-int64(run.Len))
		p.checkLowWater()
		return run, nil
	}
	limit := min(extentMax, max(1, uint64(extentMaxBytes/p.bs)))
	free := p.meta.Space().DataFree()
	size := min(max(e.next, extentMin, want), limit, max(want, free/16), extentMax)
	hint := thin.DataBlock(p.cursor.Load())
	if e.n > 0 {
		hint = e.begin + thin.DataBlock(e.n)
	}
	r, ok := p.meta.AllocData(hint, size)
	if ok {
		p.cursor.Store(uint64(r.Begin) + r.Len)
		e.set(r, vb)
		e.next = min(2*size, limit)
		p.extentFree.Add(int64(r.Len))
		run, _ = e.take(vb, want)
		p.extentFree.Add(-int64(run.Len))
	}
	e.mu.Unlock()
	if ok {
		p.checkLowWater()
		return run, nil
	}
	// What others have set aside, or a trim holds for a moment, comes first.
	p.trimMu.Lock()
	for _, o := range p.openDevices() {
		o.returnExtent()
	}
	run, ok = p.meta.AllocData(hint, want)
	p.trimMu.Unlock()
	p.checkLowWater()
	if !ok {
		return thin.DataRun{}, errWantData
	}
	return run, nil
}

// returnExtent gives back what the device has set aside.
func (d *device) returnExtent() {
	e := &d.extent
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := uint64(0); i < e.n && e.left > 0; {
		if !e.isFree(i) {
			i++
			continue
		}
		j := i
		for e.isFree(j) {
			j++
		}
		d.p.meta.UnreserveData(thin.DataRun{Begin: e.begin + thin.DataBlock(i), Len: j - i})
		d.p.extentFree.Add(-int64(j - i))
		e.left -= j - i
		i = j
	}
	e.n, e.left, e.next = 0, 0, 0
}
