package fuse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/helper"
	"mica/export/loop"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// An Exporter exports devices as loop devices on files of our own FUSE server. Safe for
// concurrent use.
//
// Long-lived goroutines: the parker's, the holder keeper's, and the threads of each attachment.
type Exporter struct {
	o     Options
	dir   string   // RunDir/fuse
	lock  *os.File // of dir: one exporter
	links node.Dir
	help  *helper.Client
	roll  *roll
	park  *parker
	crew  crew
	keep  *keeper // nil without a holder
	reap  reaper

	mu     sync.Mutex
	atts   map[string]*attachment // guarded by mu; nil value: being attached
	closed bool                   // guarded by mu
}

var _ export.Exporter = (*Exporter)(nil)

// New makes an exporter and clears away what a predecessor left half done: attachments that its
// holder does not know, links to devices that are gone. Survivors stay.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, dir: filepath.Join(o.RunDir, "fuse"), atts: make(map[string]*attachment)}
	if err := os.MkdirAll(e.dir, 0o700); err != nil {
		return nil, fmt.Errorf("fuse exporter: %w", err)
	}
	if e.lock, err = lockDir(e.dir); err != nil {
		return nil, fmt.Errorf("fuse exporter: %w", err)
	}
	defer func() {
		if err != nil {
			e.release()
		}
	}()
	if e.links, err = node.Open(o.LinkDir); err != nil {
		return nil, fmt.Errorf("fuse exporter: %w", err)
	}
	if e.park, err = newParker(); err != nil {
		return nil, fmt.Errorf("fuse exporter: %w", err)
	}
	e.help, e.roll = helper.NewClient(o.HelperCommand, Calls, Errors, o.Logger), rollOf(o.RunDir)
	if o.HolderSocket != "" {
		if e.keep, err = newKeeper(&e.o); err != nil {
			return nil, fmt.Errorf("fuse exporter: %w", err)
		}
	}
	if err := e.clean(); err != nil {
		return nil, fmt.Errorf("fuse exporter: clear away leftovers: %w", err)
	}
	return e, nil
}

// lockWait is how long a start waits for a predecessor that is dying.
const lockWait = 10 * time.Second

func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(lockWait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("%s is used by another exporter: %w", dir, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// release closes what New opened.
func (e *Exporter) release() {
	if e.keep != nil {
		e.keep.close()
	}
	if e.help != nil {
		e.help.Close()
	}
	if e.park != nil {
		e.park.close()
	}
	e.crew.close()
	e.lock.Close()
}

// Kind is "fuse".
func (e *Exporter) Kind() string { return "fuse" }

func (e *Exporter) mountDir(name string) string { return filepath.Join(e.dir, name) }

func (e *Exporter) backing(name string) string { return filepath.Join(e.dir, name, diskName) }

// A record is what the holder keeps beside a descriptor.
type record struct {
	Version    int         `json:"version"`
	Live       bool        `json:"live"` // the node exists; otherwise the attach never ended
	Dir        string      `json:"dir"`  // mount point
	Loop       loop.Device `json:"loop"`
	Size       int64       `json:"size"` // bytes, as the kernel was told last
	SectorSize int         `json:"sector_size"`
	ReadOnly   bool        `json:"read_only"`
	Kernel     features    `json:"kernel"`
	Helper     int         `json:"helper,omitempty"` // of earlier builds: process that makes the loop device, until live
}

const recordVersion = 1

func (r record) json() json.RawMessage {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // it has only numbers and strings
	}
	return b
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

// Attach exports d as a loop device. Its size must be a multiple of the sector size. When it
// returns, the node works, the link is there, and the holder has the connection.
func (e *Exporter) Attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions) (export.Attachment, error) {
	if o.SectorSize == 0 {
		o.SectorSize = 512
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

func (e *Exporter) attach(ctx context.Context, name string, d dev.Device, o export.AttachOptions) (_ *attachment, err error) {
	dir := e.mountDir(name)
	if err := e.makeDir(name); err != nil {
		return nil, err
	}
	fd, err := mountFuse(dir, "mica", o.ReadOnly)
	if err != nil {
		os.Remove(dir)
		return nil, err
	}
	a := newAttachment(e, name, d)
	a.rec = record{Version: recordVersion, Dir: dir, Size: d.Size(), SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}
	if a.s, err = newServer(fd, d, o.ReadOnly, &e.o); err != nil {
		unix.Close(fd)
		e.removeMount(name)
		return nil, err
	}
	a.s.park, a.s.onEnd = e.park.park, a.cut
	a.s.join(&e.crew)
	a.s.greet()
	a.s.start()
	defer func() {
		if err != nil {
			e.removeMount(name)
			a.shut()
		}
	}()
	select {
	case <-a.s.ready:
	case <-a.s.gone:
		return nil, errors.New("fuse connection ended before it was initialised")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	a.rec.Kernel = a.s.kernel

	// The holder gets the connection while the loop device is made. If this process dies before it is
	// told that the node works, the next one clears away what there is, when the helper is done.
	if err := e.roll.enter(e.help.PID()); err != nil {
		return nil, err
	}
	put := make(chan error, 1)
	if e.held(a.rec) {
		rec := a.rec
		go func() { put <- e.keep.put(name, rec, fd) }()
		defer func() {
			if err != nil {
				e.keep.drop(name)
			}
		}()
	} else {
		put <- nil
	}
	a.rec.Loop, err = e.attachLoop(ctx, a, loop.Config{Backing: e.backing(name), ReadOnly: o.ReadOnly, SectorSize: o.SectorSize})
	if err = errors.Join(err, <-put); err != nil {
		return nil, err
	}
	node.LimitDirty(a.rec.Loop.Node, o.DirtyBytes)
	e.reap.used(a.rec.Loop)
	a.rec.Live = true
	if e.held(a.rec) {
		err = e.keep.settle(name, a.rec)
	}
	if err == nil {
		err = e.links.Make(name, a.rec.Loop.Node)
	}
	if err != nil {
		return nil, err
	}
	return a, nil
}

// makeDir makes the mount point of a new attachment. Whatever is left of another one of that name,
// here or in the holder, has a directory: without it there is nothing to look for.
func (e *Exporter) makeDir(name string) error {
	dir := e.mountDir(name)
	err := os.Mkdir(dir, 0o700)
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	if e.keep != nil {
		if _, err := e.keep.record(name); err == nil {
			return fmt.Errorf("survivor of that name: %w", export.ErrExists)
		}
	}
	if err := e.cleanDir(name); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o700)
}

// attachLoop waits for the loop device. If ctx ends first, the connection is ended, so that the
// call comes back, and what it made is taken away by the caller's removeMount.
func (e *Exporter) attachLoop(ctx context.Context, a *attachment, c loop.Config) (loop.Device, error) {
	type result struct {
		d   loop.Device
		err error
	}
	ch := make(chan result, 1)
	go func() {
		var r result
		r.err = e.help.Do(context.WithoutCancel(ctx), "loop.attach", callTag(c.Backing), c, &r.d)
		ch <- r
	}()
	select {
	case r := <-ch:
		return r.d, r.err
	case <-ctx.Done():
		abort(a.rec.Dir)
		<-ch
		return loop.Device{}, ctx.Err()
	}
}

// held reports whether the holder keeps an attachment while it is served. Without resend
// requests that were read by a server that died would never be answered: then the death of
// the server must end the connection, and only a server that has answered everything hands
// over.
func (e *Exporter) held(r record) bool { return e.keep != nil && r.Kernel.Resend }

// Restartable says whether the death of this process is only a pause for users of the nodes, and
// if it is not, why.
func (e *Exporter) Restartable() (bool, string) {
	if e.keep == nil {
		return false, "no holder is configured"
	}
	if ok, why := kernelResends(); !ok {
		return false, why
	}
	return true, ""
}

// Close stops serving. With a holder, attachments are left to it; their requests wait for a
// successor. Without one, or on a kernel that cannot hand over, they are detached; those that
// are busy are cut off, and Close returns an error that names them.
func (e *Exporter) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	list := make([]*attachment, 0, len(e.atts))
	for _, a := range e.atts {
		if a != nil {
			list = append(list, a)
		}
	}
	e.mu.Unlock()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, a := range list {
		wg.Go(func() { errs[i] = a.leave() })
	}
	wg.Wait()
	e.reap.all()
	e.release()
	return errors.Join(errs...)
}
