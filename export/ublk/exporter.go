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
	"mica/export/keep"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// An Exporter exports devices through the kernel's ublk driver. Safe for concurrent use.
//
// Long-lived goroutines: the sweeper (sweepLoop), and the threads of each attachment.
type Exporter struct {
	o     Options
	feats uint64
	dir   keep.Records[record]
	lock  *os.File // of dir: one exporter
	links node.Dir
	help  *helper.Client
	stop  chan struct{} // closed by Close: ends the sweeper
	wg    sync.WaitGroup

	names keep.Names[attachment]
}

var _ export.Exporter = (*Exporter)(nil)

// New makes an exporter and clears away what a predecessor left half done. Survivors stay. The error
// wraps export.ErrUnavailable if this host has no ublk.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, dir: keep.Records[record]{Dir: filepath.Join(o.RunDir, "ublk"), Version: recordVersion}, stop: make(chan struct{})}
	if e.feats, err = features(); err == nil {
		err = checkFeatures(e.feats)
	}
	if err != nil {
		return nil, err
	}
	if e.lock, err = keep.Lock(e.dir.Dir); err != nil {
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
		for _, a := range e.names.List() {
			if n := a.s.served.Load(); n == a.swept {
				a.s.bufs.trim()
			} else {
				a.swept = n
			}
		}
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
	if err := e.names.Claim(name); err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	a, err := e.attach(ctx, name, d, o)
	e.names.Settle(name, a)
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
	if rec, err := e.dir.Get(name); err != nil {
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
			e.links.Unmark(kernelName(id))
		}
	}()
	if err := e.links.Mark(kernelName(id), e.o.RunDir); err != nil {
		return nil, err
	}
	size := d.Size()
	if err := setParams(id, paramsOf(d, size, o)); err != nil {
		return nil, err
	}
	a := &attachment{e: e, name: name, d: d, flags: i.flags, life: keep.NewLife()}
	a.rec = record{ID: id, Cookie: i.cookie, Size: size, SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}
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
	if err = e.dir.Put(name, a.rec); err != nil {
		return nil, err
	}
	if err = e.links.Make(name, nodeOf(id)); err != nil {
		return nil, errors.Join(err, e.dir.Drop(name))
	}
	return a, nil
}

// Close stops serving. Attachments stay: their requests wait for a successor.
func (e *Exporter) Close() error {
	if !e.names.Close() {
		return nil
	}
	close(e.stop)
	e.wg.Wait()
	var wg sync.WaitGroup
	for _, a := range e.names.List() {
		wg.Go(a.leave)
	}
	wg.Wait()
	e.help.Close()
	return e.lock.Close()
}
