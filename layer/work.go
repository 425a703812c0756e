package layer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/export"
	"mica/thin"
)

// An ownCounter is an open device that counts the blocks which it provisioned since it was made
// (not: since it was opened), less those unmapped, as a change since it was opened. O(1).
type ownCounter interface {
	OwnChange() int64
}

// A work is a device that an operation has attached for a helper. Nobody else knows the node.
type work struct {
	s    *Store
	t    engine.Thin
	a    export.Attachment
	name string
}

func (w *work) node() string { return w.a.Node() }

// work opens and attaches a device, runs fn, and puts it away again: detached, flushed, closed.
// own, if not nil, gets the number of own blocks that came.
//
// A helper that was killed leaves its mount to the kernel for a moment, so that the detach is
// tried for some seconds. If it stays busy, the error says by whom, and the background goes on:
// the device then stays open, and whoever deletes it waits for that.
func (s *Store) work(ctx context.Context, id thin.DevID, size int64, readOnly bool, fn func(*work) error, own *int64) error {
	w, err := s.openWork(ctx, id, size, readOnly)
	if err != nil {
		return err
	}
	if err = fn(w); err != nil {
		err = s.noSpace(ctx, err)
	}
	cctx, cancel := s.short(ctx)
	defer cancel()
	cerr := w.close(cctx, own, err == nil)
	return errors.Join(err, cerr)
}

// noSpace makes an error say so if the pool is full: the kernel reports a write-back that found
// no room as an I/O error.
func (s *Store) noSpace(ctx context.Context, err error) error {
	cctx, cancel := s.short(ctx)
	defer cancel()
	st, serr := s.pool.Status(cctx)
	if serr == nil && ctx.Err() == nil && st.DataUsed+st.DataReserved+st.DataFreeing+freeBlocksForFreeze > st.DataBlocks {
		return fmt.Errorf("%w in the pool: %d of %d data blocks of %d bytes used: %w",
			ErrNoSpace, st.DataUsed, st.DataBlocks, st.BlockSize, err)
	}
	if errors.Is(err, unix.ENOSPC) && !errors.Is(err, ErrNoSpace) {
		return fmt.Errorf("%w in the file system: %w", ErrNoSpace, err)
	}
	return err
}

// workSpaceWait is how long an operation waits for space in the pool: what extends a pool by itself has
// done so by then, and the operation can be repeated.
const workSpaceWait = 5 * time.Second

// bulkDirty is how many bytes of what is written in one go, and then detached, wait in memory:
// half of a layer's write-back is over when its last file is written.
const bulkDirty = 32 << 20

func (s *Store) openWork(ctx context.Context, id thin.DevID, size int64, readOnly bool) (*work, error) {
	s.mu.Lock()
	s.workSeq++
	name := fmt.Sprintf("%s-w%d-%d-%d", s.prefix(), id, time.Now().UnixNano()/1e6%1e9, s.workSeq)
	s.mu.Unlock()
	t, err := s.pool.Open(ctx, id, engine.OpenOptions{SizeBytes: size, ReadOnly: readOnly, SpaceWait: workSpaceWait})
	if err != nil {
		return nil, err
	}
	a, err := s.o.Exporter.Attach(ctx, name, t, export.AttachOptions{ReadOnly: readOnly, DirtyBytes: bulkDirty})
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("attach device %d: %w", id, err)
	}
	return &work{s, t, a, name}, nil
}

// close detaches. With flush, what was written is durable when it returns nil.
func (w *work) close(ctx context.Context, own *int64, flush bool) error {
	if err := detachPatiently(ctx, w.a); err != nil {
		w.s.background(func(ctx context.Context) {
			for w.a.Detach(ctx) != nil && ctx.Err() == nil {
				sleep(ctx, time.Second)
			}
			w.t.Close()
			w.s.cat.Retry(w.t.ID())
		})
		return fmt.Errorf("device %d: %w", w.t.ID(), err)
	}
	var err error
	if flush && !w.t.ReadOnly() {
		err = w.t.Flush()
	}
	if c, ok := w.t.(ownCounter); ok && own != nil {
		*own = c.OwnChange()
	}
	if cerr := w.t.Close(); err == nil {
		err = cerr
	}
	if err == nil && own != nil {
		if _, ok := w.t.(ownCounter); !ok {
			*own = -1 // to be counted
		}
	}
	return err
}

// detachPatiently detaches what only a helper can have had mounted.
func detachPatiently(ctx context.Context, a export.Attachment) error {
	end := time.Now().Add(10 * time.Second)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := a.Detach(ctx)
		if !errors.Is(err, export.ErrBusy) || time.Now().After(end) {
			return err
		}
		if !sleep(ctx, wait) {
			return err
		}
	}
}

// sleep waits; false if the context ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// background runs fn until it returns or the store closes. Close waits for it. False if the
// store is closed already.
func (s *Store) background(fn func(ctx context.Context)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		fn(s.ctx)
	}()
	return true
}

func signalLoop(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
