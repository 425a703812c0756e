package user

import (
	"context"
	"errors"
	"fmt"

	"mica/dev"
	"mica/thin"
)

// GrowData enlarges the data device (a file is extended, a block device must have grown) and
// the pool. What does not fill a block is not used.
func (p *Pool) GrowData(ctx context.Context, sizeBytes int64) error {
	what := fmt.Sprintf("grow data to %d bytes", sizeBytes)
	if err := p.writable(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	have, want := p.meta.DataBlocks(), uint64(sizeBytes/p.bs)
	if want < have {
		return fmt.Errorf("%s: that is %d blocks, the pool has %d: pools only grow", what, want, have)
	}
	p.growMu.Lock()
	defer p.growMu.Unlock()
	err := resize(p.data.Device, sizeBytes)
	p.data.touched()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.data.findZero(have, want); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.change(what, func() error { return p.meta.GrowData(want) }); err != nil {
		return err
	}
	p.spaceFreed()
	return nil
}

// GrowMetadata enlarges the metadata device and the pool's use of it. A file is allocated in
// full, so that no later commit fails for want of host space.
func (p *Pool) GrowMetadata(ctx context.Context, sizeBytes int64) error {
	what := fmt.Sprintf("grow metadata to %d bytes", sizeBytes)
	if err := p.writable(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	p.growMu.Lock()
	defer p.growMu.Unlock()
	have := p.metaD.Size()
	if uint64(sizeBytes/4096) < p.meta.Space().MetaTotal {
		return fmt.Errorf("%s: the pool has %d metadata blocks of 4096 bytes: pools only grow", what, p.meta.Space().MetaTotal)
	}
	if err := resize(p.metaD, sizeBytes); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if sizeBytes > have {
		if err := allocateNew(p.metaD, have, sizeBytes-have); err != nil {
			err = fmt.Errorf("%s: %w", what, err)
			if serr := resize(p.metaD, have); serr != nil {
				p.log.Warn("metadata file keeps its new length", "err", serr)
			}
			return err
		}
	}
	if err := p.change(what, p.meta.GrowMetadata); err != nil {
		return err
	}
	p.space.wakeAll()
	return nil
}

// allocateNew takes host space for a range that was never written, so that writes to it cannot
// fail for want of it; where that cannot be asked for, by writing zeros.
func allocateNew(d dev.Device, off, n int64) error {
	if a, ok := d.(dev.Allocator); ok {
		if err := a.Allocate(off, n); !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
	}
	for n > 0 {
		c := min(n, int64(len(zeroBuf)))
		if _, err := d.WriteAt(zeroBuf[:c], off); err != nil {
			return err
		}
		off, n = off+c, n-c
	}
	return nil
}

// resize changes the length of a device that can, if it differs.
func resize(d dev.Device, sizeBytes int64) error {
	if d.Size() == sizeBytes {
		return nil
	}
	r, ok := d.(dev.Resizer)
	if !ok {
		return fmt.Errorf("the device has %d bytes and cannot be resized: %w", d.Size(), dev.ErrUnsupported)
	}
	return r.Resize(sizeBytes)
}

// trimStepBytes bounds the free blocks that a trim holds at a time.
const trimStepBytes = 256 << 20

// Trim gives the contents of free blocks back to the host, but for those known to be back, and
// returns how many bytes that were. Free blocks are punched when they become free; what is left
// for Trim is what a crash, another engine or an option left behind.
func (p *Pool) Trim(ctx context.Context) (int64, error) {
	if err := p.writable(); err != nil {
		return 0, fmt.Errorf("trim: %w", err)
	}
	if err := p.Commit(ctx); err != nil {
		return 0, err
	}
	for _, d := range p.openDevices() {
		d.returnExtent()
	}
	var passed int64
	for next := thin.DataBlock(0); ; {
		if err := ctx.Err(); err != nil {
			return passed, fmt.Errorf("trim: interrupted after %d bytes: %w", passed, err)
		}
		n, end, more := p.trimStep(next)
		passed += n
		if !more {
			return passed, nil
		}
		next = end
	}
}

// trimStep punches free blocks at or after next. more is false when there are none. While it holds
// them, writers that find no free block wait for trimMu.
func (p *Pool) trimStep(next thin.DataBlock) (passed int64, end thin.DataBlock, more bool) {
	p.trimMu.Lock()
	defer p.trimMu.Unlock()
	var held []thin.DataRun
	defer func() {
		for _, r := range held {
			p.meta.UnreserveData(r)
		}
	}()
	var todo []thin.DataBlock
	for n := trimStepBytes/p.bs + 1; n > 0; n-- {
		// One at a time, as a longer run might be found behind shorter ones.
		r, ok := p.meta.AllocData(next, 1)
		if !ok {
			break
		}
		held = append(held, r)
		if r.Begin < next { // wrapped around
			break
		}
		if !p.data.isZero(r.Begin) {
			todo = append(todo, r.Begin)
		}
		next, more = r.Begin+1, true
	}
	for _, r := range thin.RunsOf(todo) {
		if p.data.punch(r) {
			passed += int64(r.Len) * p.bs
		}
	}
	return passed, next, more
}
