package keep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/helper"
	"mica/export/node"
)

// A Shape is what every record says of its device.
type Shape struct {
	Size       int64 `json:"size"` // bytes, as the kernel was told last
	SectorSize int   `json:"sector_size"`
	ReadOnly   bool  `json:"read_only"`
}

// Common returns the shape of a record that embeds it.
func (s Shape) Common() Shape { return s }

// A Record is what the next exporter must know about a device. There is one from the moment the
// node works until its link is gone: a device of ours that has none was never given to anybody, or
// was being taken away.
type Record interface {
	Common() Shape
	Path() string  // of the node
	IsThere() bool // the device is still there, and still that one
}

// An Exporter is what exporters have in common whose nodes are devices of one of the kernel's
// drivers: R is a record of one, N the device in our hands. Safe for concurrent use after Open.
type Exporter[R Record, N Node] struct {
	Records Records[R]
	Links   node.Dir
	Help    *helper.Client
	Log     *slog.Logger

	names Names[Attachment[R, N]]
	lock  *os.File // of the records' directory: one exporter
}

// Options of an Exporter.
type Options struct {
	Dir           string // of the records
	Version       int    // of the records
	LinkDir       string
	HelperCommand []string
	Calls         helper.Calls
	Errors        helper.Errors
	Log           *slog.Logger
}

// Open takes the directory, and lets clean clear away what a predecessor left half done.
func (e *Exporter[R, N]) Open(o Options, clean func() error) (err error) {
	e.Records, e.Log = Records[R]{Dir: o.Dir, Version: o.Version}, o.Log
	if e.lock, err = Lock(o.Dir); err != nil {
		return err
	}
	e.Help = helper.NewClient(o.HelperCommand, o.Calls, o.Errors, o.Log)
	if e.Links, err = node.Open(o.LinkDir); err == nil {
		err = clean()
	}
	if err != nil {
		e.Help.Close()
		e.lock.Close()
	}
	return err
}

// Live drops what is recorded of devices that are gone, and returns the names of the others by the
// number that a record has. For clean.
func (e *Exporter[R, N]) Live(number func(R) int) (map[int]string, error) {
	if err := e.Records.Tidy(); err != nil {
		return nil, err
	}
	recs, err := e.Records.List()
	if err != nil {
		return nil, err
	}
	live := make(map[int]string)
	for name, rec := range recs {
		if rec != nil && (*rec).IsThere() {
			live[number(*rec)] = name
			continue
		}
		e.Log.Warn("the device of an attachment is gone", "name", name)
		if err := e.forget(name); err != nil {
			return nil, err
		}
	}
	return live, nil
}

func (e *Exporter[R, N]) forget(name string) error {
	return errors.Join(e.Links.Remove(name), e.Records.Drop(name))
}

// CleanLinks takes away the marks of owner and the links that lead to no live device. number is that
// of a node, and others says whether a link to one that is not ours is stale: other daemons may have
// links in the same directory. For clean.
func (e *Exporter[R, N]) CleanLinks(owner string, live map[int]string, number func(node string) (int, error), stale func(number int, link string) bool) error {
	err := e.Links.UnmarkIf(owner, func(name string) bool {
		n, err := number("/dev/" + name)
		return err == nil && live[n] == ""
	})
	if err != nil {
		return err
	}
	_, err = e.Links.RemoveIf(func(link, target string) bool {
		n, err := number(target)
		if err != nil {
			return false
		}
		if name, ok := live[n]; ok {
			return name != link
		}
		return stale(n, link)
	})
	return err
}

// List returns the attachments.
func (e *Exporter[R, N]) List() []*Attachment[R, N] { return e.names.List() }

// claim lets do make the attachment of a name that nobody has.
func (e *Exporter[R, N]) claim(what, name string, do func() (*Attachment[R, N], error)) (*Attachment[R, N], error) {
	err := e.names.Claim(name)
	if err == nil {
		var a *Attachment[R, N]
		a, err = do()
		e.names.Settle(name, a)
		if err == nil {
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s %q: %w", what, name, err)
}

// Attach checks what is asked for and lets serve make a device that works, with record and link; the
// options have a sector size. cut is to be called when the driver's side is gone.
func (e *Exporter[R, N]) Attach(name string, d dev.Device, o export.AttachOptions, serve func(o export.AttachOptions, cut func()) (R, N, error)) (export.Attachment, error) {
	if o.SectorSize == 0 {
		o.SectorSize = 512
	}
	if s := o.SectorSize; s < 512 || s > 4096 || s&(s-1) != 0 {
		return nil, fmt.Errorf("attach %q: sector size %d: want 512, 1024, 2048 or 4096", name, s)
	}
	if size := d.Size(); size <= 0 || size%int64(o.SectorSize) != 0 {
		return nil, fmt.Errorf("attach %q: device of %d bytes: want a multiple of %d", name, size, o.SectorSize)
	}
	a, err := e.claim("attach", name, func() (*Attachment[R, N], error) {
		if rec, err := e.Records.Get(name); err != nil {
			return nil, err
		} else if rec != nil {
			return nil, fmt.Errorf("survivor of that name: %w", export.ErrExists)
		}
		a := &Attachment[R, N]{e: e, name: name, d: d, life: NewLife()}
		rec, n, err := serve(o, a.cut)
		if err != nil {
			return nil, err
		}
		a.N, a.path, a.shape = n, rec.Path(), rec.Common()
		node.LimitDirty(a.path, o.DirtyBytes)
		return a, nil
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Survivors lists what a predecessor left: its nodes exist, their requests wait.
func (e *Exporter[R, N]) Survivors() ([]string, error) {
	recs, err := e.Records.List()
	if err != nil {
		return nil, fmt.Errorf("survivors: %w", err)
	}
	var names []string
	for name := range recs {
		if !e.names.Has(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Adopt lets serve take a survivor over, which is there and no longer than d. If its device is gone by
// now, the error is export.ErrNotFound, and the name is free.
func (e *Exporter[R, N]) Adopt(ctx context.Context, name string, d dev.Device, serve func(rec R, cut func()) (N, error)) (export.Attachment, error) {
	a, err := e.claim("adopt", name, func() (*Attachment[R, N], error) {
		rec, err := e.Records.Get(name)
		if err != nil {
			return nil, err
		}
		if rec == nil {
			return nil, export.ErrNotFound
		}
		if !(*rec).IsThere() {
			if err := e.forget(name); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("%s is gone: %w", (*rec).Path(), export.ErrNotFound)
		}
		a := &Attachment[R, N]{e: e, name: name, d: d, life: NewLife(), path: (*rec).Path(), shape: (*rec).Common()}
		if d.Size() < a.shape.Size {
			return nil, fmt.Errorf("device of %d bytes, the node has %d", d.Size(), a.shape.Size)
		}
		a.N, err = serve(*rec, a.cut)
		if err != nil {
			return nil, err
		}
		return a, nil
	})
	if err != nil {
		return nil, err
	}
	if d.Size() > a.size() {
		if err := a.Resize(ctx); err != nil {
			e.Log.Warn("grow an adopted device", "name", name, "error", err)
		}
	}
	return a, nil
}

// Drop lets cut take a survivor away, whoever uses it: its requests fail.
func (e *Exporter[R, N]) Drop(name string, cut func(R) error) error {
	_, err := e.claim("drop", name, func() (*Attachment[R, N], error) {
		rec, err := e.Records.Get(name)
		if err != nil {
			return nil, err
		}
		if rec == nil {
			return nil, export.ErrNotFound
		}
		if err := e.Links.Remove(name); err != nil {
			return nil, err
		}
		if err := cut(*rec); err != nil {
			return nil, err
		}
		return nil, errors.Join(e.Records.Drop(name), e.Links.Unmark(filepath.Base((*rec).Path())))
	})
	return err
}

// Close stops serving; stop, which may be nil, ends what else goes on. Attachments stay: their
// requests wait for a successor. Closing twice is fine.
func (e *Exporter[R, N]) Close(stop func()) error {
	if !e.names.Close() {
		return nil
	}
	if stop != nil {
		stop()
	}
	var wg sync.WaitGroup
	for _, a := range e.names.List() {
		wg.Go(a.leave)
	}
	wg.Wait()
	e.Help.Close()
	return e.lock.Close()
}

// recoverWait bounds how long a driver may take to notice that a server has died.
const recoverWait = 30 * time.Second

// Recover calls fn until it does not say busy: the driver still has the old server.
func Recover(ctx context.Context, busy error, fn func() error) error {
	deadline := time.Now().Add(recoverWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := fn()
		if !errors.Is(err, busy) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the driver still has its old server after %v: %w", recoverWait, err)
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}
