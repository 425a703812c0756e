package export

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"mica/dev"
)

// fakeExporter remembers what it was asked for.
type fakeExporter struct {
	kind   string
	left   []string
	attach error
	calls  []string
	closed int
}

type fakeAttachment struct {
	Attachment
	by string
}

func (f *fakeExporter) Kind() string { return f.kind }

func (f *fakeExporter) note(format string, args ...any) {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
}

func (f *fakeExporter) Attach(_ context.Context, name string, _ dev.Device, _ AttachOptions) (Attachment, error) {
	f.note("attach %s", name)
	return fakeAttachment{by: f.kind}, f.attach
}

func (f *fakeExporter) Survivors(context.Context) ([]string, error) { return f.left, nil }

func (f *fakeExporter) Adopt(_ context.Context, name string, _ dev.Device) (Attachment, error) {
	f.note("adopt %s", name)
	if !slices.Contains(f.left, name) {
		return nil, ErrNotFound
	}
	return fakeAttachment{by: f.kind}, nil
}

func (f *fakeExporter) Drop(_ context.Context, name string) error {
	f.note("drop %s", name)
	if !slices.Contains(f.left, name) {
		return ErrNotFound
	}
	return nil
}

func (f *fakeExporter) Close() error {
	f.closed++
	return nil
}

// fakes makes candidates; a kind is given with what its host lacks, or "" if it can be had.
func fakes(exporters map[string]*fakeExporter, kindAndLack ...string) (list []Candidate) {
	for i := 0; i < len(kindAndLack); i += 2 {
		kind, lack := kindAndLack[i], kindAndLack[i+1]
		f := exporters[kind]
		if f == nil {
			f = &fakeExporter{kind: kind}
			exporters[kind] = f
		}
		list = append(list, Candidate{Kind: kind,
			Open: func() (Exporter, error) {
				if lack == "broken" {
					return nil, errors.New("broken")
				}
				if lack != "" {
					return nil, fmt.Errorf("%w: %s", ErrUnavailable, lack)
				}
				f.note("open")
				return f, nil
			},
			Left: func() bool { return len(f.left) > 0 }})
	}
	return list
}

func TestAutoChooses(t *testing.T) {
	for _, c := range []struct {
		name, kind string
		candidates []string
		want       string // kind, or a part of the error
		choices    []Choice
	}{
		{"the first", "auto", []string{"ublk", "", "nbd", "", "fuse", ""}, "ublk",
			[]Choice{{"ublk", true, ""}, {"nbd", false, "ublk is preferred"}, {"fuse", false, "ublk is preferred"}}},
		{"what the host has", "auto", []string{"ublk", "no ublk_drv", "nbd", "no nbd", "fuse", ""}, "fuse",
			[]Choice{{"ublk", false, "no ublk_drv"}, {"nbd", false, "no nbd"}, {"fuse", true, ""}}},
		{"empty is auto", "", []string{"ublk", "no ublk_drv", "fuse", ""}, "fuse",
			[]Choice{{"ublk", false, "no ublk_drv"}, {"fuse", true, ""}}},
		{"forced", "nbd", []string{"ublk", "", "nbd", "", "fuse", ""}, "nbd",
			[]Choice{{"ublk", false, "the configuration wants nbd"}, {"nbd", true, ""}, {"fuse", false, "the configuration wants nbd"}}},
		{"forced and missing", "ublk", []string{"ublk", "no ublk_drv", "fuse", ""}, "through ublk: not available on this host: no ublk_drv", nil},
		{"unknown", "floppy", []string{"ublk", "", "fuse", ""}, `"floppy": want one of auto, ublk, fuse`, nil},
		{"nothing", "auto", []string{"ublk", "no ublk_drv", "fuse", "no /dev/fuse"}, "ublk: no ublk_drv; fuse: no /dev/fuse", nil},
		{"broken is not missing", "auto", []string{"ublk", "broken", "fuse", ""}, "through ublk: broken", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			all := map[string]*fakeExporter{}
			a, err := NewAuto(c.kind, fakes(all, c.candidates...)...)
			if err != nil {
				if c.choices != nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v; want %q", err, c.want)
				}
				return
			}
			if a.Kind() != c.want || !slices.Equal(a.Choices(), c.choices) {
				t.Errorf("%s: %+v; want %s: %+v", a.Kind(), a.Choices(), c.want, c.choices)
			}
			if at, err := a.Attach(context.Background(), "x", nil, AttachOptions{}); err != nil || at.(fakeAttachment).by != c.want {
				t.Errorf("attached by %v, %v", at, err)
			}
			if err := a.Close(); err != nil {
				t.Error(err)
			}
			for kind, f := range all {
				if opened := slices.Contains(f.calls, "open"); opened != (kind == c.want) || f.closed != len(f.calls[:min(1, len(f.calls))]) {
					t.Errorf("%s: %q, closed %d times", kind, f.calls, f.closed)
				}
			}
		})
	}
}

// TestAutoAdopts: what was exported in another way goes on in that way.
func TestAutoAdopts(t *testing.T) {
	all := map[string]*fakeExporter{"fuse": {kind: "fuse", left: []string{"b", "a"}}, "ublk": {kind: "ublk", left: []string{"c"}}}
	a, err := NewAuto("auto", fakes(all, "ublk", "", "nbd", "", "fuse", "")...)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if l, err := a.Survivors(ctx); err != nil || !slices.Equal(l, []string{"a", "b", "c"}) {
		t.Errorf("survivors %q, %v", l, err)
	}
	for name, by := range map[string]string{"a": "fuse", "c": "ublk"} {
		if at, err := a.Adopt(ctx, name, nil); err != nil || at.(fakeAttachment).by != by {
			t.Errorf("%s adopted by %+v, %v; want %s", name, at, err, by)
		}
	}
	if err := a.Drop(ctx, "b"); err != nil || !slices.Contains(all["fuse"].calls, "drop b") {
		t.Errorf("drop: %v, %q", err, all["fuse"].calls)
	}
	if _, err := a.Adopt(ctx, "none", nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("adopt nothing: %v", err)
	}
	if err := a.Drop(ctx, "none"); !errors.Is(err, ErrNotFound) {
		t.Errorf("drop nothing: %v", err)
	}
	if _, err := a.Attach(ctx, "a", nil, AttachOptions{}); !errors.Is(err, ErrExists) {
		t.Errorf("attach the name of a survivor: %v", err)
	}
	if len(all["nbd"].calls) > 0 {
		t.Errorf("nbd: %q", all["nbd"].calls)
	}
	// What a predecessor left and cannot be opened any more is an error: its users wait.
	all = map[string]*fakeExporter{"fuse": {kind: "fuse", left: []string{"a"}}}
	if _, err := NewAuto("auto", fakes(all, "ublk", "", "fuse", "no /dev/fuse")...); err == nil || !strings.Contains(err.Error(), "no /dev/fuse") {
		t.Errorf("survivors that cannot be adopted: %v", err)
	}
	if all["ublk"].closed != 1 {
		t.Error("ublk was left open")
	}
}

// TestAutoFindsOutLate: an exporter that fails only when it is used makes place for the next one.
func TestAutoFindsOutLate(t *testing.T) {
	late := fmt.Errorf("attach \"x\": %w: kernel too old", ErrUnavailable)
	all := map[string]*fakeExporter{"nbd": {kind: "nbd", attach: late}}
	a, err := NewAuto("auto", fakes(all, "nbd", "", "fuse", "")...)
	if err != nil {
		t.Fatal(err)
	}
	at, err := a.Attach(context.Background(), "x", nil, AttachOptions{})
	if err != nil || at.(fakeAttachment).by != "fuse" || a.Kind() != "fuse" {
		t.Errorf("%+v, %v", at, err)
	}
	if c := a.Choices()[0]; c.Chosen || c.Why != "kernel too old" {
		t.Errorf("%+v", c)
	}
	// Not if it was asked for, and not if there is no other.
	for _, kinds := range [][]string{{"nbd", "nbd", "", "fuse", ""}, {"auto", "nbd", ""}} {
		all = map[string]*fakeExporter{"nbd": {kind: "nbd", attach: late}}
		if a, err = NewAuto(kinds[0], fakes(all, kinds[1:]...)...); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Attach(context.Background(), "x", nil, AttachOptions{}); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%q: %v", kinds, err)
		}
		if a.Kind() != "nbd" {
			t.Errorf("%q: %s was chosen", kinds, a.Kind())
		}
	}
}
