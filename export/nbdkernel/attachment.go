package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/keep"
	"mica/export/node"
)

// An attachment is a connected NBD device and its server.
type attachment struct {
	e    *Exporter
	name string
	d    dev.Device
	s    *server
	life *keep.Life

	resizeMu sync.Mutex // one resize

	mu  sync.Mutex
	rec record // guarded by mu after attach
}

func (a *attachment) Name() string { return a.name }

func (a *attachment) Node() string { return nodeOf(a.s.index) }

func (a *attachment) Link() string {
	if p := a.e.links.Path(a.name); p != "" {
		return p
	}
	return a.Node()
}

func (a *attachment) Done() <-chan struct{} { return a.life.Done() }

// cut is told by the server that the device was disconnected. If that is not our doing the
// attachment is over; Detach still clears it away.
func (a *attachment) cut() { a.life.Cut() }

// Resize tells the kernel the device's size. A file system on the node can then be grown. A node
// does not become shorter.
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
	}
	if err := with(func(k *control) error { return k.resize(rec.Index, rec.Backend, size) }); err != nil {
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

// detach does one teardown: device, record, connections. Until the device is disconnected
// everything can be taken back.
func (a *attachment) detach() (gone bool, err error) {
	err = a.e.help.Do(context.Background(), "nbd.disconnect", "", disconnectArgs{
		Index: a.rec.Index, Backend: a.rec.Backend, Link: a.e.links.Path(a.name), Wait: a.e.o.DetachWait,
	}, nil)
	switch {
	case errors.Is(err, node.ErrGone):
		// Somebody else disconnected it; the link must not wait for its next owner.
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
	a.waitGone()
	errs = append(errs, a.e.unmark(a.rec.Index))
	a.e.names.Settle(a.name, nil)
	return true, errors.Join(errs...)
}

// waitGone waits until the kernel has given the device's state back, which it does when the last
// opener is gone; it is in use by nobody but those who came in the last moment.
func (a *attachment) waitGone() {
	for deadline := time.Now().Add(time.Second); a.rec.isThere() && time.Now().Before(deadline); {
		<-time.After(time.Millisecond)
	}
}

// leave is Close for one attachment: the device stays, and waits.
func (a *attachment) leave() {
	if !a.life.Leave() {
		return
	}
	a.s.leave()
	a.e.names.Settle(a.name, nil)
	a.life.End()
}
