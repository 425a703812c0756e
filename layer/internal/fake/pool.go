// Package fake has a pool and an exporter in memory for tests of the layer store: devices are
// maps of blocks, every operation is durable when it returns, and nothing touches the kernel.
package fake

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// BlockSize is the data block size of a fake pool in bytes.
const BlockSize = 64 << 10

type block struct{ data []byte }

type device struct {
	blocks  map[thin.VBlock]*block
	own     map[thin.VBlock]bool // provisioned since the device was made
	details thin.Details
	open    int
	writer  bool
}

// A Pool is an engine.Pool in memory. Safe for concurrent use.
type Pool struct {
	mu      sync.Mutex
	devs    map[thin.DevID]*device
	txid    uint64
	commits uint64
	blocks  uint64 // total data blocks
	// Fail, if not nil, is asked before every change of the pool, by its name.
	Fail    func(op string) error
	deleted []thin.DevID
}

var _ engine.Pool = (*Pool)(nil)

// New makes an empty pool.
func New() *Pool { return &Pool{devs: map[thin.DevID]*device{}, blocks: 1 << 20} }

// Copy is a copy of the pool as of now, without anything open.
func (p *Pool) Copy() *Pool {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := New()
	q.txid, q.blocks = p.txid, p.blocks
	for id, d := range p.devs {
		q.devs[id] = &device{blocks: maps.Clone(d.blocks), own: maps.Clone(d.own), details: d.details}
	}
	return q
}

// Deleted lists every id that Delete was asked for, in order.
func (p *Pool) Deleted() []thin.DevID {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.deleted)
}

func (p *Pool) fail(op string) error {
	if p.Fail != nil {
		return p.Fail(op)
	}
	return nil
}

func (p *Pool) CreateThin(_ context.Context, id thin.DevID) error {
	if err := p.fail("create_thin"); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devs[id] != nil {
		return fmt.Errorf("create thin %d: %w", id, thin.ErrExists)
	}
	p.devs[id] = &device{blocks: map[thin.VBlock]*block{}, own: map[thin.VBlock]bool{},
		details: thin.Details{TransactionID: p.txid}}
	p.commits++
	return nil
}

func (p *Pool) CreateSnap(ctx context.Context, id, origin thin.DevID) error {
	return p.CreateSnaps(ctx, []engine.SnapPair{{ID: id, Origin: origin}})
}

func (p *Pool) CreateSnaps(_ context.Context, pairs []engine.SnapPair) error {
	if err := p.fail("create_snaps"); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, pr := range pairs {
		if p.devs[pr.ID] != nil || slices.ContainsFunc(pairs[:i], func(q engine.SnapPair) bool { return q.ID == pr.ID }) {
			return fmt.Errorf("create snapshot %d of thin %d: %w", pr.ID, pr.Origin, thin.ErrExists)
		}
		if p.devs[pr.Origin] == nil {
			return fmt.Errorf("create snapshot %d of thin %d: %w", pr.ID, pr.Origin, thin.ErrNotFound)
		}
	}
	for _, pr := range pairs {
		o := p.devs[pr.Origin]
		p.devs[pr.ID] = &device{blocks: maps.Clone(o.blocks), own: map[thin.VBlock]bool{},
			details: thin.Details{TransactionID: p.txid}}
	}
	p.commits++
	return nil
}

// CreateSnapsAt is CreateSnaps and SetTransactionID in one step.
func (p *Pool) CreateSnapsAt(ctx context.Context, pairs []engine.SnapPair, old, next uint64) error {
	p.mu.Lock()
	cur := p.txid
	p.mu.Unlock()
	if cur != old {
		return fmt.Errorf("transaction id is %d, not %d", cur, old)
	}
	if err := p.CreateSnaps(ctx, pairs); err != nil {
		return err
	}
	return p.SetTransactionID(ctx, old, next)
}

func (p *Pool) Delete(_ context.Context, id thin.DevID) error {
	if err := p.fail("delete"); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devs[id]
	if d == nil {
		return fmt.Errorf("delete thin %d: %w", id, thin.ErrNotFound)
	}
	if d.open > 0 {
		return fmt.Errorf("delete thin %d: %w", id, engine.ErrInUse)
	}
	delete(p.devs, id)
	p.deleted = append(p.deleted, id)
	p.commits++
	return nil
}

func (p *Pool) SetTransactionID(_ context.Context, old, next uint64) error {
	if err := p.fail("set_transaction_id"); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.txid != old {
		return fmt.Errorf("transaction id is %d, not %d", p.txid, old)
	}
	p.txid = next
	p.commits++
	return nil
}

func (p *Pool) info(id thin.DevID, d *device) thin.DeviceInfo {
	det := d.details
	det.MappedBlocks = uint64(len(d.blocks))
	return thin.DeviceInfo{ID: id, Details: det}
}

func (p *Pool) Devices(context.Context) ([]thin.DeviceInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []thin.DeviceInfo
	for _, id := range slices.Sorted(maps.Keys(p.devs)) {
		out = append(out, p.info(id, p.devs[id]))
	}
	return out, nil
}

func (p *Pool) Device(_ context.Context, id thin.DevID) (thin.DeviceInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devs[id]
	if d == nil {
		return thin.DeviceInfo{}, fmt.Errorf("thin %d: %w", id, thin.ErrNotFound)
	}
	return p.info(id, d), nil
}

func (p *Pool) HighestMapped(_ context.Context, id thin.DevID) (last thin.VBlock, ok bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devs[id]
	if d == nil {
		return 0, false, fmt.Errorf("thin %d: %w", id, thin.ErrNotFound)
	}
	for vb := range d.blocks {
		last, ok = max(last, vb), true
	}
	return last, ok, nil
}

func (p *Pool) Delta(_ context.Context, left, right thin.DevID, fn func(thin.DeltaRange) error) error {
	p.mu.Lock()
	l, r := p.devs[left], p.devs[right]
	if l == nil || r == nil {
		p.mu.Unlock()
		return fmt.Errorf("delta of %d and %d: %w", left, right, thin.ErrNotFound)
	}
	kinds := map[thin.VBlock]string{}
	for vb := range l.blocks {
		kinds[vb] = "left_only"
	}
	for vb, b := range r.blocks {
		switch {
		case l.blocks[vb] == nil:
			kinds[vb] = "right_only"
		case l.blocks[vb] == b:
			kinds[vb] = "same"
		default:
			kinds[vb] = "different"
		}
	}
	p.mu.Unlock()
	for _, vb := range slices.Sorted(maps.Keys(kinds)) {
		if err := fn(thin.DeltaRange{Kind: kinds[vb], Begin: vb, Len: 1}); err != nil {
			return err
		}
	}
	return nil
}

// OwnBlocks counts the blocks provisioned since the device was made.
func (p *Pool) OwnBlocks(_ context.Context, id thin.DevID) (uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devs[id]
	if d == nil {
		return 0, fmt.Errorf("thin %d: %w", id, thin.ErrNotFound)
	}
	return uint64(len(d.own)), nil
}

func (p *Pool) refs() map[*block]int {
	refs := map[*block]int{}
	for _, d := range p.devs {
		for _, b := range d.blocks {
			refs[b]++
		}
	}
	return refs
}

func (p *Pool) Usage(context.Context) (map[thin.DevID]thin.Usage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	refs := p.refs()
	out := map[thin.DevID]thin.Usage{}
	for id, d := range p.devs {
		u := thin.Usage{Mapped: uint64(len(d.blocks))}
		for _, b := range d.blocks {
			if refs[b] == 1 {
				u.Exclusive++
			}
		}
		out[id] = u
	}
	return out, nil
}

func (p *Pool) Commit(context.Context) error { return nil }

func (p *Pool) GrowData(_ context.Context, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blocks = uint64(n / BlockSize)
	return nil
}
func (p *Pool) GrowMetadata(context.Context, int64) error { return nil }
func (p *Pool) Trim(context.Context) (int64, error)       { return 0, nil }
func (p *Pool) Events() (<-chan engine.Event, func())     { return make(chan engine.Event), func() {} }
func (p *Pool) Status(context.Context) (engine.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return engine.Status{Engine: "fake", Mode: engine.ModeWrite.String(), BlockSize: BlockSize,
		DataBlocks: p.blocks, DataUsed: uint64(len(p.refs())), TransactionID: p.txid,
		Devices: len(p.devs), Commits: p.commits}, nil
}

func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, d := range p.devs {
		if d.open > 0 {
			return fmt.Errorf("thin %d: %w", id, engine.ErrInUse)
		}
	}
	return nil
}

func (p *Pool) Open(_ context.Context, id thin.DevID, o engine.OpenOptions) (engine.Thin, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := p.devs[id]
	if d == nil {
		return nil, fmt.Errorf("open thin %d: %w", id, thin.ErrNotFound)
	}
	if d.writer || (!o.ReadOnly && d.open > 0) {
		return nil, fmt.Errorf("open thin %d: %w", id, engine.ErrInUse)
	}
	d.open++
	d.writer = !o.ReadOnly
	return &Thin{p: p, d: d, id: id, size: o.SizeBytes, ro: o.ReadOnly, own: len(d.own)}, nil
}

// A Thin is an opened fake device.
type Thin struct {
	p      *Pool
	d      *device
	id     thin.DevID
	size   int64
	ro     bool
	own    int // own blocks at open
	closed bool
}

// OwnChange is by how many the device's own blocks have changed since it was opened.
func (t *Thin) OwnChange() int64 {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	return int64(len(t.d.own) - t.own)
}

var _ engine.Thin = (*Thin)(nil)

func (t *Thin) ReadAt(b []byte, off int64) (int, error) {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	n := 0
	for n < len(b) {
		at := off + int64(n)
		if at >= t.size {
			return n, io.EOF
		}
		in := at % BlockSize
		k := int(min(int64(len(b)-n), BlockSize-in, t.size-at))
		if blk := t.d.blocks[thin.VBlock(at/BlockSize)]; blk != nil {
			copy(b[n:n+k], blk.data[in:])
		} else {
			clear(b[n : n+k])
		}
		n += k
	}
	return n, nil
}

// WriteAtNoWait is WriteAt: nothing waits for space here.
func (t *Thin) WriteAtNoWait(p []byte, off int64) (int, error) { return t.WriteAt(p, off) }

func (t *Thin) WriteAt(b []byte, off int64) (int, error) {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	if err := dev.CheckRange(off, int64(len(b)), t.size); err != nil {
		return 0, err
	}
	if t.ro {
		return 0, dev.ErrReadOnly
	}
	for n := 0; n < len(b); {
		at := off + int64(n)
		in := at % BlockSize
		k := int(min(int64(len(b)-n), BlockSize-in))
		vb := thin.VBlock(at / BlockSize)
		blk := &block{data: make([]byte, BlockSize)}
		if old := t.d.blocks[vb]; old != nil {
			copy(blk.data, old.data)
		}
		copy(blk.data[in:], b[n:n+k])
		t.d.blocks[vb] = blk
		t.d.own[vb] = true
		n += k
	}
	return len(b), nil
}

func (t *Thin) Discard(off, n int64) error {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	for vb := (off + BlockSize - 1) / BlockSize; vb < (off+n)/BlockSize; vb++ {
		delete(t.d.blocks, thin.VBlock(vb))
		delete(t.d.own, thin.VBlock(vb))
	}
	return nil
}

func (t *Thin) WriteZeroes(off, n int64, _ bool) error {
	_, err := t.WriteAt(make([]byte, n), off)
	return err
}

func (t *Thin) Extents(off, n int64) ([]dev.Extent, error) {
	return []dev.Extent{{Off: off, Len: n}}, nil
}

func (t *Thin) Close() error {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	if !t.closed {
		t.closed = true
		t.d.open--
		if !t.ro {
			t.d.writer = false
		}
	}
	return nil
}

func (t *Thin) Size() int64                    { return t.size }
func (t *Thin) Flush() error                   { return nil }
func (t *Thin) BlockSize() int64               { return BlockSize }
func (t *Thin) TryReadAt([]byte, int64) error  { return dev.ErrWouldBlock }
func (t *Thin) TryWriteAt([]byte, int64) error { return dev.ErrWouldBlock }
func (t *Thin) ID() thin.DevID                 { return t.id }
func (t *Thin) ReadOnly() bool                 { return t.ro }
func (t *Thin) Resize(n int64) error           { t.size = n; return nil }
func (t *Thin) MappedBlocks() uint64 {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	return uint64(len(t.d.blocks))
}
