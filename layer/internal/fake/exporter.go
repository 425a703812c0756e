package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"mica/dev"
	"mica/export"
)

// An Exporter is an export.Exporter whose nodes are names that only Device knows. Safe for
// concurrent use.
type Exporter struct {
	mu   sync.Mutex
	live map[string]*attachment
	left map[string]bool // survivors of a predecessor
	seq  int
	// Busy says who holds an attachment; Detach of it fails.
	busy map[string]string
}

// NewExporter makes an exporter; survivors are attachments of a predecessor.
func NewExporter(survivors ...string) *Exporter {
	e := &Exporter{live: map[string]*attachment{}, left: map[string]bool{}, busy: map[string]string{}}
	for _, n := range survivors {
		e.left[n] = true
	}
	return e
}

type attachment struct {
	e    *Exporter
	name string
	node string
	d    dev.Device
	done chan struct{}
}

// Device returns what is exported as node.
func (e *Exporter) Device(node string) dev.Device {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.live {
		if a.node == node {
			return a.d
		}
	}
	return nil
}

// Hold makes an attachment busy, or free with an empty who.
func (e *Exporter) Hold(name, who string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.busy[name] = who
}

// Names lists live attachments.
func (e *Exporter) Names() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.live))
}

func (e *Exporter) Kind() string { return "fake" }

func (e *Exporter) attach(name string, d dev.Device) *attachment {
	e.seq++
	a := &attachment{e: e, name: name, node: fmt.Sprintf("/fake/%d", e.seq), d: d, done: make(chan struct{})}
	e.live[name] = a
	return a
}

func (e *Exporter) Attach(_ context.Context, name string, d dev.Device, _ export.AttachOptions) (export.Attachment, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.live[name] != nil || e.left[name] {
		return nil, fmt.Errorf("attachment %q: %w", name, export.ErrExists)
	}
	return e.attach(name, d), nil
}

func (e *Exporter) Survivors(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.left)), nil
}

func (e *Exporter) Adopt(_ context.Context, name string, d dev.Device) (export.Attachment, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.left[name] {
		return nil, fmt.Errorf("attachment %q: %w", name, export.ErrNotFound)
	}
	delete(e.left, name)
	return e.attach(name, d), nil
}

func (e *Exporter) Drop(_ context.Context, name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.left[name] {
		return fmt.Errorf("attachment %q: %w", name, export.ErrNotFound)
	}
	delete(e.left, name)
	return nil
}

func (e *Exporter) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n, a := range e.live {
		close(a.done)
		delete(e.live, n)
	}
	return nil
}

// TakeAway ends an attachment as an administrator would.
func (e *Exporter) TakeAway(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if a := e.live[name]; a != nil {
		delete(e.live, name)
		close(a.done)
	}
}

func (a *attachment) Name() string                 { return a.name }
func (a *attachment) Node() string                 { return a.node }
func (a *attachment) Link() string                 { return "/links/" + a.name }
func (a *attachment) Resize(context.Context) error { return nil }
func (a *attachment) Done() <-chan struct{}        { return a.done }

func (a *attachment) Detach(context.Context) error {
	a.e.mu.Lock()
	defer a.e.mu.Unlock()
	if who := a.e.busy[a.name]; who != "" {
		return fmt.Errorf("%s: %w: mounted on %s", a.node, export.ErrBusy, who)
	}
	if a.e.live[a.name] == a {
		delete(a.e.live, a.name)
		close(a.done)
	}
	return nil
}
