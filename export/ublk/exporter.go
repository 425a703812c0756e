package ublk

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/helper"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// An Exporter exports devices through the kernel's ublk driver. Safe for concurrent use.
//
// Long-lived goroutines: the sweeper (sweepLoop), and the threads of each attachment.
type Exporter struct {
	o     Options
	feats uint64
	dir   records
	lock  *os.File // of dir: one exporter
	links node.Dir
	help  *helper.Client
	stop  chan struct{} // closed by Close: ends the sweeper
	wg    sync.WaitGroup

	mu     sync.Mutex
	atts   map[string]*attachment // guarded by mu; nil value: being attached
	closed bool                   // guarded by mu
}

var _ export.Exporter = (*Exporter)(nil)

// lockWait is how long a start waits for a predecessor that is dying.
const lockWait = 10 * time.Second

// New makes an exporter and clears away what a predecessor left half done. Survivors stay. The error
// wraps export.ErrUnavailable if this host has no ublk.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, dir: records(filepath.Join(o.RunDir, "ublk")), atts: make(map[string]*attachment), stop: make(chan struct{})}
	if e.feats, err = features(); err == nil {
		err = checkFeatures(e.feats)
	}
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(string(e.dir), 0o700); err != nil {
		return nil, fmt.Errorf("ublk exporter: %w", err)
	}
	if e.lock, err = lockDir(string(e.dir)); err != nil {
		return nil, fmt.Errorf("ublk exporter: %w", err)
	}
	e.help = helper.NewClient(o.HelperCommand, Calls, Errors, o.Logger)
	if e.links, err = node.Open(o.LinkDir); err == nil {
		err = e.clean()
	}
	if err != nil {
		e.help.Close()
		e.lock.Close()
		return nil, fmt.Errorf("ublk exporter: %w", err)
	}
	e.wg.Go(e.sweepLoop)
	return e, nil
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; <-time.After(20 * time.Millisecond) {
		err := flockDir(f)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("%s is used by another exporter: %w", dir, err)
		}
	}
}

// Kind is "ublk".
func (e *Exporter) Kind() string { return "ublk" }

// Restartable says that the death of this process is only a pause for users of the nodes.
func (e *Exporter) Restartable() (bool, string) { return true, "" }

// sweepLoop takes the buffers of devices that have nothing to do.
func (e *Exporter) sweepLoop() {
	t := time.NewTicker(e.o.IdleAfter)
	defer t.Stop()
	for {
		select {
		case <-e.stop:
			return
		case <-t.C:
		}
		for _, a := range e.list() {
			if n := a.s.served.Load(); n == a.swept {
				a.s.bufs.trim()
			} else {
				a.swept = n
			}
		}
	}
}

func (e *Exporter) list() []*attachment {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := make([]*attachment, 0, len(e.atts))
	for _, a := range e.atts {
		if a != nil {
			list = append(list, a)
		}
	}
	return list
}

// claim takes a name for an attach or adopt under way.
func (e *Exporter) claim(name string) error {
	if err := node.CheckID(name); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return dev.ErrClosed
	}
	if _, ok := e.atts[name]; ok {
		return export.ErrExists
	}
	e.atts[name] = nil
	return nil
}

// settle ends a claim: with the attachment, or nil if there is none.
func (e *Exporter) settle(name string, a *attachment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if a == nil {
		delete(e.atts, name)
	} else {
		e.atts[name] = a
	}
}

// Attach exports d as /dev/ublkbN. Its size must be a multiple of the sector size. When it returns,
// the node works, the link is there, and a successor of this process can adopt it.
func (e *Exporter) Attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions) (export.Attachment, error) {
	if o.SectorSize == 0 {
		o.SectorSize = 512
	}
	if s := o.SectorSize; s < 512 || s > 4096 || s&(s-1) != 0 {
		return nil, fmt.Errorf("attach %q: sector size %d: want 512, 1024, 2048 or 4096", name, s)
	}
	if size := d.Size(); size <= 0 || size%int64(o.SectorSize) != 0 {
		return nil, fmt.Errorf("attach %q: device of %d bytes: want a multiple of %d", name, size, o.SectorSize)
	}
	if err := e.claim(name); err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	a, err := e.attach(ctx, name, d, o)
	e.settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	return a, nil
}

// paramsOf says what the block device is like.
func paramsOf(d dev.Device, size int64, o export.AttachOptions) *params {
	shift := uint8(bits.TrailingZeros(uint(o.SectorSize)))
	p := &params{logicalShift: shift, physicalShift: shift, optimal: shift, maxSectors: maxIO >> 9, sectors: uint64(size) >> 9}
	if o.ReadOnly {
		p.attrs = attrReadOnly
		return p
	}
	p.attrs = attrVolatileCache | attrFUA
	block := int64(o.SectorSize)
	if b, ok := d.(dev.BlockSizer); ok && b.BlockSize() > block && b.BlockSize() <= 1<<30 && b.BlockSize()%block == 0 {
		block = b.BlockSize()
		if block&(block-1) == 0 {
			p.optimal = uint8(bits.TrailingZeros64(uint64(block)))
		}
	}
	if _, ok := d.(dev.Discarder); ok {
		p.granularity = uint32(block)
	}
	return p
}

func (e *Exporter) attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions) (_ *attachment, err error) {
	if rec, err := e.dir.get(name); err != nil {
		return nil, err
	} else if rec != nil {
		return nil, fmt.Errorf("survivor of that name: %w", export.ErrExists)
	}
	i := devInfo{
		queues: uint16(e.o.Queues), depth: uint16(e.o.Depth), maxIO: maxIO, id: anyID,
		flags: featNeeded | e.feats&(featUpdateSize|featNoPartitionScan), cookie: cookieOf(e.o.RunDir, name),
	}
	if err := addDev(&i); err != nil {
		return nil, err
	}
	id := int(i.id)
	defer func() {
		if err != nil {
			e.help.Do(context.WithoutCancel(ctx), "ublk.delete", "", deleteArgs{id, i.cookie}, nil)
		}
	}()
	size := d.Size()
	if err := setParams(id, paramsOf(d, size, o)); err != nil {
		return nil, err
	}
	a := &attachment{e: e, name: name, d: d, flags: i.flags, done: make(chan struct{})}
	a.rec = record{Version: recordVersion, ID: id, Cookie: i.cookie, Size: size, SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}
	if a.s, err = newServer(&i, d, o.ReadOnly, &e.o); err != nil {
		return nil, err
	}
	a.s.onEnd = a.cut
	if err = a.s.start(); err != nil {
		a.s.close()
		return nil, err
	}
	defer func() {
		if err != nil {
			a.s.leave()
			a.s.close()
		}
	}()
	if err = e.help.Do(ctx, "ublk.start", "", startArgs{id, os.Getpid()}, nil); err != nil {
		return nil, err
	}
	if err = ensureNode(nodeOf(id), sysfsBlock(id), unix.S_IFBLK); err != nil {
		return nil, err
	}
	if err = e.dir.put(name, a.rec); err != nil {
		return nil, err
	}
	if err = e.links.Make(name, nodeOf(id)); err != nil {
		return nil, errors.Join(err, e.dir.drop(name))
	}
	return a, nil
}

// Close stops serving. Attachments stay: their requests wait for a successor.
func (e *Exporter) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()
	close(e.stop)
	e.wg.Wait()
	var wg sync.WaitGroup
	for _, a := range e.list() {
		wg.Go(a.leave)
	}
	wg.Wait()
	e.help.Close()
	return e.lock.Close()
}
