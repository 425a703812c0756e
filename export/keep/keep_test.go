package keep

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
)

type rec struct {
	N int `json:"n"`
}

func TestRecords(t *testing.T) {
	r := Records[rec]{Dir: t.TempDir(), Version: 2}
	if v, err := r.Get("x"); v != nil || err != nil {
		t.Errorf("nothing: %v, %v", v, err)
	}
	for n := range 3 {
		if err := r.Put("x", rec{n}); err != nil {
			t.Fatal(err)
		}
	}
	if err := (Records[rec]{Dir: r.Dir, Version: 1}).Put("old", rec{7}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"bad.json": "{", ".half": "{", "readme": "", "..json": "{}"} {
		if err := os.WriteFile(filepath.Join(r.Dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := r.List()
	if err != nil || len(all) != 3 || all["x"] == nil || all["x"].N != 2 || all["old"] != nil || all["bad"] != nil {
		t.Errorf("%v, %v", all, err)
	}
	if err := r.Tidy(); err != nil {
		t.Error(err)
	}
	if l, _ := filepath.Glob(r.Dir + "/.*"); len(l) > 0 {
		t.Errorf("left: %q", l)
	}
	if err := errors.Join(r.Drop("x"), r.Drop("x")); err != nil {
		t.Error(err)
	}
	if v, err := r.Get("x"); v != nil || err != nil {
		t.Errorf("dropped: %v, %v", v, err)
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	f, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		g, err := Lock(dir)
		if err == nil {
			err = g.Close()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Errorf("locked twice: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	f.Close()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	var n Names[int]
	one := 1
	if err := n.Claim("x"); err != nil {
		t.Fatal(err)
	}
	if err := n.Claim("x"); !errors.Is(err, export.ErrExists) {
		t.Errorf("claimed twice: %v", err)
	}
	if err := n.Claim("../x"); err == nil {
		t.Error("a bad name was taken")
	}
	if len(n.List()) != 0 || !n.Has("x") {
		t.Error("a claim counts as an attachment")
	}
	n.Settle("x", &one)
	if l := n.List(); len(l) != 1 || l[0] != &one {
		t.Errorf("%v", l)
	}
	n.Settle("x", nil)
	if n.Has("x") || n.Closed() || !n.Close() || n.Close() || !n.Closed() {
		t.Error("states")
	}
	if err := n.Claim("y"); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("claimed after the close: %v", err)
	}
}

func TestLife(t *testing.T) {
	ctx := context.Background()
	l := NewLife()
	busy := errors.New("busy")
	runs := 0
	if err := l.Detach(ctx, func() (bool, error) { runs++; return false, busy }); !errors.Is(err, busy) {
		t.Error(err)
	}
	if !l.Leave() {
		t.Error("ended by a refusal")
	}
	// One detach for several callers; one does not wait.
	release, begun := make(chan struct{}), make(chan struct{})
	slow := func() (bool, error) { runs++; close(begun); <-release; return true, nil }
	short, cancel := context.WithCancel(ctx)
	first := make(chan error, 1)
	go func() { first <- l.Detach(short, slow) }()
	<-begun
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	l.Cut() // the kernel's side goes while we take it away
	select {
	case <-l.Done():
		t.Error("done before the detach")
	default:
	}
	second := make(chan error, 1)
	go func() { second <- l.Detach(ctx, slow) }()
	close(release)
	if err := <-second; err != nil || l.Leave() {
		t.Error("still there", err)
	}
	<-l.Done()
	if err := l.Detach(ctx, slow); err != nil || runs != 2 {
		t.Errorf("%v, %d runs", err, runs)
	}
	cut := NewLife()
	cut.Cut()
	<-cut.Done()
	if !cut.Leave() {
		t.Error("what was cut is still to be cleared away")
	}
	cut.End()
	cut.Cut()
}
