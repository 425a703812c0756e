package kernel

import (
	"context"
	"errors"
	"fmt"

	"mica/thin"
)

// GrowData enlarges the data device (a file is extended, a block device must have grown) and the
// pool. What does not fill a block is not used. Everything on the pool waits for a moment.
func (p *Pool) GrowData(ctx context.Context, sizeBytes int64) error {
	what := fmt.Sprintf("grow data to %d bytes", sizeBytes)
	if err := p.mayGrow(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	p.tableMu.Lock()
	defer p.tableMu.Unlock()
	st, err := p.poolStatus(true)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	want := uint64(max(0, sizeBytes) / p.bs)
	if want < st.DataSize {
		return fmt.Errorf("%s: that is %d blocks, the pool has %d: pools only grow", what, want, st.DataSize)
	}
	if err := p.data.grow(sizeBytes, false); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if want > st.DataSize {
		if err := p.dm.Reload(p.name, false, true, true, p.table(want)); err != nil {
			return fmt.Errorf("%s: %w", what, p.refused(err))
		}
	}
	return p.grown(what, func() (uint64, error) {
		st, err := p.poolStatus(true)
		return st.DataSize, err
	}, want)
}

// GrowMetadata enlarges the metadata device and the pool's use of it: the kernel looks at the
// device's length when the pool is resumed. A file is allocated in full.
func (p *Pool) GrowMetadata(ctx context.Context, sizeBytes int64) error {
	what := fmt.Sprintf("grow metadata to %d bytes", sizeBytes)
	if err := p.mayGrow(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	p.tableMu.Lock()
	defer p.tableMu.Unlock()
	st, err := p.poolStatus(true)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	want := uint64(min(max(0, sizeBytes), thin.MaxMetadataBytes) / metaBlock)
	if want < st.MetaSize {
		return fmt.Errorf("%s: the pool has %d metadata blocks of %d bytes: pools only grow", what, st.MetaSize, metaBlock)
	}
	if err := p.meta.grow(sizeBytes, true); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.dm.Suspend(p.name, true, true); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := p.dm.Resume(p.name); err != nil {
		return fmt.Errorf("%s: %w", what, p.refused(err))
	}
	return p.grown(what, func() (uint64, error) {
		st, err := p.poolStatus(true)
		return st.MetaSize, err
	}, want)
}

const metaBlock = 4096

// mayGrow says why the pool cannot be made longer. Out of metadata space is no reason.
func (p *Pool) mayGrow() error {
	if !p.ours {
		return fmt.Errorf("%w: device %s is made longer by whoever made it (lvextend, for LVM)", ErrForeign, p.name)
	}
	err := p.writable()
	if errors.Is(err, thin.ErrNoMetaSpace) {
		return nil
	}
	return err
}

// grown sees whether the kernel has taken the new length: it leaves a pool that needs a check as it
// is and says nothing.
func (p *Pool) grown(what string, have func() (uint64, error), want uint64) error {
	n, err := have()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if n < want {
		if why := p.writable(); why != nil {
			return fmt.Errorf("%s: %w", what, why)
		}
		return fmt.Errorf("%s: the kernel has %d blocks, want %d (its log, dmesg, says why)", what, n, want)
	}
	return nil
}
