package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/internal/dmioctl"
	"mica/thin"
)

// A Thin is an open thin device: a thin target with a node of its own, which others may use beside
// this process (Node). It implements engine.Thin. Safe for concurrent use.
//
// ReadAt and WriteAt go past the page cache: a write that has returned is in the next snapshot.
type Thin struct {
	p        *Pool
	id       thin.DevID
	readOnly bool
	origin   dev.Device // external origin, or nil
	opened   int64      // Pool.events.lossy when it was opened; -1: nobody watched before
	under    *medium    // loop device of an external origin that is a file

	mu     sync.RWMutex // held for reading by requests, for writing by changes of node and length
	n      *direct      // guarded by mu
	name   string       // of the device; guarded by mu
	info   dmioctl.Info // guarded by mu
	size   atomic.Int64
	keep   atomic.Bool
	closed atomic.Bool
	once   sync.Once
	err    error // of Close
}

var _ engine.Thin = (*Thin)(nil)

// Open makes the device's node, or takes over the one that a predecessor left.
func (p *Pool) Open(ctx context.Context, id thin.DevID, o engine.OpenOptions) (engine.Thin, error) {
	t, err := p.openThin(ctx, id, o)
	if err != nil {
		return nil, fmt.Errorf("open thin %d: %w", id, err)
	}
	return t, nil
}

func (p *Pool) openThin(ctx context.Context, id thin.DevID, o engine.OpenOptions) (_ *Thin, err error) {
	if err := checkSize(o.SizeBytes); err != nil {
		return nil, err
	}
	if err := checkID("open", id); err != nil {
		return nil, err
	}
	if p.opts.ReadOnly && !o.ReadOnly {
		return nil, fmt.Errorf("for writing: %w: the pool was opened read-only", dev.ErrReadOnly)
	}
	defer p.names.lock(id)()
	if err := p.claim(id, o.ReadOnly); err != nil {
		return nil, err
	}
	t := &Thin{p: p, id: id, readOnly: o.ReadOnly, origin: o.ExternalOrigin, opened: p.events.lossy.Load()}
	t.size.Store(o.SizeBytes)
	defer func() {
		if err != nil {
			t.under.release()
			p.release(id, o.ReadOnly)
		}
	}()
	table, err := t.table(ctx)
	if err != nil {
		return nil, err
	}
	if o.ReadOnly {
		t.info, t.name, err = p.makeView(id, table)
	} else {
		t.name = thinName(p.id, id)
		var found bool
		t.info, found, err = p.makeThin(t.name, table)
		if found && p.events.before {
			t.opened = -1
		}
	}
	if err != nil {
		return nil, p.openErr(err)
	}
	if err = ensureNode(t.info.Node(), t.info.Dev); err == nil {
		t.n, err = openDirect(t.info.Node(), o.ReadOnly)
	}
	if err != nil {
		return nil, errors.Join(err, p.dm.Remove(t.name, false))
	}
	return t, nil
}

// table is the device's table line, with its present length.
func (t *Thin) table(ctx context.Context) (dmioctl.Target, error) {
	origin := ""
	if t.origin != nil {
		var err error
		if origin, err = t.originNumber(ctx); err != nil {
			return dmioctl.Target{}, err
		}
	}
	return dmioctl.ThinTarget(t.p.num, uint32(t.id), uint64(t.size.Load()/sectorSize), origin), nil
}

// openErr explains the errno of a thin target's table.
func (p *Pool) openErr(err error) error {
	switch {
	case errors.Is(err, unix.ENODATA):
		return thin.ErrNotFound
	case errors.Is(err, unix.EINVAL):
		if st, serr := p.poolStatus(true); serr == nil && st.Failed {
			return fmt.Errorf("%w: %w", p.writable(), err)
		}
	}
	return err
}

// claim notes that a device is open. One writer, or readers.
func (p *Pool) claim(id thin.DevID, readOnly bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return dev.ErrClosed
	}
	h := p.open[id]
	switch {
	case h == nil:
		h = &handles{}
		p.open[id] = h
	case h.writer:
		return fmt.Errorf("it is open for writing: %w", engine.ErrInUse)
	case !readOnly:
		return fmt.Errorf("it is open read-only, %d times: %w", h.readers, engine.ErrInUse)
	}
	if readOnly {
		h.readers++
	} else {
		h.writer = true
	}
	return nil
}

func (p *Pool) release(id thin.DevID, readOnly bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.open[id]
	if readOnly {
		h.readers--
	} else {
		h.writer = false
	}
	if !h.writer && h.readers == 0 {
		delete(p.open, id)
	}
}

// makeThin makes the writable node of a device, or takes over a leftover one (found): then only
// what differs is changed, so that whoever has it mounted notices nothing.
func (p *Pool) makeThin(name string, table dmioctl.Target) (info dmioctl.Info, found bool, err error) {
	info, err = p.activateThin(name, false, table)
	if !errors.Is(err, unix.EBUSY) {
		return info, false, err
	}
	info, ierr := p.dm.Info(name)
	if ierr != nil || info.UUID != name {
		return info, false, errors.Join(err, ierr)
	}
	if err := p.dm.CancelRemove(name); err != nil {
		return info, false, err
	}
	live, err := p.dm.Table(name)
	if err != nil {
		return info, false, err
	}
	if len(live) != 1 || live[0].Type != table.Type || live[0].Params != table.Params || live[0].Length != table.Length {
		if err := p.reloadThin(name, false, table); err != nil {
			return info, false, err
		}
	}
	p.takeLeftover(name)
	return info, true, nil
}

// suspendedWait is how long an active pool that others suspend (to make it longer) is waited for.
const suspendedWait = 10 * time.Second

// activateThin makes a thin device's node while the pool is not suspended.
func (p *Pool) activateThin(name string, readOnly bool, table dmioctl.Target) (info dmioctl.Info, err error) {
	err = p.whileRunning(func() error {
		info, err = p.dm.Activate(name, name, readOnly, table)
		return err
	})
	return info, err
}

func (p *Pool) reloadThin(name string, readOnly bool, table dmioctl.Target) error {
	return p.whileRunning(func() error { return p.dm.Reload(name, readOnly, true, true, table) })
}

// whileRunning calls fn while this process does not suspend the pool, and again if somebody else
// did.
func (p *Pool) whileRunning(fn func() error) error {
	p.tableMu.RLock()
	defer p.tableMu.RUnlock()
	for deadline := time.Now().Add(suspendedWait); ; {
		err := fn()
		if !errors.Is(err, unix.EINVAL) || time.Now().After(deadline) {
			return err
		}
		info, ierr := p.dm.Info(p.name)
		if ierr != nil || !info.Suspended() {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// makeView makes a read-only node.
func (p *Pool) makeView(id thin.DevID, table dmioctl.Target) (dmioctl.Info, string, error) {
	for {
		name := viewName(p.id, id, p.views.Add(1))
		info, err := p.activateThin(name, true, table)
		if !errors.Is(err, unix.EBUSY) {
			return info, name, err
		}
		if _, ierr := p.dm.Info(name); ierr != nil {
			return info, name, err // it was not the name that was taken
		}
	}
}

func (t *Thin) ID() thin.DevID { return t.id }

func (t *Thin) ReadOnly() bool { return t.readOnly }

func (t *Thin) Size() int64 { return t.size.Load() }

// BlockSize is the pool's data block size in bytes.
func (t *Thin) BlockSize() int64 { return t.p.bs }

// Node is the path of the block device.
func (t *Thin) Node() string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.info.Node()
}

// KeepNode says whether the node stays when the device is closed.
func (t *Thin) KeepNode(keep bool) { t.keep.Store(keep) }

// AdoptNode makes the device use a node that a predecessor left. A writable device has it already.
func (t *Thin) AdoptNode(node string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.info.Node() == node {
		return nil
	}
	var l *leftover
	t.p.mu.Lock()
	for _, o := range t.p.left {
		if o.node == node && o.id == t.id && o.readOnly == t.readOnly {
			l = o
			delete(t.p.left, o.name)
			break
		}
	}
	t.p.mu.Unlock()
	if l == nil {
		return fmt.Errorf("thin %d: %s is not a node of it that a predecessor left", t.id, node)
	}
	putBack := func(err error) error {
		t.p.mu.Lock()
		t.p.left[l.name] = l
		t.p.mu.Unlock()
		return fmt.Errorf("thin %d: adopt %s: %w", t.id, node, err)
	}
	info, err := t.p.dm.Info(l.name)
	if err == nil {
		err = t.p.dm.CancelRemove(l.name)
	}
	if err != nil {
		return putBack(err)
	}
	n, err := openDirect(node, t.readOnly)
	if err != nil {
		return putBack(err)
	}
	old, oldName := t.n, t.name
	t.n, t.name, t.info = n, l.name, info
	return errors.Join(old.Close(), t.p.dm.Remove(oldName, false))
}

// use calls fn with the node while the handle is open.
func (t *Thin) use(what string, write bool, fn func(n *direct) error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	switch {
	case t.closed.Load():
		return t.ioErr(what, dev.ErrClosed)
	case write && t.readOnly:
		return t.ioErr(what, fmt.Errorf("%w: it was opened read-only", dev.ErrReadOnly))
	}
	return t.ioErr(what, fn(t.n))
}

func (t *Thin) ReadAt(p []byte, off int64) (int, error) {
	n, end := dev.CheckRead(off, len(p), t.size.Load())
	err := t.use("read", false, func(d *direct) error {
		if n == 0 {
			return nil
		}
		m, err := d.ReadAt(p[:n], off)
		if m == n && err == io.EOF {
			err = nil
		}
		if err != nil {
			n = m
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return n, end
}

func (t *Thin) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	err := t.use("write", true, func(d *direct) error {
		if err := dev.CheckRange(off, int64(len(p)), t.size.Load()); err != nil {
			return err
		}
		var err error
		n, err = d.WriteAt(p, off)
		return err
	})
	return n, err
}

// WriteAtNoWait is WriteAt: whether a write would have to wait for space, only the kernel knows.
func (t *Thin) WriteAtNoWait(p []byte, off int64) (int, error) { return t.WriteAt(p, off) }

// TryReadAt and TryWriteAt: the kernel may always wait.
func (t *Thin) TryReadAt([]byte, int64) error { return dev.ErrWouldBlock }

func (t *Thin) TryWriteAt([]byte, int64) error { return dev.ErrWouldBlock }

// Flush makes every write acknowledged before the call durable.
func (t *Thin) Flush() error {
	if t.readOnly {
		return t.use("flush", false, func(*direct) error { return nil })
	}
	return t.use("flush", true, (*direct).Flush)
}

// Discard unmaps the whole blocks inside the range. With blocks whose size is no power of two the
// kernel's block layer cuts requests at places that are no block boundaries, and some blocks stay
// mapped.
func (t *Thin) Discard(off, n int64) error {
	return t.use("discard", true, func(d *direct) error {
		if err := dev.CheckRange(off, n, t.size.Load()); err != nil {
			return err
		}
		begin, end := (off+t.p.bs-1)/t.p.bs*t.p.bs, (off+n)/t.p.bs*t.p.bs
		if off+n == t.size.Load() {
			// The kernel counts the last, shorter block as a whole one only if it is asked to.
			end = off + n
		}
		if begin >= end {
			return nil
		}
		err := d.discard(begin, end-begin)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("%w: the pool ignores discards", dev.ErrUnsupported)
		}
		return err
	})
}

// zeroChunk is how much is read at a time to see whether a discard has left zeros.
const zeroChunk = 1 << 20

// WriteZeroes makes the range read as zeros. Whole blocks are unmapped where the device has no
// external origin and keepAllocated is not wanted.
func (t *Thin) WriteZeroes(off, n int64, keepAllocated bool) error {
	return t.use("write zeroes", true, func(d *direct) error {
		if err := dev.CheckRange(off, n, t.size.Load()); err != nil {
			return err
		}
		bs := t.p.bs
		begin, end := (off+bs-1)/bs*bs, (off+n)/bs*bs
		if keepAllocated || t.origin != nil || begin >= end {
			return t.zeroOut(d, off, n)
		}
		if err := t.zeroOut(d, off, begin-off); err != nil {
			return err
		}
		if err := t.zeroOut(d, end, off+n-end); err != nil {
			return err
		}
		if err := d.discard(begin, end-begin); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		// A discard is a hint: a pool without discards, or without metadata to spare, takes it and
		// does nothing.
		buf := aligned(zeroChunk)
		for at := begin; at < end; at += zeroChunk {
			b := buf[:min(zeroChunk, end-at)]
			if _, err := d.ReadAt(b, at); err != nil && err != io.EOF {
				return err
			}
			if !allZero(b) {
				if err := t.zeroOut(d, at, int64(len(b))); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// zeroOut writes zeros: whole sectors by the kernel, the rest from here.
func (t *Thin) zeroOut(d *direct, off, n int64) error {
	if n <= 0 {
		return nil
	}
	begin, end := (off+d.sector-1)/d.sector*d.sector, (off+n)/d.sector*d.sector
	if begin >= end {
		_, err := d.WriteAt(make([]byte, n), off)
		return err
	}
	if begin > off {
		if _, err := d.WriteAt(make([]byte, begin-off), off); err != nil {
			return err
		}
	}
	if off+n > end {
		if _, err := d.WriteAt(make([]byte, off+n-end), end); err != nil {
			return err
		}
	}
	return d.zero(begin, end-begin)
}

// MappedBlocks counts what is mapped now, as the kernel has it in memory; 0 if it cannot tell.
func (t *Thin) MappedBlocks() uint64 {
	t.mu.RLock()
	name := t.name
	t.mu.RUnlock()
	mapped, _, _, err := t.p.dm.ThinStatus(name)
	if err != nil {
		return 0
	}
	return mapped * sectorSize / uint64(t.p.bs)
}

// Resize changes the length; whoever has the node open sees it at once.
func (t *Thin) Resize(sizeBytes int64) error {
	if err := checkSize(sizeBytes); err != nil {
		return fmt.Errorf("resize thin %d: %w", t.id, err)
	}
	defer t.p.names.lock(t.id)()
	t.mu.RLock() // requests that wait for space do not hold this up
	defer t.mu.RUnlock()
	if t.closed.Load() {
		return t.ioErr("resize", dev.ErrClosed)
	}
	before := t.size.Swap(sizeBytes)
	table, err := t.table(context.Background())
	if err == nil {
		err = t.p.reloadThin(t.name, t.readOnly, table)
	}
	if err != nil {
		t.size.Store(before)
		return fmt.Errorf("resize thin %d: %w", t.id, err)
	}
	return nil
}

// Close waits for requests in flight and removes the node, unless it is to be kept. It does not
// flush. If somebody has the node open, it goes with its last user, and the error is ErrInUse.
func (t *Thin) Close() error {
	t.once.Do(func() {
		unlock := t.p.names.lock(t.id)
		defer unlock()
		t.closed.Store(true)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.err = t.n.Close()
		keep := t.keep.Load()
		if !keep {
			if err := t.p.removeNode(context.Background(), t.name, t.info.Dev, t.info.Node()); err != nil {
				t.err = errors.Join(t.err, fmt.Errorf("close thin %d: %w", t.id, err), t.p.dm.Remove(t.name, true))
				t.p.mu.Lock()
				t.p.left[t.name] = &leftover{t.name, t.id, t.readOnly, t.info.Node(), t.info.Dev}
				t.p.mu.Unlock()
			}
		}
		if !keep {
			t.under.release()
		}
		t.p.mu.Lock()
		if keep {
			t.p.kept++
		}
		t.p.mu.Unlock()
		t.p.release(t.id, t.readOnly)
	})
	return t.err
}

// Lost reports whether writes to the device may have failed since it was opened without anybody
// being told: the pool was in a state in which it fails writes.
func (t *Thin) Lost() bool { return t.p.events.lossy.Load() != t.opened }
