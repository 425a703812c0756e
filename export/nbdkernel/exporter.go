package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/keep"
	"mica/export/nbd"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// An Exporter exports devices through the kernel's NBD client. Safe for concurrent use.
type Exporter struct {
	o   Options
	x   exporter
	raw *nbd.Raw

	connectMu sync.Mutex // one search for a free device
}

var _ export.Exporter = (*Exporter)(nil)

// A record is what the next exporter must know about a device, a file in RunDir/nbd.
type record struct {
	Index   int    `json:"index"`
	Backend string `json:"backend"`
	keep.Shape
	Connections int `json:"connections"`
}

const recordVersion = 1

const backendPrefix = "mica:"

// backend is the name that the driver keeps with the device of an attachment.
func (e *Exporter) backend(name string) string { return backendPrefix + e.o.RunDir + ":" + name }

func (rec record) Path() string { return nodeOf(rec.Index) }

func (rec record) IsThere() bool { return backendOf(rec.Index) == rec.Backend }

// New makes an exporter and clears away what a predecessor left half done. Survivors stay. The error
// wraps export.ErrUnavailable if this host has no NBD client.
func New(o Options) (_ *Exporter, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := Available(); err != nil {
		return nil, err
	}
	e := &Exporter{o: o, raw: nbd.NewRaw(nbd.Options{Workers: o.Workers, Log: o.Logger})}
	err = e.x.Open(keep.Options{Dir: filepath.Join(o.RunDir, "nbd"), Version: recordVersion, LinkDir: o.LinkDir,
		HelperCommand: o.HelperCommand, Calls: Calls, Errors: Errors, Log: o.Logger}, e.clean)
	if err != nil {
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
	return e.x.Attach(name, d, o, func(o export.AttachOptions, cut func()) (record, *device, error) {
		n, err := e.attach(name, d, o, cut)
		if err != nil {
			return record{}, nil, err
		}
		return n.rec, n, nil
	})
}

func (e *Exporter) newDevice(name string, d dev.Device, rec record, cut func()) *device {
	s := &server{name: name, backend: rec.Backend, d: d, readOnly: rec.ReadOnly, raw: e.raw, log: e.o.Logger, onEnd: cut}
	if rec.Connections > 1 {
		s.gate = newGate()
	}
	return &device{x: &e.x, name: name, rec: rec, wait: e.o.DetachWait, s: s}
}

func (e *Exporter) attach(name string, d dev.Device, o export.AttachOptions, cut func()) (_ *device, err error) {
	k, err := openControl()
	if err != nil {
		return nil, err
	}
	defer k.close()
	n := e.newDevice(name, d, record{Backend: e.backend(name), Connections: e.o.Connections,
		Shape: keep.Shape{Size: d.Size(), SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}}, cut)
	created := false
	err = n.s.start(e.o.Connections, func(fds []int) (index int, err error) {
		index, created, err = e.connect(k, e.o.config(n.rec.Size, o.SectorSize, nbd.RawFlags(d, o.ReadOnly), n.rec.Backend), fds)
		return index, err
	})
	if err != nil {
		return nil, err
	}
	n.rec.Index = n.s.index
	defer func() {
		if err != nil {
			err = errors.Join(err, k.disconnect(n.rec.Index), e.x.Links.Remove(name), e.x.Records.Drop(name), e.unmark(n.rec.Index))
			n.s.leave()
		}
	}()
	if !n.rec.IsThere() {
		return nil, fmt.Errorf("%w: the kernel's NBD client keeps no backend names: the kernel is too old (they came with Linux 5.14)", export.ErrUnavailable)
	}
	if e.o.Connections == 1 {
		if err = setRetry(n.rec.Index, e.o.RetryAfter); err != nil {
			return nil, err
		}
	}
	if created {
		if err = k.destroyAfter(n.rec.Index, n.rec.Backend); err != nil {
			return nil, err
		}
	}
	if err = node.Ensure(nodeOf(n.rec.Index), sysfs(n.rec.Index), unix.S_IFBLK); err != nil {
		return nil, err
	}
	if err = e.x.Records.Put(name, n.rec); err != nil {
		return nil, err
	}
	if err = e.x.Links.Make(name, nodeOf(n.rec.Index)); err != nil {
		return nil, err
	}
	return n, nil
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
		if err := e.x.Links.Mark(kernelName(index), e.o.RunDir); err != nil {
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

func (e *Exporter) unmark(index int) error { return e.x.Links.Unmark(kernelName(index)) }

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
