package export

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"mica/dev"
)

// A Candidate is an exporter that Auto may choose.
type Candidate struct {
	Kind string
	// Open makes the exporter. An error that wraps ErrUnavailable says what the host lacks; with
	// others the host could, and something is wrong.
	Open func() (Exporter, error)
	// Left reports whether a predecessor has left something that only this exporter can adopt or
	// clear away. It is opened for that even if another one is chosen.
	Left func() bool
}

// A Choice says what became of a candidate.
type Choice struct {
	Kind   string `json:"kind"`
	Chosen bool   `json:"chosen"`
	Why    string `json:"why,omitempty"` // it was not chosen
}

// Auto is an Exporter that exports with the best of several: the first candidate that this host can
// run. What a predecessor has exported in another way goes on in that way. Safe for concurrent use.
type Auto struct {
	forced string

	mu      sync.Mutex
	list    []*choice // guarded by mu; in the order of preference
	current *choice   // guarded by mu; exports what is attached now
}

// A choice is a candidate and what is known of it.
type choice struct {
	Candidate
	e    Exporter // nil: not open
	why  string   // it is not the current one
	gone bool     // it cannot be had: why says the reason
}

var _ Exporter = (*Auto)(nil)

// AutoKind lets NewAuto choose.
const AutoKind = "auto"

// NewAuto opens the first candidate that this host can run, and those others that a predecessor has
// used. kind forces one; then nothing else is taken in its place.
func NewAuto(kind string, candidates ...Candidate) (_ *Auto, err error) {
	a := &Auto{forced: kind}
	if kind == "" {
		a.forced = AutoKind
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	for _, c := range candidates {
		a.list = append(a.list, &choice{Candidate: c})
	}
	if a.forced != AutoKind && !slices.ContainsFunc(candidates, func(c Candidate) bool { return c.Kind == kind }) {
		return nil, fmt.Errorf("export kind %q: want one of %s", kind, strings.Join(append([]string{AutoKind}, kindsOf(candidates)...), ", "))
	}
	if err := a.choose(); err != nil {
		return nil, err
	}
	for _, c := range a.list {
		if c.e != nil || c.gone || c.Left == nil || !c.Left() {
			continue
		}
		if err := c.open(); err != nil {
			return nil, fmt.Errorf("what a predecessor exported through %s: %w", c.Kind, err)
		}
	}
	return a, nil
}

func kindsOf(list []Candidate) (kinds []string) {
	for _, c := range list {
		kinds = append(kinds, c.Kind)
	}
	return kinds
}

// choose makes the first candidate that can be opened the current one. Before others use a, or
// under a.mu.
func (a *Auto) choose() error {
	a.current = nil
	for _, c := range a.list {
		switch {
		case a.forced != AutoKind && c.Kind != a.forced:
			c.why = fmt.Sprintf("the configuration wants %s", a.forced)
			continue
		case a.current != nil:
			c.why = fmt.Sprintf("%s is preferred", a.current.Kind)
			continue
		case c.gone:
			continue
		}
		err := c.open()
		if err != nil && (a.forced != AutoKind || !errors.Is(err, ErrUnavailable)) {
			return fmt.Errorf("export through %s: %w", c.Kind, err)
		}
		if err != nil {
			c.refuse(err)
			continue
		}
		a.current, c.why = c, ""
	}
	if a.current != nil {
		return nil
	}
	var reasons []string
	for _, c := range a.list {
		reasons = append(reasons, c.Kind+": "+c.why)
	}
	return fmt.Errorf("no way to export block devices: %s: %w", strings.Join(reasons, "; "), ErrUnavailable)
}

func (c *choice) open() error {
	if c.e != nil {
		return nil
	}
	e, err := c.Open()
	if err != nil {
		return err
	}
	c.e = e
	return nil
}

// refuse notes why a candidate cannot be had.
func (c *choice) refuse(err error) {
	c.gone, c.why = true, err.Error()
	if _, why, ok := strings.Cut(c.why, ErrUnavailable.Error()+": "); ok {
		c.why = why
	}
}

// Kind is that of the exporter which was chosen.
func (a *Auto) Kind() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.current.Kind
}

// Choices says what became of every candidate, in the order of preference.
func (a *Auto) Choices() []Choice {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []Choice
	for _, c := range a.list {
		list = append(list, Choice{Kind: c.Kind, Chosen: c == a.current, Why: c.why})
	}
	return list
}

// Restartable says whether the death of this process is only a pause for users of the nodes, and
// if it is not, why.
func (a *Auto) Restartable() (bool, string) {
	a.mu.Lock()
	e := a.current.e
	a.mu.Unlock()
	if r, ok := e.(interface{ Restartable() (bool, string) }); ok {
		return r.Restartable()
	}
	return true, ""
}

func (a *Auto) chosen() *choice {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.current
}

// Attach exports d with the exporter that was chosen. If that finds out only now that this host
// cannot run it, the next one is chosen.
func (a *Auto) Attach(ctx context.Context, name string, d dev.Device, o AttachOptions) (Attachment, error) {
	for {
		c := a.chosen()
		if err := a.otherSurvivor(ctx, c, name); err != nil {
			return nil, fmt.Errorf("attach %q: %w", name, err)
		}
		at, err := c.e.Attach(ctx, name, d, o)
		if err == nil || !errors.Is(err, ErrUnavailable) || a.forced != AutoKind {
			return at, err
		}
		if !a.next(c, err) {
			return nil, err
		}
	}
}

// next chooses another exporter in the place of c. False: there is none.
func (a *Auto) next(c *choice, why error) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.current != c {
		return true // somebody else has found out, too
	}
	c.refuse(why)
	if a.choose() != nil {
		a.current = c
		return false
	}
	return true
}

// otherSurvivor refuses a name that a survivor of another exporter has.
func (a *Auto) otherSurvivor(ctx context.Context, c *choice, name string) error {
	for _, o := range a.opened() {
		if o == c {
			continue
		}
		if l, err := o.e.Survivors(ctx); err == nil && slices.Contains(l, name) {
			return fmt.Errorf("survivor of that name, exported through %s: %w", o.Kind, ErrExists)
		}
	}
	return nil
}

func (a *Auto) opened() (list []*choice) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.list {
		if c.e != nil {
			list = append(list, c)
		}
	}
	return list
}

// Survivors lists those of all exporters.
func (a *Auto) Survivors(ctx context.Context) ([]string, error) {
	var all []string
	for _, c := range a.opened() {
		l, err := c.e.Survivors(ctx)
		if err != nil {
			return nil, err
		}
		all = append(all, l...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// owner is the exporter that has a survivor.
func (a *Auto) owner(ctx context.Context, name string) (Exporter, error) {
	for _, c := range a.opened() {
		l, err := c.e.Survivors(ctx)
		if err != nil {
			return nil, err
		}
		if slices.Contains(l, name) {
			return c.e, nil
		}
	}
	return a.chosen().e, nil // which says that there is none
}

// Adopt goes on with a survivor in the way in which it was exported.
func (a *Auto) Adopt(ctx context.Context, name string, d dev.Device) (Attachment, error) {
	e, err := a.owner(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	return e.Adopt(ctx, name, d)
}

// Drop ends a survivor.
func (a *Auto) Drop(ctx context.Context, name string) error {
	e, err := a.owner(ctx, name)
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	return e.Drop(ctx, name)
}

// Close closes all that are open.
func (a *Auto) Close() error {
	list := a.opened()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, c := range list {
		wg.Go(func() { errs[i] = c.e.Close() })
	}
	wg.Wait()
	return errors.Join(errs...)
}
