package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// quietTries is how often a short look at the committed state is repeated because the kernel
// committed meanwhile.
const quietTries = 4

// A beside is the metadata device of a live pool, for reading only. Closing it does nothing.
type beside struct{ d *direct }

func (b beside) ReadAt(p []byte, off int64) (int, error) {
	n, end := dev.CheckRead(off, len(p), b.d.Size())
	m, err := b.d.ReadAt(p[:n], off)
	if err != nil && (err != io.EOF || m < n) {
		return m, err
	}
	return n, end
}

func (b beside) WriteAt([]byte, int64) (int, error) { return 0, dev.ErrReadOnly }
func (b beside) Size() int64                        { return b.d.Size() }
func (b beside) Flush() error                       { return nil }
func (b beside) Close() error                       { return nil }

// look commits and calls fn with the committed state, for what takes milliseconds. No block of a
// committed state is written to before the next commit, so what fn has read is right if the
// superblock is the same afterwards; otherwise fn is called again, in the end with the metadata
// snapshot. fn must begin anew each time.
func (p *Pool) look(ctx context.Context, fn func(v *thin.View) error) error {
	for range quietTries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := p.poolStatus(p.opts.ReadOnly); err != nil { // commits
			return err
		}
		before, err := p.superblockBytes()
		if err != nil {
			return err
		}
		v, err := thin.OpenView(beside{p.metaDev})
		if p.looking != nil {
			p.looking()
		}
		if err == nil {
			err = fn(v)
		}
		after, rerr := p.superblockBytes()
		if rerr != nil {
			return rerr
		}
		if bytes.Equal(before, after) {
			return err
		}
	}
	return p.hold(ctx, fn)
}

// hold calls fn with the metadata snapshot, which stands still for as long as fn takes; it is of a
// commit made in the call.
func (p *Pool) hold(ctx context.Context, fn func(v *thin.View) error) error {
	v, release, err := p.snaps.get(ctx, p)
	if err != nil {
		return err
	}
	err = fn(v)
	return errors.Join(err, release())
}

// readers share the metadata snapshot. Those that come while it is held wait for the next one
// together: a snapshot that began before them would not hold what they must see.
type readers struct {
	mu   sync.Mutex
	slot chan struct{} // guarded by mu for its making; holds a token while a snapshot is held
	next *batch        // guarded by mu: whom the next snapshot is for
	wg   sync.WaitGroup
}

// A batch is the readers of one metadata snapshot.
type batch struct {
	ready chan struct{} // closed under readers.mu when the next three are set
	v     *thin.View
	err   error
	held  bool // it must be released
	refs  int  // guarded by readers.mu
}

func (r *readers) get(ctx context.Context, p *Pool) (*thin.View, func() error, error) {
	r.turn()
	r.mu.Lock()
	b := r.next
	if b == nil {
		b = &batch{ready: make(chan struct{})}
		r.next = b
		r.wg.Go(func() { r.reserve(p, b) })
	}
	b.refs++
	r.mu.Unlock()
	select {
	case <-b.ready:
	case <-ctx.Done():
		return nil, nil, errors.Join(ctx.Err(), r.put(p, b))
	}
	if b.err != nil {
		return nil, nil, errors.Join(b.err, r.put(p, b))
	}
	return b.v, func() error { return r.put(p, b) }, nil
}

// turn is what whoever holds the metadata snapshot puts a token into.
func (r *readers) turn() chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.slot == nil {
		r.slot = make(chan struct{}, 1)
	}
	return r.slot
}

// reserve waits for its turn and takes the snapshot for a batch.
func (r *readers) reserve(p *Pool, b *batch) {
	r.slot <- struct{}{}
	r.mu.Lock()
	r.next = nil // who comes now is too late for this one
	wanted := b.refs > 0
	r.mu.Unlock()
	var v *thin.View
	held := false
	err := context.Canceled // nobody waits any more
	if wanted {
		v, held, err = p.reserveSnap()
	}
	r.mu.Lock()
	b.v, b.err, b.held = v, err, held
	free := b.refs == 0 // the last has given up meanwhile
	close(b.ready)
	r.mu.Unlock()
	if free {
		r.let(p, held)
	}
}

// put gives a reader's share back; the last one releases the snapshot.
func (r *readers) put(p *Pool, b *batch) error {
	r.mu.Lock()
	b.refs--
	last := b.refs == 0
	select {
	case <-b.ready:
	default:
		last = false // reserve sees that nobody is left
	}
	r.mu.Unlock()
	if !last {
		return nil
	}
	return r.let(p, b.held)
}

// let releases the snapshot and gives the turn back.
func (r *readers) let(p *Pool, held bool) error {
	defer func() { <-r.slot }()
	if !held {
		return nil
	}
	if err := p.message(p.dm.ReleaseMetadataSnap); err != nil {
		return fmt.Errorf("release the metadata snapshot: %w", err)
	}
	return nil
}

// close waits until nobody is about to take a snapshot.
func (r *readers) close() { r.wg.Wait() }

// ReserveMetadataSnap holds the metadata snapshot for somebody else, who reads it from the
// metadata device. Until ReleaseMetadataSnap this process reads no metadata that way. ErrInUse if it
// is held already.
func (p *Pool) ReserveMetadataSnap(ctx context.Context) error {
	slot := p.snaps.turn()
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("reserve the metadata snapshot: it is being read: %w", ctx.Err())
	}
	defer func() { <-slot }()
	err := p.message(p.dm.ReserveMetadataSnap)
	if errors.Is(err, unix.EBUSY) {
		return errHeld
	}
	return p.messageErr("reserve the metadata snapshot", err)
}

// ReleaseMetadataSnap lets it go.
func (p *Pool) ReleaseMetadataSnap(ctx context.Context) error {
	slot := p.snaps.turn()
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("release the metadata snapshot: it is being read: %w", ctx.Err())
	}
	defer func() { <-slot }()
	err := p.message(p.dm.ReleaseMetadataSnap)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("release the metadata snapshot: none is held: %w", thin.ErrNotFound)
	}
	return p.messageErr("release the metadata snapshot", err)
}

var errHeld = fmt.Errorf("the metadata snapshot is held by somebody else (the message release_metadata_snap to the pool lets it go): %w", engine.ErrInUse)

// reserveSnap takes the metadata snapshot. A pool that takes no changes stands still without one.
func (p *Pool) reserveSnap() (v *thin.View, held bool, err error) {
	err = p.message(p.dm.ReserveMetadataSnap)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		st, serr := p.poolStatus(true)
		if serr != nil {
			return nil, false, serr
		}
		if st.Failed || st.Mode != "ro" {
			return nil, false, p.messageErr("reserve the metadata snapshot", err)
		}
		v, err = thin.OpenView(beside{p.metaDev})
		return v, false, err
	case errors.Is(err, unix.EBUSY):
		return nil, false, errHeld
	case err != nil:
		return nil, false, p.messageErr("reserve the metadata snapshot", err)
	}
	for range quietTries { // the superblock is written in place, beside this read
		var pool *thin.View
		if pool, err = thin.OpenView(beside{p.metaDev}); err != nil {
			continue
		}
		if v, err = pool.MetadataSnap(); err == nil {
			return v, true, nil
		}
	}
	return nil, false, errors.Join(err, p.message(p.dm.ReleaseMetadataSnap))
}

// Devices lists the devices, by id, as of a commit made in the call.
func (p *Pool) Devices(ctx context.Context) (list []thin.DeviceInfo, err error) {
	err = p.look(ctx, func(v *thin.View) error {
		list, err = v.Devices()
		return err
	})
	return list, err
}

// Device returns one device's details.
func (p *Pool) Device(ctx context.Context, id thin.DevID) (thin.DeviceInfo, error) {
	var info thin.DeviceInfo
	err := p.look(ctx, func(v *thin.View) (err error) {
		info, err = v.Device(id)
		return err
	})
	return info, err
}

// HighestMapped returns the last virtual block that a device maps; ok is false if it maps none.
func (p *Pool) HighestMapped(ctx context.Context, id thin.DevID) (last thin.VBlock, ok bool, err error) {
	err = p.look(ctx, func(v *thin.View) (err error) {
		last, ok, err = v.HighestMapped(id)
		return err
	})
	return last, ok, err
}

// Delta lists where two devices differ and agree, as of a commit made in the call.
func (p *Pool) Delta(ctx context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error {
	return p.hold(ctx, func(v *thin.View) error {
		return v.Delta(left, right, func(r thin.DeltaRange) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return fn(r)
		})
	})
}

// Usage counts the blocks of every device, as of a commit made in the call.
func (p *Pool) Usage(ctx context.Context) (map[thin.DevID]thin.Usage, error) {
	var all map[thin.DevID]thin.Usage
	err := p.hold(ctx, func(v *thin.View) (err error) {
		all, err = v.Usage()
		return err
	})
	return all, err
}

// OwnBlocks counts the blocks that a device provisioned since it was made and still maps, as of a
// commit made in the call, by a walk of its mappings.
func (p *Pool) OwnBlocks(ctx context.Context, id thin.DevID) (n uint64, err error) {
	err = p.hold(ctx, func(v *thin.View) error {
		info, err := v.Device(id)
		if err != nil {
			return err
		}
		n = 0
		seen := 0
		err = v.Walk(id, 0, func(e thin.Entry) bool {
			if e.Time >= info.CreationTime {
				n++
			}
			seen++
			return seen%4096 != 0 || ctx.Err() == nil
		})
		return errors.Join(err, ctx.Err())
	})
	if err != nil {
		return 0, fmt.Errorf("own blocks of thin %d: %w", id, err)
	}
	return n, nil
}

// View calls fn with a committed state that stands still meanwhile, as of a commit made in the
// call: for checks and dumps of a live pool. A metadata snapshot has no space maps.
func (p *Pool) View(ctx context.Context, fn func(v *thin.View) error) error { return p.hold(ctx, fn) }
