package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"mica/dev"
	"mica/export"
	"mica/export/node"
)

// An attachment is a ublk device and its server.
//
// States: serving -> (detach) -> ended, serving -> (leave) -> ended. A detach that is refused
// goes back to serving. One goroutine (teardown) does a detach, also when the caller who asked
// for it no longer waits.
type attachment struct {
	e     *Exporter
	name  string
	d     dev.Device
	s     *server
	flags uint64 // features of the device
	swept uint64 // the sweeper's: requests served when it last looked
	done  chan struct{}
	once  sync.Once // closes done

	resizeMu sync.Mutex // one resize

	mu      sync.Mutex
	rec     record    // guarded by mu after attach
	ended   bool      // guarded by mu
	leaving *teardown // guarded by mu; under way
}

// A teardown is a detach under way.
type teardown struct {
	done chan struct{}
	err  error // valid after done
}

func (a *attachment) Name() string { return a.name }

func (a *attachment) Node() string { return nodeOf(a.s.id) }

func (a *attachment) Link() string {
	if p := a.e.links.Path(a.name); p != "" {
		return p
	}
	return a.Node()
}

func (a *attachment) Done() <-chan struct{} { return a.done }

func (a *attachment) finish() { a.once.Do(func() { close(a.done) }) }

// cut is told by the server that the driver sends no more requests. If that is not our doing,
// somebody has deleted the device and the attachment is over; Detach still clears it away.
func (a *attachment) cut() {
	a.mu.Lock()
	ours := a.leaving != nil || a.ended
	a.mu.Unlock()
	if !ours && !a.e.isClosed() {
		a.finish()
	}
}

func (e *Exporter) isClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
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
	if err := a.e.dir.put(a.name, rec); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	return nil
}

// Detach takes the node away. If ctx ends first the detach goes on by itself; another call waits
// for the same one.
func (a *attachment) Detach(ctx context.Context) error {
	a.mu.Lock()
	if a.ended {
		a.mu.Unlock()
		return nil
	}
	t := a.leaving
	if t == nil {
		t = &teardown{done: make(chan struct{})}
		a.leaving = t
		go a.detach(t)
	}
	a.mu.Unlock()
	select {
	case <-t.done:
	case <-ctx.Done():
		return fmt.Errorf("detach %q: still under way: %w", a.name, ctx.Err())
	}
	if t.err != nil {
		return fmt.Errorf("detach %q: %w", a.name, t.err)
	}
	return nil
}

// detach does one teardown: block device, record, server, driver's device. Until the block device
// is stopped everything can be taken back.
func (a *attachment) detach(t *teardown) {
	err := a.e.help.Do(context.Background(), "ublk.stop", "", stopArgs{
		ID: a.rec.ID, Cookie: a.rec.Cookie, Link: a.e.links.Path(a.name), Wait: a.e.o.DetachWait,
	}, nil)
	switch {
	case errors.Is(err, node.ErrGone):
		// Somebody else took the device; the link must not wait for its next owner.
		err = a.e.links.Remove(a.name)
	case err != nil && !errors.Is(err, node.ErrNotSynced):
		if errors.Is(err, node.ErrBusy) {
			err = fmt.Errorf("%w: %w", export.ErrBusy, err)
		}
		a.mu.Lock()
		a.leaving = nil
		a.mu.Unlock()
		t.err = err
		close(t.done)
		return
	}
	errs := []error{err}
	if !a.rec.ReadOnly {
		errs = append(errs, a.d.Flush())
	}
	errs = append(errs, a.e.dir.drop(a.name))
	a.s.leave()
	a.s.close()
	errs = append(errs, a.e.help.Do(context.Background(), "ublk.delete", "", deleteArgs{a.rec.ID, a.rec.Cookie}, nil))
	a.end()
	t.err = errors.Join(errs...)
	close(t.done)
}

// end marks the attachment as ended and gives its name back.
func (a *attachment) end() {
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.e.settle(a.name, nil)
	a.finish()
}

// leave is Close for one attachment: the device stays, and waits.
func (a *attachment) leave() {
	a.mu.Lock()
	t, ended := a.leaving, a.ended
	a.mu.Unlock()
	if t != nil {
		<-t.done
		ended = t.err == nil
	}
	if ended {
		return
	}
	a.s.leave()
	a.s.close()
	a.end()
}
