package user

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// stripeCount is the number of block locks of a device: block vb uses lock vb % stripeCount.
const stripeCount = 256

// A device is what all handles of one open thin device share.
type device struct {
	p  *Pool
	id thin.DevID

	r, w    tokens // of reads; of writes, discards and write-zeroes
	table   table
	stripes [stripeCount]sync.Mutex
	extent  extent

	// snapTime decides what is shared: mappings of an earlier time. It changes only while no
	// writer holds a token.
	snapTime atomic.Uint32
	mapped   atomic.Int64  // mapped blocks, pending ones included
	created  uint32        // the pool's time when the device was made; see own.go
	own      atomic.Int64  // change of the device's own blocks since it was opened
	changed  atomic.Uint64 // newest generation that may hold a change of this device
	waiting  atomic.Int32  // writes that wait for space

	dirtyMu  sync.Mutex
	dirty    []*leaf          // guarded by dirtyMu: leaves with entries of the open pending set
	dropped  []thin.DataBlock // guarded by dirtyMu: blocks superseded before they were in a tree
	enlisted bool             // guarded by dirtyMu: in Pool.dirtyDevs

	refs   int  // guarded by Pool.mu: handles
	writer bool // guarded by Pool.mu: one of them may write
}

// shared reports whether the block of a packed mapping may be known to another device.
func (d *device) shared(val uint64) bool {
	return d.snapTime.Load() > uint32(val&(thin.MaxTime-1))
}

// CheckSize reports whether a thin device of sizeBytes can be opened on blocks of blockSize bytes.
func CheckSize(sizeBytes, blockSize int64) error {
	if sizeBytes <= 0 || sizeBytes%512 != 0 {
		return fmt.Errorf("size of %d bytes: not a positive multiple of 512: %w", sizeBytes, dev.ErrOutOfRange)
	}
	if sizeBytes/blockSize >= maxVBlocks {
		return fmt.Errorf("size of %d bytes: more than %d blocks of %d bytes: %w", sizeBytes, int64(maxVBlocks), blockSize, dev.ErrOutOfRange)
	}
	return nil
}

// Open opens a thin device: once for writing, or several times read-only.
func (p *Pool) Open(ctx context.Context, id thin.DevID, o engine.OpenOptions) (engine.Thin, error) {
	t, err := p.open(id, o)
	if err != nil {
		return nil, fmt.Errorf("open thin %d: %w", id, err)
	}
	return t, nil
}

func (p *Pool) open(id thin.DevID, o engine.OpenOptions) (*Thin, error) {
	if err := CheckSize(o.SizeBytes, p.bs); err != nil {
		return nil, err
	}
	if !o.ReadOnly && p.opts.ReadOnly {
		return nil, p.writable()
	}
	p.compaction.opening.RLock()
	defer p.compaction.opening.RUnlock()
	// Under applyMu, so that a snapshot either sees the device open or is done with it.
	p.applyMu.Lock()
	defer p.applyMu.Unlock()
	det, err := p.meta.Details(id)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, dev.ErrClosed
	}
	if _, ok := p.deleting[id]; ok {
		return nil, fmt.Errorf("it is being deleted: %w", engine.ErrInUse)
	}
	d := p.devices[id]
	if d != nil && (!o.ReadOnly || d.writer) {
		return nil, fmt.Errorf("it is open already: %w", engine.ErrInUse)
	}
	if d == nil {
		d = &device{p: p, id: id, created: det.CreationTime}
		d.r.init()
		d.w.init()
		d.snapTime.Store(det.SnapshottedTime)
		d.mapped.Store(int64(det.MappedBlocks))
		if p.meta.Changed() {
			// What an earlier opener left in the tree may not be durable yet.
			d.changed.Store(p.commits.open.Load())
		} else {
			d.changed.Store(p.commits.open.Load() - 1)
		}
		p.devices[id] = d
	}
	d.table.reach(uint64((o.SizeBytes + p.bs - 1) / p.bs))
	d.refs++
	d.writer = d.writer || !o.ReadOnly
	t := &Thin{p: p, d: d, bs: p.bs, readOnly: o.ReadOnly, origin: o.ExternalOrigin, spaceWait: o.SpaceWait, closing: make(chan struct{})}
	t.size.Store(o.SizeBytes)
	return t, nil
}

// close drops a handle's share of the device. With the last one its pending mappings go into
// the tree, to be made durable by the next commit, and its memory is let go.
func (d *device) close(writer bool) error {
	p := d.p
	p.applyMu.Lock()
	defer p.applyMu.Unlock()
	p.mu.Lock()
	last := d.refs == 1
	if !last {
		d.refs--
		d.writer = d.writer && !writer
	}
	p.mu.Unlock()
	if !last {
		return nil
	}
	err := p.failed()
	if err == nil && !p.readOnly {
		err = p.applyLocked(d)
	}
	d.returnExtent()
	p.mu.Lock()
	d.refs--
	delete(p.devices, d.id)
	p.mu.Unlock()
	d.table.drop(&p.cache)
	return err
}

// Devices lists the pool's devices, pending writes included.
func (p *Pool) Devices(ctx context.Context) ([]thin.DeviceInfo, error) {
	list, err := p.meta.Devices()
	for i := range list {
		p.addPending(&list[i])
	}
	return list, err
}

// Device returns one device's details, pending writes included.
func (p *Pool) Device(ctx context.Context, id thin.DevID) (thin.DeviceInfo, error) {
	det, err := p.meta.Details(id)
	info := thin.DeviceInfo{ID: id, Details: det}
	if err == nil {
		p.addPending(&info)
	}
	return info, err
}

func (p *Pool) addPending(i *thin.DeviceInfo) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.devices[i.ID]; d != nil {
		i.MappedBlocks = uint64(max(0, d.mapped.Load()))
	}
}

// HighestMapped returns the last virtual block that a device maps, pending writes included.
func (p *Pool) HighestMapped(ctx context.Context, id thin.DevID) (last thin.VBlock, ok bool, err error) {
	p.applyMu.Lock()
	defer p.applyMu.Unlock()
	p.mu.Lock()
	d := p.devices[id]
	p.mu.Unlock()
	if d != nil && p.failed() == nil && !p.readOnly {
		if err := p.applyLocked(d); err != nil {
			return 0, false, err
		}
	}
	return p.meta.HighestMapped(id)
}
