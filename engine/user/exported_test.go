package user

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"mica/engine"
	"mica/thin"
)

// TestRefusedFormatKeepsJournal: a pool in two files that is not made anew after all keeps what waits
// for it.
func TestRefusedFormatKeepsJournal(t *testing.T) {
	dir := shm(t)
	l := Location{Data: filepath.Join(dir, "d"), Metadata: filepath.Join(dir, "m")}
	o := FormatOptions{DataBytes: 64 << 20, MetadataBytes: 4 << 20}
	must(t, Format(ctx, l, o))
	p, err := Open(ctx, l, Options{Logger: quiet, CommitInterval: time.Hour})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	d := &dyingPool{t: t, l: l, p: p, size: 1 << 20}
	write(t, d.thin(1), fill(1, blk), 0)
	d.die()
	if err := Format(ctx, l, o); !errors.Is(err, thin.ErrExists) {
		t.Errorf("format over a pool: %v", err)
	}
	o.Force, o.BlockSize = true, 64<<10
	l2 := l
	l2.Data = filepath.Join(dir, "short")
	must(t, os.WriteFile(l2.Data, make([]byte, 4096), 0o600))
	if err := Format(ctx, l2, o); err == nil {
		t.Error("a data file of 4096 bytes was taken")
	}
	if w, err := JournalWaiting(l); err != nil || w == nil || w.Entries != 1 {
		t.Errorf("waiting: %+v, %v", w, err)
	}
	p, err = Open(ctx, l, Options{Logger: quiet})
	must(t, err)
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
	must(t, err)
	wantBytes(t, h, 1, blk, 0)
	must(t, h.Close())
	must(t, p.Close())
}

// TestExportedPool: a pool of which somebody's devices are left is opened for writing by him alone,
// and before anything of its journal is taken over. The note stays until nothing is left.
func TestExportedPool(t *testing.T) {
	run := shm(t)
	node := filepath.Join(run, "fuse", "web")
	e := &Exports{Run: run, Dirs: []string{filepath.Join(run, "fuse")}}
	d := newDying(t, Options{})
	must(t, d.p.Close())
	open := func(o Options, e *Exports) (*Pool, error) {
		o.JournalDirs, o.JournalBytes, o.Logger, o.CommitInterval, o.Exports = d.o.JournalDirs, 1<<20, quiet, time.Hour, e
		return Open(ctx, d.l, o)
	}
	must(t, os.MkdirAll(node, 0o700))
	p, err := open(Options{}, e)
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	d.p = p
	write(t, d.thin(1), fill(1, blk), 0)
	d.die()
	for _, other := range []*Exports{nil, {Run: shm(t)}} {
		if _, err := open(Options{}, other); !errors.Is(err, ErrExported) {
			t.Errorf("open by another: %v", err)
		}
	}
	p, err = open(Options{ReadOnly: true}, nil)
	must(t, err)
	if s := p.journalStatus(); s.State != "waiting" {
		t.Errorf("journal %+v", s)
	}
	must(t, p.Close())

	// In order, and the device still there: the same.
	p, err = open(Options{}, e)
	must(t, err)
	if p.taken.changed != 1 {
		t.Errorf("%d changes taken over", p.taken.changed)
	}
	must(t, p.Close())
	if _, err := open(Options{}, nil); !errors.Is(err, ErrExported) {
		t.Errorf("open by another after a clean close: %v", err)
	}
	// Gone with the last one, be it behind the daemon's back.
	for _, detach := range []func(){
		func() { must(t, os.Remove(node)) },
		func() {
			must(t, os.Mkdir(node, 0o700))
			p, err := open(Options{}, e)
			must(t, err)
			must(t, os.Remove(node))
			must(t, p.Close())
		},
	} {
		detach()
		p, err = open(Options{}, nil)
		must(t, err)
		must(t, p.Close())
		if left, err := os.ReadDir(d.o.JournalDirs[0]); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	d.p = nil
}
