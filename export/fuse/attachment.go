package fuse

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/loop"

	"golang.org/x/sys/unix"
)

// An attachment is a served FUSE connection with a loop device on its file.
//
// States: serving -> (detach) -> ended, serving -> (leave) -> ended. A detach that is refused
// goes back to serving. One goroutine (teardown) does a detach, also when the caller who asked
// for it no longer waits.
type attachment struct {
	e    *Exporter
	name string
	d    dev.Device
	s    *server
	done chan struct{} // closed when ended
	once sync.Once     // closes done

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

func newAttachment(e *Exporter, name string, d dev.Device) *attachment {
	return &attachment{e: e, name: name, d: d, done: make(chan struct{})}
}

func (a *attachment) Name() string { return a.name }

func (a *attachment) Node() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rec.Loop.Node
}

func (a *attachment) Link() string {
	if p := a.e.links.Path(a.name); p != "" {
		return p
	}
	return a.Node()
}

func (a *attachment) Done() <-chan struct{} { return a.done }

func (a *attachment) finish() { a.once.Do(func() { close(a.done) }) }

// cut is told by the server that the connection has ended. If that is not the doing of a detach,
// the attachment is over; Detach still clears it away.
func (a *attachment) cut() {
	a.mu.Lock()
	ours := a.leaving != nil
	a.mu.Unlock()
	if !ours {
		a.finish()
	}
}

// shut stops the server and closes the descriptor.
func (a *attachment) shut() {
	a.s.stop()
	a.e.park.forget(a.s)
	a.s.close()
	unix.Close(a.s.fd)
}

func (a *attachment) record() record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rec
}

func (a *attachment) detachArgs() detachArgs {
	return detachArgs{
		Device: a.rec.Loop, Backing: a.e.backing(a.name), Link: a.e.links.Path(a.name), Wait: a.e.o.DetachWait,
	}
}

// Resize tells the kernel the device's size. A file system on the node can then be grown. A node
// does not become shorter.
func (a *attachment) Resize(ctx context.Context) error {
	a.resizeMu.Lock()
	defer a.resizeMu.Unlock()
	rec := a.record()
	size := a.d.Size()
	switch {
	case size%int64(rec.SectorSize) != 0:
		return fmt.Errorf("resize %q: device of %d bytes: want a multiple of %d", a.name, size, rec.SectorSize)
	case size < rec.Size:
		return fmt.Errorf("resize %q: from %d to %d bytes: nodes do not shrink", a.name, rec.Size, size)
	}
	if err := a.s.resized(size); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	if err := a.e.help.Do(ctx, "loop.resize", "", resizeArgs{Node: rec.Loop.Node, Backing: a.e.backing(a.name)}, nil); err != nil {
		return fmt.Errorf("resize %q: %w", a.name, err)
	}
	a.mu.Lock()
	a.rec.Size = size
	rec = a.rec
	a.mu.Unlock()
	if a.e.held(rec) {
		if err := a.e.keep.set(a.name, rec); err != nil {
			return fmt.Errorf("resize %q: %w", a.name, err)
		}
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

// detach does one teardown: loop device, then mount, then connection. Until the loop device is
// gone everything can be taken back.
func (a *attachment) detach(t *teardown) {
	err := a.e.help.Do(context.Background(), "loop.detach", "", a.detachArgs(), nil)
	switch {
	case errors.Is(err, loop.ErrNotBound):
		// Somebody else took the device; the link must not wait for its next owner.
		err = a.e.links.Remove(a.name)
	case err != nil && !errors.Is(err, loop.ErrNotSynced):
		if errors.Is(err, loop.ErrBusy) {
			err = fmt.Errorf("%w: %w", export.ErrBusy, err)
		}
		a.mu.Lock()
		a.leaving = nil
		a.mu.Unlock()
		t.err = err
		close(t.done)
		return
	}
	a.e.reap.free(a.rec.Loop)
	errs := []error{err}
	if !a.rec.ReadOnly {
		errs = append(errs, a.d.Flush())
	}
	errs = append(errs, unmount(a.rec.Dir))
	if a.e.held(a.rec) {
		errs = append(errs, a.e.keep.drop(a.name))
	}
	a.shut()
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

// leave is Close for one attachment.
func (a *attachment) leave() error {
	a.mu.Lock()
	t, ended := a.leaving, a.ended
	a.mu.Unlock()
	if ended {
		return nil
	}
	if t != nil {
		<-t.done
		if t.err == nil {
			return nil
		}
	}
	if a.e.keep != nil {
		a.s.stop() // everything that was read is answered
		err := a.e.keep.leave(a.name, a.rec, a.s.fd)
		if err == nil {
			a.shut()
			a.end()
			return nil
		}
		a.e.o.Logger.Error("hand over to holder", "name", a.name, "error", err)
		a.shut()
	} else {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		err := a.Detach(ctx)
		if err == nil {
			return nil
		}
		defer a.shut()
		defer func() { a.e.o.Logger.Error("close while in use", "name", a.name, "error", err) }()
	}
	err := fmt.Errorf("close %q: %w: cut off", a.name, export.ErrBusy)
	a.e.removeMount(a.name)
	a.end()
	return err
}
