package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"mica/dev"
	"mica/export"
	"mica/export/keep"
	"mica/export/node"
)

// An attachment is a ublk device and its server.
type attachment struct {
	e     *Exporter
	name  string
	d     dev.Device
	s     *server
	flags uint64 // features of the device
	swept uint64 // the sweeper's: requests served when it last looked
	life  *keep.Life

	resizeMu sync.Mutex // one resize

	mu  sync.Mutex
	rec record // guarded by mu after attach
}

func (a *attachment) Name() string { return a.name }

func (a *attachment) Node() string { return nodeOf(a.s.id) }

func (a *attachment) Link() string {
	if p := a.e.links.Path(a.name); p != "" {
		return p
	}
	return a.Node()
}

func (a *attachment) Done() <-chan struct{} { return a.life.Done() }

// cut is told by the server that the driver sends no more requests. If that is not our doing,
// somebody has deleted the device and the attachment is over; Detach still clears it away.
func (a *attachment) cut() {
	if !a.e.names.Closed() {
		a.life.Cut()
	}
}

// Resize tells the kernel the device's size. A file system on the node can then be grown. A node
// does not become shorter. Kernels before Linux 6.16 cannot do it: the error wraps
// dev.ErrUnsupported.
func (a *attachment) Resize(context.Context) error {
	a.resizeMu.Lock()
	defer a.resizeMu.Unlock()
	a.mu.Lock()
	rec := a.rec
	a.mu.Unlock()
	size := a.d.Size()
	switch {
	case size%int64(rec.SectorSize) != 0:
		return fmt.Errorf("resize %q: device of %d bytes: want a multiple of %d", a.name, size, rec.SectorSize)
	case size < rec.Size:
		return fmt.Errorf("resize %q: from %d to %d bytes: nodes do not shrink", a.name, rec.Size, size)
	case size == rec.Size:
		return nil
	case a.flags&featUpdateSize == 0:
		return fmt.Errorf("resize %q: this kernel's ublk devices keep their size (Linux 6.16 can change it): detach and attach it again: %w", a.name, dev.ErrUnsupported)
	}
	if err := updateSize(a.s.id, size>>9); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	a.mu.Lock()
	a.rec.Size = size
	rec = a.rec
	a.mu.Unlock()
	if err := a.e.dir.Put(a.name, rec); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	return nil
}

// Detach takes the node away. If ctx ends first the detach goes on by itself; another call waits
// for the same one.
func (a *attachment) Detach(ctx context.Context) error {
	if err := a.life.Detach(ctx, a.detach); err != nil {
		return fmt.Errorf("detach %q: %w", a.name, err)
	}
	return nil
}

// detach does one teardown: block device, record, server, driver's device. Until the block device
// is stopped everything can be taken back.
func (a *attachment) detach() (gone bool, err error) {
	err = a.e.help.Do(context.Background(), "ublk.stop", "", stopArgs{
		ID: a.rec.ID, Cookie: a.rec.Cookie, Link: a.e.links.Path(a.name), Wait: a.e.o.DetachWait,
	}, nil)
	switch {
	case errors.Is(err, node.ErrGone):
		// Somebody else took the device; the link must not wait for its next owner.
		err = a.e.links.Remove(a.name)
	case errors.Is(err, node.ErrBusy):
		return false, fmt.Errorf("%w: %w", export.ErrBusy, err)
	case err != nil && !errors.Is(err, node.ErrNotSynced):
		return false, err
	}
	errs := []error{err}
	if !a.rec.ReadOnly {
		errs = append(errs, a.d.Flush())
	}
	errs = append(errs, a.e.dir.Drop(a.name))
	a.s.leave()
	a.s.close()
	errs = append(errs, a.e.help.Do(context.Background(), "ublk.delete", "", deleteArgs{a.rec.ID, a.rec.Cookie}, nil))
	errs = append(errs, a.e.links.Unmark(kernelName(a.rec.ID)))
	a.e.names.Settle(a.name, nil)
	return true, errors.Join(errs...)
}

// leave is Close for one attachment: the device stays, and waits.
func (a *attachment) leave() {
	if !a.life.Leave() {
		return
	}
	a.s.leave()
	a.s.close()
	a.e.names.Settle(a.name, nil)
	a.life.End()
}
