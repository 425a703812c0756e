package keep

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"mica/dev"
	"mica/export"
	"mica/export/node"
)

// A Node is a device of a driver in the hands of one attachment, and the server of its requests.
type Node interface {
	// Grow tells the kernel that the device has size bytes now, and writes it into the record.
	Grow(size int64) error
	// Take takes the device away, and link before that, if nobody uses it. Its errors are those
	// of node.Release.
	Take(link string) error
	// Leave ends the serving once everything that was begun is answered. If the device was not
	// taken away it waits for another server.
	Leave()
	// Clear removes what is left of a device that was taken away and is not served any more.
	Clear() error
}

// An Attachment is a device of an Exporter.
type Attachment[R Record, N Node] struct {
	N    N
	e    *Exporter[R, N]
	name string
	path string
	d    dev.Device
	life *Life

	resizeMu sync.Mutex // one resize

	mu    sync.Mutex
	shape Shape // Size is guarded by mu, the rest does not change
}

// Name, Node, Link and Done are those of export.Attachment.
func (a *Attachment[R, N]) Name() string          { return a.name }
func (a *Attachment[R, N]) Node() string          { return a.path }
func (a *Attachment[R, N]) Done() <-chan struct{} { return a.life.Done() }

func (a *Attachment[R, N]) Link() string {
	if p := a.e.Links.Path(a.name); p != "" {
		return p
	}
	return a.path
}

// cut is told by the server that the driver's side is gone. If that is not our doing, somebody has
// taken the device away and the attachment is over; Detach still clears it away.
func (a *Attachment[R, N]) cut() {
	if !a.e.names.Closed() {
		a.life.Cut()
	}
}

func (a *Attachment[R, N]) size() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.shape.Size
}

// Resize tells the kernel the device's size. A file system on the node can then be grown. A node
// does not become shorter. The error wraps dev.ErrUnsupported where the kernel cannot do it.
func (a *Attachment[R, N]) Resize(context.Context) error {
	a.resizeMu.Lock()
	defer a.resizeMu.Unlock()
	size, is, sector := a.d.Size(), a.size(), int64(a.shape.SectorSize)
	switch {
	case size%sector != 0:
		return fmt.Errorf("resize %q: device of %d bytes: want a multiple of %d", a.name, size, sector)
	case size < is:
		return fmt.Errorf("resize %q: from %d to %d bytes: nodes do not shrink", a.name, is, size)
	case size == is:
		return nil
	}
	if err := a.N.Grow(size); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	a.mu.Lock()
	a.shape.Size = size
	a.mu.Unlock()
	return nil
}

// Detach takes the node away. If ctx ends first the detach goes on by itself; another call waits
// for the same one.
func (a *Attachment[R, N]) Detach(ctx context.Context) error {
	if err := a.life.Detach(ctx, a.detach); err != nil {
		return fmt.Errorf("detach %q: %w", a.name, err)
	}
	return nil
}

// detach does one teardown: device, record, server. Until the device is taken away everything can be
// taken back.
func (a *Attachment[R, N]) detach() (gone bool, err error) {
	err = a.N.Take(a.e.Links.Path(a.name))
	switch {
	case errors.Is(err, node.ErrGone):
		// Somebody else took the device; the link must not wait for its next owner.
		err = a.e.Links.Remove(a.name)
	case errors.Is(err, node.ErrBusy):
		return false, fmt.Errorf("%w: %w", export.ErrBusy, err)
	case err != nil && !errors.Is(err, node.ErrNotSynced):
		return false, err
	}
	errs := []error{err}
	if !a.shape.ReadOnly {
		errs = append(errs, a.d.Flush())
	}
	errs = append(errs, a.e.Records.Drop(a.name))
	a.N.Leave()
	errs = append(errs, a.N.Clear())
	errs = append(errs, a.e.Links.Unmark(filepath.Base(a.path)))
	a.e.names.Settle(a.name, nil)
	return true, errors.Join(errs...)
}

// leave is Close for one attachment: the device stays, and waits.
func (a *Attachment[R, N]) leave() {
	if !a.life.Leave() {
		return
	}
	a.N.Leave()
	a.e.names.Settle(a.name, nil)
	a.life.End()
}
