package trial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/thin"
)

var ctx = context.Background()

// Quiet is a logger for pools whose failure is the point of a test.
var Quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// A Trial is one pool under load on recorded memory devices.
type Trial struct {
	Setup Setup
	Log   *dev.CrashLog
	Meta  *dev.Recorder
	Data  *dev.Recorder
	Pool  *user.Pool
	// Judge says whether an error of an operation is to be expected (nil), or what is wrong. By
	// default only a lack of space is.
	Judge func(Op, error) error

	void []uint64 // contents of the external origin

	mu     sync.Mutex
	all    []*Device // guarded by mu, as is the rest
	slots  []*Device // a private slot is its worker's
	txids  []mark    // transaction ids set, and data blocks, with their times
	sizes  []mark
	errors int // expected ones
}

type mark struct {
	value uint64
	span
}

// Start opens the pool on two images, in which there may be devices of an earlier trial with the
// same setup, makes what the setup shares, and opens all. wrap, if not nil, puts something between
// the recorders and the pool.
func Start(s Setup, meta, data *dev.Mem, wrap func(meta, data dev.Device) (dev.Device, dev.Device)) (*Trial, error) {
	t := &Trial{Setup: s, Log: dev.NewCrashLog(), slots: make([]*Device, s.slots())}
	if s.Origin {
		t.void = make([]uint64, s.Sectors)
		for i := range t.void {
			t.void[i] = stampOf(1<<16-1, int64(i), 1)
		}
	}
	m, d := dev.Device(meta), dev.Device(data)
	if s.Jitter != 0 {
		m, d = jitter(m, s.Jitter), jitter(d, s.Jitter+1)
	}
	t.Meta, t.Data = t.Log.WrapOn(m, meta), t.Log.WrapOn(d, data)
	m, d = t.Meta, t.Data
	if wrap != nil {
		m, d = wrap(m, d)
	}
	var err error
	if t.Pool, err = user.New(m, d, s.Options); err != nil {
		return nil, err
	}
	if err := t.adopt(); err != nil {
		return t, err
	}
	for slot := s.Workers * s.Private; slot < s.slots(); slot++ {
		if t.slots[slot] == nil {
			if err := t.create(Op{Kind: Create, Slot: slot}); err != nil {
				return t, err
			}
		}
	}
	return t, nil
}

// jitter makes some requests take a while, flushes more often than others.
func jitter(d dev.Device, seed uint64) dev.Device {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 3))
	f := dev.NewFault(d)
	f.Add(dev.Rule{Pass: true, Before: func(op dev.Op, _, _ int64) {
		mu.Lock()
		k, n := rng.IntN(16), rng.IntN(100)
		mu.Unlock()
		switch {
		case k == 0 || op == dev.OpFlush && k < 5:
			time.Sleep(time.Duration(n) * time.Microsecond)
		case k < 6:
			for range n / 8 {
				runtime.Gosched()
			}
		}
	}})
	return f
}

// Format makes the images of an empty pool.
func Format(s Setup) (meta, data *dev.Mem, err error) {
	meta, data = dev.NewMem(s.MetaBlocks*4096), dev.NewMem(int64(s.DataBlocks)*s.BlockSize)
	err = thin.Format(meta, thin.FormatOptions{DataBlockSize: s.BlockSize, DataBlocks: s.DataBlocks})
	return meta, data, err
}

// adopt takes over the devices that are there, with what they hold now.
func (t *Trial) adopt() error {
	list, err := t.Pool.Devices(ctx)
	if err != nil {
		return err
	}
	st, err := t.Pool.Status(ctx)
	if err != nil {
		return err
	}
	now := t.Log.Now()
	t.txids = []mark{{st.TransactionID, span{now, now}}}
	t.sizes = []mark{{st.DataBlocks, span{now, now}}}
	for _, i := range list {
		slot := int(i.ID) - 1
		if slot < 0 || slot >= len(t.slots) {
			return fmt.Errorf("device %d is not of this trial", i.ID)
		}
		d := t.newDevice(slot, span{now, now})
		if err := t.settle(d, nil, span{}); err != nil {
			return err
		}
	}
	return nil
}

// device ids of slots begin at 1.
func (t *Trial) newDevice(slot int, made span) *Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.Setup.Sectors
	d := &Device{ID: thin.DevID(slot + 1), slot: slot, serial: uint64(len(t.all) + 1), sectors: make([][]version, n),
		base: make([]uint64, n), created: made}
	if t.overOrigin(slot) {
		d.void = t.void
		copy(d.base, t.void)
	}
	t.all = append(t.all, d)
	t.slots[slot] = d
	return d
}

// overOrigin: all devices lie over the external origin, or none; their snapshots need it too.
func (t *Trial) overOrigin(int) bool { return t.Setup.Origin }

func (t *Trial) openOptions(readOnly bool) engine.OpenOptions {
	o := engine.OpenOptions{SizeBytes: t.Setup.Sectors * SectorBytes, ReadOnly: readOnly}
	if t.Setup.Origin {
		// Shorter than the devices: the rest is zeros.
		m := dev.NewMem(o.SizeBytes)
		var b [SectorBytes]byte
		for s, stamp := range t.void {
			fillStamp(b[:], stamp)
			m.WriteAt(b[:], int64(s)*SectorBytes)
		}
		o.ExternalOrigin = m
	}
	return o
}

// settle opens a new device and takes what it holds as its contents at its creation. A snapshot
// must hold what its origin held at some moment of its creation.
func (t *Trial) settle(d, origin *Device, made span) error {
	h, err := t.Pool.Open(ctx, d.ID, t.openOptions(false))
	if err != nil {
		return err
	}
	buf := make([]byte, t.Setup.Sectors*SectorBytes)
	if _, err := h.ReadAt(buf, 0); err != nil {
		h.Close()
		return err
	}
	if origin != nil {
		if err := origin.check(buf, 0, made.begin, made.end, false); err != nil {
			h.Close()
			return fmt.Errorf("snapshot %d: %w", d.ID, err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for s := range d.base {
		b := buf[s*SectorBytes : (s+1)*SectorBytes]
		stamp, whole := readStamp(b)
		if !whole {
			h.Close()
			return fmt.Errorf("thin %d, sector %d is torn", d.ID, s)
		}
		d.base[s] = stamp
	}
	d.h = h // under mu: others peek
	return nil
}

// Run does the operations, each worker its own, and returns the first error that is not expected.
func (t *Trial) Run(l Ops) error {
	per := make([]Ops, t.Setup.Workers)
	for _, o := range l {
		per[o.Worker] = append(per[o.Worker], o)
	}
	errs := make([]error, len(per))
	var wg sync.WaitGroup
	for w, l := range per {
		wg.Add(1)
		go func() {
			defer wg.Done()
			buf := make([]byte, t.Setup.Sectors*SectorBytes)
			for i, o := range l {
				if err := t.expect(o, t.do(o, buf)); err != nil {
					errs[w] = fmt.Errorf("worker %d, operation %d (%v): %w", w, i, o, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	return errors.Join(errs...)
}

// A Wrong is a contradiction between a device and its history: never to be expected.
type Wrong struct{ Err error }

func (w *Wrong) Error() string { return w.Err.Error() }
func (w *Wrong) Unwrap() error { return w.Err }

func (t *Trial) expect(o Op, err error) error {
	if err == nil {
		return nil
	}
	var w *Wrong
	switch {
	case errors.As(err, &w):
		return err
	case t.Judge != nil:
		if err := t.Judge(o, err); err != nil {
			return err
		}
	case !errors.Is(err, dev.ErrNoSpace) && !errors.Is(err, thin.ErrNoMetaSpace):
		return err
	}
	t.mu.Lock()
	t.errors++
	t.mu.Unlock()
	return nil
}

// CheckLive reads all open devices: each holds what was written last.
func (t *Trial) CheckLive() error {
	buf := make([]byte, t.Setup.Sectors*SectorBytes)
	now := t.Log.Now()
	for _, d := range t.all {
		h := d.handle()
		if h == nil {
			continue
		}
		if _, err := h.ReadAt(buf, 0); err != nil {
			return err
		}
		if err := d.check(buf, 0, d.liveSure(now), now, false); err != nil {
			return err
		}
	}
	return nil
}

// EachOpen calls fn with the open devices until it returns an error.
func (t *Trial) EachOpen(fn func(engine.Thin) error) error {
	for _, d := range t.all {
		if h := d.handle(); h != nil {
			if err := fn(h); err != nil {
				return err
			}
		}
	}
	return nil
}

// Errors counts the expected errors so far.
func (t *Trial) Errors() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.errors
}

func (t *Trial) at(slot int) *Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slots[slot]
}

func (t *Trial) do(o Op, buf []byte) error {
	switch o.Kind {
	case Create:
		return t.create(o)
	case Snap, Snap2:
		return t.snap(o)
	case Commit:
		return t.commit()
	case GrowData, GrowMeta:
		return t.grow(o)
	case TxID:
		return t.setTxID()
	case Hold:
		return ignore(t.Pool.ReserveMetadataSnap(ctx), thin.ErrExists)
	case Unhold:
		return ignore(t.Pool.ReleaseMetadataSnap(ctx), thin.ErrNotFound)
	case Trim:
		_, err := t.Pool.Trim(ctx)
		return err
	}
	d := t.at(o.Slot)
	if d == nil || d.handle() == nil {
		return nil
	}
	off, n := o.Off*SectorBytes, o.N*SectorBytes
	switch o.Kind {
	case Delete:
		return t.delete(d)
	case Reopen:
		return t.reopen(d)
	case Flush:
		return t.flush(d)
	case Read:
		if _, err := d.h.ReadAt(buf[:n], off); err != nil {
			return err
		}
		now := t.Log.Now()
		if err := d.check(buf[:n], o.Off, d.liveSure(now), now, false); err != nil {
			return &Wrong{fmt.Errorf("read: %w", err)}
		}
		return nil
	case Peek:
		h := d.handle()
		if h == nil {
			return nil
		}
		if _, err := h.ReadAt(buf[:n], off); err != nil {
			return ignore(err, dev.ErrClosed)
		}
		if err := d.peeked(buf[:n], o.Off); err != nil {
			return &Wrong{fmt.Errorf("peek: %w", err)}
		}
		return nil
	case Discard:
		begin, end := (off+t.Setup.BlockSize-1)/t.Setup.BlockSize*t.Setup.BlockSize, (off+n)/t.Setup.BlockSize*t.Setup.BlockSize
		discard := func() error { return d.h.Discard(off, n) }
		void := func(s int64, _ uint64) uint64 { return d.voidAt(s) }
		if t.Setup.Hints { // never acknowledged
			d.begin(begin/SectorBytes, max(0, end-begin)/SectorBytes, t.Log.Now(), void)
			return discard()
		}
		return t.change(d, begin/SectorBytes, max(0, end-begin)/SectorBytes, void, discard)
	case Zero, ZeroKeep:
		return t.change(d, o.Off, o.N, func(int64, uint64) uint64 { return 0 },
			func() error { return d.h.WriteZeroes(off, n, o.Kind == ZeroKeep) })
	}
	// Write, FUA
	err := t.change(d, o.Off, o.N, func(s int64, number uint64) uint64 {
		stamp := stampOf(d.serial, s, number)
		fillStamp(buf[(s-o.Off)*SectorBytes:(s-o.Off+1)*SectorBytes], stamp)
		return stamp
	}, func() error {
		_, err := d.h.WriteAt(buf[:n], off)
		return err
	})
	if err == nil && o.Kind == FUA {
		err = t.flush(d)
	}
	return err
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

func (t *Trial) change(d *Device, off, n int64, stamp func(int64, uint64) uint64, do func() error) error {
	d.begin(off, n, t.Log.Now(), stamp)
	if err := do(); err != nil {
		return err
	}
	d.done(off, n, t.Log.Now())
	return nil
}

func (t *Trial) flush(d *Device) error {
	begin := t.Log.Now()
	if err := d.h.Flush(); err != nil {
		return err
	}
	d.flushed(span{begin, t.Log.Now()})
	return nil
}

func (t *Trial) commit() error {
	begin := t.Log.Now()
	t.mu.Lock()
	all := append([]*Device(nil), t.all...)
	t.mu.Unlock()
	if err := t.Pool.Commit(ctx); err != nil {
		return err
	}
	end := t.Log.Now()
	for _, d := range all {
		d.flushed(span{begin, end})
	}
	return nil
}

func (t *Trial) create(o Op) error {
	if t.at(o.Slot) != nil {
		return nil
	}
	begin := t.Log.Now()
	err := t.Pool.CreateThin(ctx, thin.DevID(o.Slot+1))
	if err != nil {
		if engineUncertain(err) {
			d := t.newDevice(o.Slot, span{begin, 0})
			d.maybe = true
			t.vacate(o.Slot)
		}
		return err
	}
	d := t.newDevice(o.Slot, span{begin, t.Log.Now()})
	h, err := t.Pool.Open(ctx, d.ID, t.openOptions(false))
	if err == nil {
		d.setHandle(h)
	}
	return err
}

// engineUncertain: the operation failed with the pool, so that it may have happened all the same.
func engineUncertain(err error) bool { return errors.Is(err, engine.ErrFailed) }

func (t *Trial) vacate(slot int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.slots[slot] = nil
}

func (t *Trial) snap(o Op) error {
	d := t.at(o.Slot)
	targets := []int{o.Other, o.Third}[:1+int(o.Kind-Snap)]
	if d == nil {
		return nil
	}
	var pairs []engine.SnapPair
	for _, s := range targets {
		if t.at(s) != nil {
			return nil
		}
		pairs = append(pairs, engine.SnapPair{ID: thin.DevID(s + 1), Origin: d.ID})
	}
	made := span{begin: t.Log.Now()}
	err := t.Pool.CreateSnaps(ctx, pairs)
	made.end = t.Log.Now()
	var made2 []*Device
	for _, slot := range targets {
		if err == nil {
			made2 = append(made2, t.newDevice(slot, made))
		} else if engineUncertain(err) {
			s := t.newDevice(slot, span{made.begin, 0})
			s.maybe, s.madeFrom = true, d
			t.vacate(slot)
		}
	}
	for i, s := range made2 {
		if err := t.settle(s, d, made); err != nil {
			if isDeviceError(err) {
				for _, s := range made2[i:] { // what they hold could not be seen
					s.maybe, s.madeFrom = true, d
				}
				return err
			}
			return &Wrong{err}
		}
		if i > 0 && !t.Setup.shared(o.Slot) && !equal(made2[0].base, s.base) {
			return &Wrong{fmt.Errorf("snapshots %d and %d of one moment differ", targets[0]+1, targets[1]+1)}
		}
	}
	return err
}

// isDeviceError: the medium refused, or the pool, not the contents.
func isDeviceError(err error) bool {
	return errors.Is(err, unix.EIO) || errors.Is(err, engine.ErrFailed) || errors.Is(err, dev.ErrReadOnly)
}

func equal(a, b []uint64) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func (t *Trial) delete(d *Device) error {
	h := d.handle()
	d.setHandle(nil)
	if err := h.Close(); err != nil {
		return err
	}
	d.mu.Lock()
	d.deleted.begin = t.Log.Now()
	d.mu.Unlock()
	t.vacate(d.slot)
	if err := t.Pool.Delete(ctx, d.ID); err != nil {
		return err
	}
	d.mu.Lock()
	d.deleted.end = t.Log.Now()
	d.mu.Unlock()
	return nil
}

func (t *Trial) reopen(d *Device) error {
	old := d.handle()
	d.setHandle(nil)
	if err := old.Close(); err != nil {
		return err
	}
	h, err := t.Pool.Open(ctx, d.ID, t.openOptions(false))
	if err == nil {
		if st, serr := t.Pool.Status(ctx); serr == nil && st.FailReason != "" {
			d.revert()
		}
		d.setHandle(h)
	}
	return err
}

func (t *Trial) grow(o Op) error {
	st, err := t.Pool.Status(ctx)
	if err != nil {
		return err
	}
	if o.Kind == GrowMeta {
		n := int64(st.MetaBlocks) + o.N
		if n > t.Setup.MaxMetaBlocks {
			return nil
		}
		err := t.Pool.GrowMetadata(ctx, n*4096)
		if now, serr := t.Pool.Status(ctx); err != nil && !isDeviceError(err) && serr == nil && int64(now.MetaBlocks) >= n {
			return t.Pool.Commit(ctx) // another worker was quicker, and may not be done
		}
		return err
	}
	n := st.DataBlocks + uint64(o.N)
	if n > t.Setup.MaxDataBlocks {
		return nil
	}
	return t.Grow(n)
}

// Grow makes the data device n blocks long.
func (t *Trial) Grow(n uint64) error {
	return t.noting(&t.sizes, n, func() error {
		return ignoreShrink(t.Pool, n, t.Pool.GrowData(ctx, int64(n)*t.Setup.BlockSize))
	})
}

// noting notes a new value with the time that do takes. An error leaves it open whether it holds.
func (t *Trial) noting(marks *[]mark, value uint64, do func() error) error {
	t.mu.Lock()
	i := len(*marks)
	*marks = append(*marks, mark{value, span{t.Log.Now(), 0}})
	t.mu.Unlock()
	if err := do(); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	(*marks)[i].end = t.Log.Now()
	return nil
}

// ignoreShrink: another worker was quicker, and the pool is longer already; what it did may be on its way
// to the medium yet.
func ignoreShrink(p *user.Pool, n uint64, err error) error {
	if err == nil {
		return nil
	}
	if st, serr := p.Status(ctx); serr == nil && st.DataBlocks > n {
		return p.Commit(ctx)
	}
	return err
}

func (t *Trial) setTxID() error {
	st, err := t.Pool.Status(ctx)
	if err != nil {
		return err
	}
	next := st.TransactionID + 1
	return t.noting(&t.txids, next, func() error {
		err := t.Pool.SetTransactionID(ctx, st.TransactionID, next)
		now, serr := t.Pool.Status(ctx)
		if err != nil && !isDeviceError(err) && serr == nil && now.TransactionID >= next {
			return nil // another worker was quicker
		}
		return err
	})
}

// CloseDevices closes all handles.
func (t *Trial) CloseDevices() error {
	var err error
	for _, d := range t.all {
		if d.h != nil {
			err = errors.Join(err, d.h.Close())
			d.h = nil
		}
	}
	return err
}

// Close closes devices and pool.
func (t *Trial) Close() error { return errors.Join(t.CloseDevices(), t.Pool.Close()) }
