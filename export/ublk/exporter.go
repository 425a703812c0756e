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
	x     exporter
	stop  chan struct{} // closed by Close: ends the sweeper
	wg    sync.WaitGroup
}

var _ export.Exporter = (*Exporter)(nil)

// New makes an exporter and clears away what a predecessor left half done. Survivors stay. The error
// wraps export.ErrUnavailable if this host has no ublk.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, stop: make(chan struct{})}
	if e.feats, err = features(); err == nil {
		err = checkFeatures(e.feats)
	}
	if err != nil {
		return nil, err
	}
	err = e.x.Open(keep.Options{Dir: filepath.Join(o.RunDir, "ublk"), Version: recordVersion, LinkDir: o.LinkDir,
		HelperCommand: o.HelperCommand, Calls: Calls, Errors: Errors, Log: o.Logger}, e.clean)
	if err != nil {
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
		for _, a := range e.x.List() {
			if n := a.N.s.served.Load(); n == a.N.swept {
				a.N.s.bufs.trim()
			} else {
				a.N.swept = n
			}
		}
	}
}

// Attach exports d as /dev/ublkbN. Its size must be a multiple of the sector size. When it returns,
// the node works, the link is there, and a successor of this process can adopt it.
func (e *Exporter) Attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions) (export.Attachment, error) {
	return e.x.Attach(name, d, o, func(o export.AttachOptions, cut func()) (record, *device, error) {
		return e.attach(ctx, name, d, o, cut)
	})
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

func (e *Exporter) attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions, cut func()) (rec record, _ *device, err error) {
	i := devInfo{
		queues: uint16(e.o.Queues), depth: uint16(e.o.Depth), maxIO: maxIO, id: anyID,
		flags: featNeeded | e.feats&(featUpdateSize|featNoPartitionScan), cookie: cookieOf(e.o.RunDir, name),
	}
	if err := addDev(&i); err != nil {
		return rec, nil, err
	}
	id := int(i.id)
	defer func() {
		if err != nil {
			e.x.Help.Do(context.WithoutCancel(ctx), "ublk.delete", "", deleteArgs{id, i.cookie}, nil)
			e.x.Links.Unmark(kernelName(id))
		}
	}()
	if err := e.x.Links.Mark(kernelName(id), e.o.RunDir); err != nil {
		return rec, nil, err
	}
	size := d.Size()
	if err := setParams(id, paramsOf(d, size, o)); err != nil {
		return rec, nil, err
	}
	rec = record{ID: id, Cookie: i.cookie, Shape: keep.Shape{Size: size, SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}}
	n, err := e.serve(name, d, rec, &i, cut)
	if err != nil {
		return rec, nil, err
	}
	defer func() {
		if err != nil {
			n.Leave()
		}
	}()
	if err = e.x.Help.Do(ctx, "ublk.start", "", startArgs{id, os.Getpid()}, nil); err != nil {
		return rec, nil, err
	}
	if err = node.Ensure(nodeOf(id), sysfsBlock(id), unix.S_IFBLK); err != nil {
		return rec, nil, err
	}
	if err = e.x.Records.Put(name, rec); err != nil {
		return rec, nil, err
	}
	if err = e.x.Links.Make(name, nodeOf(id)); err != nil {
		return rec, nil, errors.Join(err, e.x.Records.Drop(name))
	}
	return rec, n, nil
}

// serve starts the server of a device.
func (e *Exporter) serve(name string, d dev.Device, rec record, i *devInfo, cut func()) (*device, error) {
	s, err := newServer(i, d, rec.ReadOnly, &e.o)
	if err != nil {
		return nil, err
	}
	s.onEnd = cut
	if err := s.start(); err != nil {
		s.close()
		return nil, err
	}
	return &device{x: &e.x, name: name, rec: rec, wait: e.o.DetachWait, s: s, flags: i.flags}, nil
}

// Close stops serving. Attachments stay: their requests wait for a successor.
func (e *Exporter) Close() error {
	return e.x.Close(func() {
		close(e.stop)
		e.wg.Wait()
	})
}
