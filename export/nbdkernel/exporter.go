package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/helper"
	"mica/export/keep"
	"mica/export/nbd"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// An Exporter exports devices through the kernel's NBD client. Safe for concurrent use.
type Exporter struct {
	o     Options
	dir   keep.Records[record]
	lock  *os.File // of dir: one exporter
	links node.Dir
	help  *helper.Client
	raw   *nbd.Raw
	names keep.Names[attachment]

	connectMu sync.Mutex // one search for a free device
}

var _ export.Exporter = (*Exporter)(nil)

// A record is what the next exporter must know about a device. It is a file in RunDir/nbd, and
// there from the moment the node works until its link is gone.
type record struct {
	Index       int    `json:"index"`
	Backend     string `json:"backend"`
	Size        int64  `json:"size"` // bytes, as the kernel was told last
	SectorSize  int    `json:"sector_size"`
	ReadOnly    bool   `json:"read_only"`
	Connections int    `json:"connections"`
}

const recordVersion = 1

const backendPrefix = "mica:"

// backend is the name that the driver keeps with the device of an attachment.
func (e *Exporter) backend(name string) string { return backendPrefix + e.o.RunDir + ":" + name }

func (rec *record) isThere() bool { return backendOf(rec.Index) == rec.Backend }

// New makes an exporter and clears away what a predecessor left half done. Survivors stay. The error
// wraps export.ErrUnavailable if this host has no NBD client.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := Available(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, dir: keep.Records[record]{Dir: filepath.Join(o.RunDir, "nbd"), Version: recordVersion}}
	if e.lock, err = keep.Lock(e.dir.Dir); err != nil {
		return nil, fmt.Errorf("nbd exporter: %w", err)
	}
	e.help = helper.NewClient(o.HelperCommand, Calls, Errors, o.Logger)
	e.raw = nbd.NewRaw(nbd.Options{Workers: o.Workers, Log: o.Logger})
	if e.links, err = node.Open(o.LinkDir); err == nil {
		err = e.clean()
	}
	if err != nil {
		e.help.Close()
		e.lock.Close()
		return nil, fmt.Errorf("nbd exporter: %w", err)
	}
	return e, nil
}

// Kind is "nbd".
func (e *Exporter) Kind() string { return "nbd" }

// Restartable says that the death of this process is only a pause for users of the nodes.
func (e *Exporter) Restartable() (bool, string) { return true, "" }

// Attach exports d as /dev/nbdN. Its size must be a multiple of the sector size. When it returns,
// the node works, the link is there, and a successor of this process can adopt it.
func (e *Exporter) Attach(_ context.Context, name string, d dev.Device, o export.AttachOptions) (export.Attachment, error) {
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
	a, err := e.attach(name, d, o)
	e.names.Settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	return a, nil
}

func (e *Exporter) newAttachment(name string, d dev.Device, rec record) *attachment {
	a := &attachment{e: e, name: name, d: d, life: keep.NewLife(), rec: rec}
	a.s = &server{name: name, backend: rec.Backend, d: d, readOnly: rec.ReadOnly, raw: e.raw, log: e.o.Logger, onEnd: a.cut}
	if rec.Connections > 1 {
		a.s.gate = newGate()
	}
	return a
}

func (e *Exporter) attach(name string, d dev.Device, o export.AttachOptions) (_ *attachment, err error) {
	if rec, err := e.dir.Get(name); err != nil {
		return nil, err
	} else if rec != nil {
		return nil, fmt.Errorf("survivor of that name: %w", export.ErrExists)
	}
	k, err := openControl()
	if err != nil {
		return nil, err
	}
	defer k.close()
	a := e.newAttachment(name, d, record{
		Backend: e.backend(name), Size: d.Size(), SectorSize: o.SectorSize, ReadOnly: o.ReadOnly, Connections: e.o.Connections})
	created := false
	err = a.s.start(e.o.Connections, func(fds []int) (index int, err error) {
		index, created, err = e.connect(k, e.o.config(a.rec.Size, o.SectorSize, nbd.RawFlags(d, o.ReadOnly), a.rec.Backend), fds)
		return index, err
	})
	if err != nil {
		return nil, err
	}
	a.rec.Index = a.s.index
	defer func() {
		if err != nil {
			err = errors.Join(err, k.disconnect(a.rec.Index), e.links.Remove(name), e.dir.Drop(name), e.unmark(a.rec.Index))
			a.s.leave()
		}
	}()
	if !a.rec.isThere() {
		return nil, fmt.Errorf("%w: the kernel's NBD client keeps no backend names: the kernel is too old (they came with Linux 5.14)", export.ErrUnavailable)
	}
	if e.o.Connections == 1 {
		if err = setRetry(a.rec.Index, e.o.RetryAfter); err != nil {
			return nil, err
		}
	}
	if created {
		if err = k.destroyAfter(a.rec.Index, a.rec.Backend); err != nil {
			return nil, err
		}
	}
	if err = ensureNode(a.rec.Index); err != nil {
		return nil, err
	}
	if err = e.dir.Put(name, a.rec); err != nil {
		return nil, err
	}
	if err = e.links.Make(name, nodeOf(a.rec.Index)); err != nil {
		return nil, err
	}
	return a, nil
}

// connect connects a free device, which is marked as ours before the kernel announces it. created:
// there was no such device.
func (e *Exporter) connect(k *control, c config, fds []int) (index int, created bool, err error) {
	e.connectMu.Lock()
	defer e.connectMu.Unlock()
	there := devices()
	for index := 0; index < maxDevices; index++ {
		if there[index] && isConnected(index) {
			continue
		}
		if err := e.links.Mark(kernelName(index), e.o.RunDir); err != nil {
			return -1, false, err
		}
		err := k.connect(index, c, fds)
		if err == nil {
			return index, !there[index], nil
		}
		if uerr := e.unmark(index); uerr != nil || !errors.Is(err, unix.EBUSY) {
			return -1, false, errors.Join(err, uerr)
		}
	}
	return -1, false, fmt.Errorf("all of %d NBD devices are in use", maxDevices)
}

// maxDevices is more than any host has: the kernel makes devices as they are asked for.
const maxDevices = 1 << 16

func (e *Exporter) unmark(index int) error { return e.links.Unmark(kernelName(index)) }

// setRetry sets the timer after which the kernel looks what became of a request. The driver's own
// timeout, which would end the connection, stays off.
func setRetry(index int, after time.Duration) error {
	path := sysfs(index) + "/queue/io_timeout"
	err := os.WriteFile(path, []byte(strconv.FormatInt(after.Milliseconds(), 10)), 0o644)
	if errors.Is(err, os.ErrNotExist) {
		return nil // before Linux 5.0 there is no such file, and 30 seconds it is
	}
	return err
}

// Close stops serving. Attachments stay: their requests wait for a successor.
func (e *Exporter) Close() error {
	if !e.names.Close() {
		return nil
	}
	var wg sync.WaitGroup
	for _, a := range e.names.List() {
		wg.Go(a.leave)
	}
	wg.Wait()
	e.help.Close()
	return e.lock.Close()
}

// clean removes what nobody can go on with: devices of ours that were never given to anybody,
// records of devices that are gone, stale links. It runs before any device is attached.
func (e *Exporter) clean() error {
	if err := e.dir.Tidy(); err != nil {
		return err
	}
	recs, err := e.dir.List()
	if err != nil {
		return err
	}
	live := make(map[int]string)
	for name, rec := range recs {
		if rec != nil && rec.isThere() {
			live[rec.Index] = name
			continue
		}
		e.o.Logger.Warn("the device of an attachment is gone", "name", name)
		if err := errors.Join(e.links.Remove(name), e.dir.Drop(name)); err != nil {
			return err
		}
	}
	for index := range devices() {
		b := backendOf(index)
		if _, ok := live[index]; ok || !strings.HasPrefix(b, e.backend("")) {
			continue
		}
		e.o.Logger.Warn("clear away the rest of an attachment", "nbd", index)
		if err := e.help.Do(context.Background(), "nbd.drop", "", dropArgs{index, b}, nil); err != nil {
			return err
		}
	}
	err = e.links.UnmarkIf(e.o.RunDir, func(name string) bool {
		index, err := NumberOf("/dev/" + name)
		return err == nil && live[index] == ""
	})
	if err != nil {
		return err
	}
	// Links of other daemons in the same directory are told by the backend, too.
	_, err = e.links.RemoveIf(func(link, target string) bool {
		index, err := NumberOf(target)
		if err != nil {
			return false
		}
		if name, ok := live[index]; ok {
			return name != link
		}
		b := backendOf(index)
		return !strings.HasPrefix(b, backendPrefix) || !strings.HasSuffix(b, ":"+link) || b == e.backend(link)
	})
	return err
}

// Survivors lists what a predecessor left: its nodes exist, their requests wait.
func (e *Exporter) Survivors(context.Context) ([]string, error) {
	recs, err := e.dir.List()
	if err != nil {
		return nil, fmt.Errorf("survivors: %w", err)
	}
	var names []string
	for name := range recs {
		if !e.names.Has(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// recoverWait bounds how long the kernel may take to notice that a server has died.
const recoverWait = 30 * time.Second

// Adopt takes a survivor over and serves it from d. If its device is gone by now, the error is
// export.ErrNotFound, and the name is free.
func (e *Exporter) Adopt(ctx context.Context, name string, d dev.Device) (export.Attachment, error) {
	if err := e.names.Claim(name); err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	a, err := e.adopt(ctx, name, d)
	e.names.Settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	if d.Size() > a.rec.Size {
		if err := a.Resize(ctx); err != nil {
			e.o.Logger.Warn("grow an adopted device", "name", name, "error", err)
		}
	}
	return a, nil
}

func (e *Exporter) adopt(ctx context.Context, name string, d dev.Device) (*attachment, error) {
	rec, err := e.dir.Get(name)
	if err != nil {
		return nil, err
	}
	if rec == nil {
		return nil, export.ErrNotFound
	}
	if !rec.isThere() {
		if err := errors.Join(e.links.Remove(name), e.dir.Drop(name)); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s is gone: %w", nodeOf(rec.Index), export.ErrNotFound)
	}
	if d.Size() < rec.Size {
		return nil, fmt.Errorf("device of %d bytes, the node has %d", d.Size(), rec.Size)
	}
	if err := e.links.Make(name, nodeOf(rec.Index)); err != nil {
		return nil, err
	}
	k, err := openControl()
	if err != nil {
		return nil, err
	}
	defer k.close()
	a := e.newAttachment(name, d, *rec)
	err = a.s.start(rec.Connections, func(fds []int) (int, error) {
		for _, fd := range fds {
			if err := k.reconnectWait(ctx, rec, fd); err != nil {
				return rec.Index, err
			}
		}
		return rec.Index, nil
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// reconnectWait gives a device a socket as soon as the kernel has noticed that an old one is dead.
func (k *control) reconnectWait(ctx context.Context, rec *record, fd int) error {
	deadline := time.Now().Add(recoverWait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := k.reconnect(rec.Index, rec.Backend, []int{fd})
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s still has its old connections after %v: %w", nodeOf(rec.Index), recoverWait, err)
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

// Drop cuts a survivor off: its requests fail, and its node goes as soon as nobody uses it.
func (e *Exporter) Drop(ctx context.Context, name string) error {
	if err := e.names.Claim(name); err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	defer e.names.Settle(name, nil)
	rec, err := e.dir.Get(name)
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	if rec == nil {
		return fmt.Errorf("drop %q: %w", name, export.ErrNotFound)
	}
	err = e.links.Remove(name)
	if err == nil {
		err = e.help.Do(ctx, "nbd.drop", "", dropArgs{rec.Index, rec.Backend}, nil)
	}
	if err == nil {
		err = errors.Join(e.dir.Drop(name), e.unmark(rec.Index))
	}
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	return nil
}
