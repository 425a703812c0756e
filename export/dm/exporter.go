// Package dm gives out devices that have a block device node of the kernel already (export.Noder):
// the thin targets of the kernel engine. Nothing is served here: an attachment is a link to the
// node and a record of it, so the death of the process is no pause for whoever uses the node.
package dm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/export"
	"mica/export/keep"
	"mica/export/node"
)

// Options of an Exporter.
type Options struct {
	// RunDir is the daemon's RUN; records are RunDir/dm/NAME.json. One exporter at a time.
	RunDir string
	// LinkDir is where links to the nodes are made (node.DefaultDir on a host); "" makes none.
	LinkDir string
	// DetachWait is how long Detach waits for a process that merely has the node open; 0 is
	// 2 seconds.
	DetachWait time.Duration
	Logger     *slog.Logger // nil: slog.Default
}

// An Exporter gives nodes out. Safe for concurrent use. It has no goroutines.
type Exporter struct {
	o     Options
	dir   string
	links node.Dir
	log   *slog.Logger

	names keep.Names[attachment]

	mu  sync.Mutex
	old map[string]record // survivors; guarded by mu
}

var _ export.Exporter = (*Exporter)(nil)

// A record is what a successor must know of an attachment.
type record struct {
	Version  int    `json:"version"`
	Node     string `json:"node"`
	Dev      uint64 `json:"dev"`  // its number
	UUID     string `json:"uuid"` // of the device-mapper device: numbers are reused
	ReadOnly bool   `json:"read_only"`
}

const recordVersion = 1

// New makes an exporter and clears away what a predecessor left of nodes that are gone. The others
// are survivors.
func New(o Options) (*Exporter, error) {
	if o.RunDir == "" {
		return nil, errors.New("dm exporter: no run directory")
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	e := &Exporter{o: o, dir: filepath.Join(o.RunDir, "dm"), log: o.Logger, old: map[string]record{}}
	if err := os.MkdirAll(e.dir, 0o700); err != nil {
		return nil, fmt.Errorf("dm exporter: %w", err)
	}
	var err error
	if e.links, err = node.Open(o.LinkDir); err != nil {
		return nil, fmt.Errorf("dm exporter: %w", err)
	}
	if err := e.findSurvivors(); err != nil {
		return nil, fmt.Errorf("dm exporter: what a predecessor left: %w", err)
	}
	return e, nil
}

// findSurvivors reads the records. What is not there any more loses its record and its link, which
// must go before the number of its node is given to another.
func (e *Exporter) findSurvivors() error {
	list, err := os.ReadDir(e.dir)
	if err != nil {
		return err
	}
	for _, f := range list {
		name, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok || node.CheckID(name) != nil {
			continue
		}
		r, err := e.read(name)
		if err == nil && r.UUID != "" && uuidOf(r.Dev) == r.UUID {
			e.old[name] = r
			continue
		}
		if err != nil {
			e.log.Warn("record of a node cannot be read", "attachment", name, "error", err)
		}
		if err := e.forget(name); err != nil {
			return err
		}
	}
	return nil
}

func (e *Exporter) path(name string) string { return filepath.Join(e.dir, name+".json") }

func (e *Exporter) read(name string) (record, error) {
	var r record
	b, err := os.ReadFile(e.path(name))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err == nil && r.Version != recordVersion {
		err = fmt.Errorf("version %d, want %d", r.Version, recordVersion)
	}
	return r, err
}

// note writes a record so that it is there, whole, before the link is.
func (e *Exporter) note(name string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp := e.path(name) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, e.path(name))
}

// forget removes a link, then its record.
func (e *Exporter) forget(name string) error {
	if err := e.links.Remove(name); err != nil {
		return err
	}
	if err := os.Remove(e.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// uuidOf asks sysfs for the UUID of a device-mapper device; empty if there is none of that number.
func uuidOf(rdev uint64) string {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/dm/uuid", unix.Major(rdev), unix.Minor(rdev)))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// recordOf describes the node that a device has now.
func recordOf(path string, readOnly bool) (record, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return record{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	r := record{Version: recordVersion, Node: path, Dev: st.Rdev, UUID: uuidOf(st.Rdev), ReadOnly: readOnly}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || r.UUID == "" {
		return r, fmt.Errorf("%s is no device-mapper device with a UUID", path)
	}
	return r, nil
}

// Kind is "dm".
func (e *Exporter) Kind() string { return "dm" }

// Attach gives the node of d out. Sectors are those of the pool's data device.
func (e *Exporter) Attach(_ context.Context, name string, d dev.Device, o export.AttachOptions) (export.Attachment, error) {
	n, ok := d.(export.Noder)
	if !ok {
		return nil, fmt.Errorf("attach %q: the device has no node of its own: %w", name, dev.ErrUnsupported)
	}
	if err := e.names.Claim(name); err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	a, err := e.attach(name, d, n, o)
	e.names.Settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("attach %q: %w", name, err)
	}
	return a, nil
}

func (e *Exporter) attach(name string, d dev.Device, n export.Noder, o export.AttachOptions) (*attachment, error) {
	e.mu.Lock()
	_, survivor := e.old[name]
	e.mu.Unlock()
	if survivor {
		return nil, fmt.Errorf("survivor of that name: %w", export.ErrExists)
	}
	r, err := recordOf(n.Node(), o.ReadOnly)
	if err != nil {
		return nil, err
	}
	if err := checkSector(r.Dev, o.SectorSize); err != nil {
		return nil, err
	}
	node.LimitDirty(r.Node, o.DirtyBytes)
	return e.give(name, d, n, r)
}

// checkSector refuses a sector size that the node does not have: it cannot be chosen.
func checkSector(rdev uint64, want int) error {
	if want == 0 {
		return nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/logical_block_size", unix.Major(rdev), unix.Minor(rdev)))
	if err != nil {
		return err
	}
	if have := strings.TrimSpace(string(b)); have != fmt.Sprint(want) {
		return fmt.Errorf("sectors of %d bytes: the pool's data device has %s: %w", want, have, dev.ErrUnsupported)
	}
	return nil
}

// give makes record and link.
func (e *Exporter) give(name string, d dev.Device, n export.Noder, r record) (*attachment, error) {
	if err := e.note(name, r); err != nil {
		return nil, err
	}
	if err := e.links.Make(name, r.Node); err != nil {
		return nil, errors.Join(err, os.Remove(e.path(name)))
	}
	return &attachment{e: e, name: name, d: d, n: n, rec: r, done: make(chan struct{})}, nil
}

// Survivors lists what a predecessor gave out and is still there.
func (e *Exporter) Survivors(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []string
	for name := range e.old {
		list = append(list, name)
	}
	return list, nil
}

// Adopt goes on with a survivor. Its users have noticed nothing.
func (e *Exporter) Adopt(_ context.Context, name string, d dev.Device) (export.Attachment, error) {
	n, ok := d.(export.Noder)
	if !ok {
		return nil, fmt.Errorf("adopt %q: the device has no node of its own: %w", name, dev.ErrUnsupported)
	}
	e.mu.Lock()
	r, ok := e.old[name]
	e.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("adopt %q: %w", name, export.ErrNotFound)
	}
	if err := e.names.Claim(name); err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	err := n.AdoptNode(r.Node)
	var a *attachment
	if err == nil {
		a, err = e.give(name, d, n, r)
	}
	if err == nil {
		e.mu.Lock()
		delete(e.old, name)
		e.mu.Unlock()
	}
	e.names.Settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	return a, nil
}

// Drop forgets a survivor. Its node is the engine's to remove.
func (e *Exporter) Drop(_ context.Context, name string) error {
	e.mu.Lock()
	_, ok := e.old[name]
	delete(e.old, name)
	e.mu.Unlock()
	if !ok {
		return fmt.Errorf("drop %q: %w", name, export.ErrNotFound)
	}
	return e.forget(name)
}

// Close leaves everything that is attached to a successor: the nodes stay when their devices are
// closed.
func (e *Exporter) Close() error {
	e.names.Close()
	for _, a := range e.names.List() {
		a.n.KeepNode(true)
		a.end()
		e.names.Settle(a.name, nil)
	}
	return nil
}

// An attachment is one node that was given out.
type attachment struct {
	e    *Exporter
	name string
	d    dev.Device
	n    export.Noder
	rec  record
	done chan struct{}
	once sync.Once
	mu   sync.Mutex // one Detach
}

func (a *attachment) Name() string { return a.name }

func (a *attachment) Node() string { return a.rec.Node }

func (a *attachment) Link() string {
	if p := a.e.links.Path(a.name); p != "" {
		return p
	}
	return a.rec.Node
}

// Resize has nothing to do: the kernel knows the length of its own device.
func (a *attachment) Resize(context.Context) error { return nil }

func (a *attachment) Done() <-chan struct{} { return a.done }

func (a *attachment) end() { a.once.Do(func() { close(a.done) }) }

// Detach takes link and record away when nobody uses the node. The node goes when its device is
// closed.
func (a *attachment) Detach(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-a.done:
		return nil
	default:
	}
	rel := node.Release{Path: a.rec.Node, Dev: a.rec.Dev, Link: a.e.links.Path(a.name), Wait: a.e.o.DetachWait,
		Take: func() error { return os.Remove(a.e.path(a.name)) }}
	err := rel.Do(ctx)
	switch {
	case errors.Is(err, node.ErrGone): // somebody else removed the device
		err = a.e.forget(a.name)
	case errors.Is(err, node.ErrBusy):
		return fmt.Errorf("detach %q: %w: %w", a.name, export.ErrBusy, err)
	case err != nil && !errors.Is(err, node.ErrNotSynced):
		return fmt.Errorf("detach %q: %w", a.name, err)
	}
	if !a.rec.ReadOnly {
		if ferr := a.d.Flush(); err == nil {
			err = ferr
		}
	}
	a.end()
	a.e.names.Settle(a.name, nil)
	if err != nil {
		return fmt.Errorf("detach %q: %w", a.name, err)
	}
	return nil
}
