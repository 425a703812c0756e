package user

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/journal"
	"mica/thin"
)

// A dyingPool is a pool in files whose opener can go without a word, as a process does that is
// killed: nothing is committed, the locks go, the journal stays.
type dyingPool struct {
	t    *testing.T
	l    Location
	o    Options
	p    *Pool
	data *dev.Fault
	meta *dev.Fault
	size int64 // of thin devices
}

func newDying(t *testing.T, o Options) *dyingPool {
	t.Helper()
	dir := shm(t)
	d := &dyingPool{t: t, l: Location{Dir: filepath.Join(dir, "pool")}, o: o, size: 32 << 20}
	d.o.Logger = quiet
	d.o.JournalDirs = []string{filepath.Join(dir, "j")}
	if d.o.JournalBytes == 0 {
		d.o.JournalBytes = 1 << 20 // quickly made
	}
	if d.o.CommitInterval == 0 {
		d.o.CommitInterval = time.Hour
	}
	must(t, Format(ctx, d.l, FormatOptions{DataBytes: 64 << 20}))
	d.open()
	t.Cleanup(func() {
		if d.p != nil {
			d.die()
		}
	})
	return d
}

// tryOpen opens the pool on devices that can be made to fail.
func (d *dyingPool) tryOpen(o Options) (*Pool, error) {
	d.t.Helper()
	id, err := journal.Identify(d.l.MetadataPath())
	must(d.t, err)
	do := dev.OpenOptions{ReadOnly: o.ReadOnly, Lock: true}
	// A child that another test is just starting has the locks of the one that died.
	m, err := openLocked(ctx, d.l, d.l.MetadataPath(), do, 10*time.Second)
	must(d.t, err)
	x, err := openLocked(ctx, d.l, d.l.DataPath(), do, 10*time.Second)
	must(d.t, err)
	d.meta, d.data = dev.NewFault(m), dev.NewFault(x)
	return openOn(d.meta, d.data, o, &id)
}

func (d *dyingPool) open() {
	d.t.Helper()
	p, err := d.tryOpen(d.o)
	must(d.t, err)
	d.p = p
}

func (d *dyingPool) thin(id thin.DevID) *Thin {
	d.t.Helper()
	h, err := d.p.Open(ctx, id, engine.OpenOptions{SizeBytes: d.size})
	must(d.t, err)
	return h.(*Thin)
}

func (d *dyingPool) journal() engine.Journal {
	d.t.Helper()
	s, err := d.p.Status(ctx)
	must(d.t, err)
	return s.Journal
}

// die is what the kernel does when the process is killed.
func (d *dyingPool) die() {
	d.t.Helper()
	close(d.p.stop)
	d.p.loops.Wait()
	if d.p.journal != nil {
		must(d.t, d.p.journal.Close())
	}
	d.p.meta.Close()
	d.p.data.Close()
	d.p = nil
}

// dieAndOpen is a kill and the next opener.
func (d *dyingPool) dieAndOpen() {
	d.t.Helper()
	d.die()
	d.open()
}

// close closes all devices and the pool, and checks it.
func (d *dyingPool) close(open ...*Thin) {
	d.t.Helper()
	for _, h := range open {
		must(d.t, h.Close())
	}
	must(d.t, d.p.Close())
	d.p = nil
	checkFile(d.t, d.l.MetadataPath())
	if f, err := os.ReadDir(d.o.JournalDirs[0]); err == nil && len(f) > 0 {
		d.t.Errorf("after a clean close there is still %s", f[0].Name())
	}
}

const blk = 64 << 10

// TestTakeOver goes through what the journal has to know: each kind of change, the counts of
// devices, the blocks that are in use, and what is done by the next opener on top of it.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	d := newDying(t, Options{})
	for id := range thin.DevID(3) {
		must(t, d.p.CreateThin(ctx, id+1))
	}
	a, b := d.thin(1), d.thin(2)
	write(t, a, fill(1, 20*blk), 0)
	write(t, b, fill(2, 3*blk), blk/2)
	must(t, d.p.Commit(ctx))
	must(t, d.p.CreateSnap(ctx, 10, 1))

	write(t, a, fill(3, 4*blk+512), 4*blk)       // new places for whole blocks and a part of one
	write(t, a, fill(4, 512), 30*blk+512)        // a new block, written in part
	write(t, a, fill(5, 200*blk), 100*blk)       // several runs
	write(t, a, fill(6, blk), 110*blk)           // in place
	must(t, a.Discard(10*blk, 3*blk))            // unmapped
	must(t, a.WriteZeroes(14*blk, blk/2, false)) // breaks sharing
	must(t, a.WriteZeroes(14*blk+blk/2, blk/2, false))
	write(t, a, fill(7, 2*blk), 11*blk) // unmapped, and mapped again
	must(t, a.Discard(11*blk, blk))     // and unmapped again
	must(t, a.Discard(150*blk, 10*blk)) // new ones that go at once
	must(t, b.Discard(0, 32<<20))
	write(t, b, fill(8, blk), 500*blk)
	wantA, wantB := read(t, a, int(d.size), 0), read(t, b, int(d.size), 0)
	mappedA, mappedB := a.MappedBlocks(), b.MappedBlocks()
	d.dieAndOpen()

	j := d.journal()
	if j.State != "on" || j.TakenOver == 0 || j.Problem != "" || j.Entries != 0 {
		t.Errorf("journal after it was taken over: %+v", j)
	}
	a, b = d.thin(1), d.thin(2)
	snap := d.thin(10)
	if !bytes.Equal(read(t, a, int(d.size), 0), wantA) || !bytes.Equal(read(t, b, int(d.size), 0), wantB) {
		t.Fatal("a device reads differently after it was taken over")
	}
	wantBytes(t, snap, 1, 20*blk, 0)
	if a.MappedBlocks() != mappedA || b.MappedBlocks() != mappedB {
		t.Errorf("mapped %d and %d, want %d and %d", a.MappedBlocks(), b.MappedBlocks(), mappedA, mappedB)
	}
	if own, err := d.p.OwnBlocks(ctx, 1); err != nil || own != mappedA {
		t.Errorf("%d own blocks (%v), want all %d", own, err, mappedA)
	}
	// What is in use is not handed out again, and what is free shows zeros, until the pool is full.
	c := d.thin(3)
	var full error
	for off := int64(0); off < d.size && full == nil; off += blk {
		if _, full = c.WriteAt(fill(9, 512), off+1024); full == nil {
			wantBytes(t, c, 0, 1024, off)
			wantBytes(t, c, 0, blk-1536, off+1536)
		}
	}
	if !bytes.Equal(read(t, a, int(d.size), 0), wantA) || !bytes.Equal(read(t, b, int(d.size), 0), wantB) {
		t.Fatal("a device reads differently after another one was written")
	}
	wantBytes(t, snap, 1, 20*blk, 0)
	d.close(a, b, c, snap)
}

// TestTakeOverEvent: the first who listens hears of it, although it came later.
func TestTakeOverEvent(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	write(t, d.thin(1), fill(1, blk), 0)
	d.dieAndOpen()
	ch, cancel := d.p.Events()
	defer cancel()
	select {
	case ev := <-ch:
		if ev.Kind != engine.EventJournal || !strings.Contains(ev.Detail, "1 mappings set") {
			t.Errorf("event %+v", ev)
		}
	default:
		t.Error("no event")
	}
	d.close()
}

// TestReadOnlyLook: whoever only looks sees the last commit, says what waits, and changes nothing.
func TestReadOnlyLook(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	h := d.thin(1)
	write(t, h, fill(1, blk), 0)
	must(t, h.Flush())
	write(t, h, fill(2, blk), blk)
	path := d.p.journal.Path()
	d.die()
	for range 2 {
		o := d.o
		o.ReadOnly = true
		p, err := d.tryOpen(o)
		must(t, err)
		s, err := p.Status(ctx)
		must(t, err)
		if j := s.Journal; j.State != "waiting" || j.Entries != 1 || j.Path != path {
			t.Errorf("journal %+v, want one that waits with 1 entry", j)
		}
		r, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: d.size, ReadOnly: true})
		must(t, err)
		wantBytes(t, r, 1, blk, 0)
		wantBytes(t, r, 0, blk, blk)
		must(t, r.Close())
		must(t, p.Close())
		w, err := journal.WaitingFor(d.l.MetadataPath(), journal.Options{Dirs: d.o.JournalDirs})
		if err != nil || w == nil || w.Entries != 1 || w.Path != path {
			t.Errorf("waiting: %+v, %v", w, err)
		}
	}
	d.open()
	h = d.thin(1)
	wantBytes(t, h, 2, blk, blk)
	d.close(h)
}

// TestNeedsCheckWaits: a pool that is marked takes nothing over before it has been checked.
func TestNeedsCheckWaits(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	write(t, d.thin(1), fill(1, blk), 0)
	must(t, d.p.meta.SetNeedsCheck())
	d.dieAndOpen()
	if j := d.journal(); j.State != "waiting" || j.Entries != 1 {
		t.Errorf("journal %+v", j)
	}
	must(t, d.p.Close())
	m, err := dev.OpenFile(d.l.MetadataPath(), dev.OpenOptions{Lock: true})
	must(t, err)
	_, err = thin.Check(m, thin.CheckOptions{ClearNeedsCheck: true})
	must(t, err)
	must(t, m.Close())
	d.open()
	h := d.thin(1)
	wantBytes(t, h, 1, blk, 0)
	d.close(h)
}

// TestForeignState: a pool that somebody else has changed since, or that was put back from a copy,
// takes nothing, and says so.
func TestForeignState(t *testing.T) {
	for _, c := range []string{"changed", "an older copy"} {
		t.Run(c, func(t *testing.T) {
			d := newDying(t, Options{})
			must(t, d.p.CreateThin(ctx, 1))
			h := d.thin(1)
			must(t, d.p.Commit(ctx))
			old, err := os.ReadFile(d.l.MetadataPath())
			must(t, err)
			write(t, h, fill(1, blk), 0)
			must(t, h.Flush())
			write(t, h, fill(2, blk), blk)
			path := d.p.journal.Path()
			d.die()
			if c == "changed" {
				must(t, os.Rename(path, path+".away"))
				d.open()
				must(t, d.p.CreateThin(ctx, 2))
				must(t, d.p.Close())
				must(t, os.Rename(path+".away", path))
			} else {
				f, err := os.OpenFile(d.l.MetadataPath(), os.O_RDWR, 0)
				must(t, err)
				_, err = f.WriteAt(old, 0)
				must(t, err)
				must(t, f.Close())
			}
			d.open()
			if j := d.journal(); j.State != "on" || j.TakenOver != 0 || !strings.Contains(j.Problem, "entries") {
				t.Errorf("journal %+v", j)
			}
			ch, cancel := d.p.Events()
			defer cancel()
			if ev := <-ch; ev.Kind != engine.EventJournal || !strings.Contains(ev.Detail, "left behind") {
				t.Errorf("event %+v", ev)
			}
			h = d.thin(1)
			if c == "changed" {
				wantBytes(t, h, 1, blk, 0)
			} else {
				wantBytes(t, h, 0, blk, 0) // the commit that the copy lacks had it
			}
			wantBytes(t, h, 0, blk, blk)
			d.close(h)
		})
	}
}

// TestOtherJournals: what lies in the place of the journal and is not this pool's of this boot.
func TestOtherJournals(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(b []byte)
		refused error
		problem string
	}{
		{"another boot", func(b []byte) {
			b[30]++ // of the boot id, and the checksum of the header
			binary.NativeEndian.PutUint32(b[12:], crc32.Checksum(b[16:4096], crc32.MakeTable(crc32.Castagnoli)))
		}, nil, "another boot"},
		{"damaged", func(b []byte) { clear(b[:4096]) }, nil, "damaged"},
		{"a newer version", func(b []byte) { b[8]++ }, journal.ErrVersion, "newer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDying(t, Options{})
			must(t, d.p.CreateThin(ctx, 1))
			write(t, d.thin(1), fill(1, blk), 0)
			path := d.p.journal.Path()
			d.die()
			b, err := os.ReadFile(path)
			must(t, err)
			c.change(b)
			must(t, os.WriteFile(path, b, 0o600))
			if c.refused != nil {
				if _, err := d.tryOpen(d.o); !errors.Is(err, c.refused) {
					t.Fatalf("open: %v, want %v", err, c.refused)
				}
				o := d.o
				o.ReadOnly = true
				p, err := d.tryOpen(o)
				must(t, err)
				s, err := p.Status(ctx)
				must(t, err)
				if !strings.Contains(s.Journal.Problem, c.problem) {
					t.Errorf("looked at: %+v", s.Journal)
				}
				must(t, p.Close())
				must(t, os.Remove(path)) // the way out that the message names
				d.open()
			} else {
				d.open()
				if j := d.journal(); j.State != "on" || j.TakenOver != 0 || !strings.Contains(j.Problem, c.problem) {
					t.Errorf("journal %+v", j)
				}
			}
			h := d.thin(1)
			wantBytes(t, h, 0, blk, 0)
			d.close(h)
		})
	}
}

// TestFailedPoolIsNotTakenOver: what a pool acknowledged before a sync or a metadata write failed is as
// after power loss.
func TestFailedPoolIsNotTakenOver(t *testing.T) {
	for _, c := range []struct {
		name string
		fail func(d *dyingPool)
	}{
		{"data sync", func(d *dyingPool) { d.data.Add(dev.Rule{Ops: dev.OpFlush}) }},
		{"metadata write", func(d *dyingPool) { d.meta.Add(dev.Rule{Ops: dev.OpWrite, Times: 1}) }},
		{"superblock flush", func(d *dyingPool) { d.meta.Add(dev.Rule{Ops: dev.OpFlush, Skip: 1, Times: 1}) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDying(t, Options{})
			must(t, d.p.CreateThin(ctx, 1))
			h := d.thin(1)
			write(t, h, fill(1, blk), 0)
			must(t, h.Flush())
			write(t, h, fill(2, blk), blk)
			c.fail(d)
			if err := h.Flush(); !errors.Is(err, engine.ErrFailed) {
				t.Fatalf("flush: %v, want ErrFailed", err)
			}
			d.dieAndOpen()
			if j := d.journal(); j.TakenOver != 0 || j.Problem == "" && c.name != "superblock flush" {
				t.Errorf("journal %+v", j)
			}
			if !d.p.meta.NeedsCheck() {
				t.Error("the pool is not marked needs_check")
			}
			must(t, d.p.Close())
			d.p = nil
		})
	}
}

// TestTakeOverFails: whatever fails while a journal is taken over, nothing is lost: the next opener
// does it again. But after a failed sync of the data nobody does.
func TestTakeOverFails(t *testing.T) {
	t.Parallel()
	prepare := func(t *testing.T) *dyingPool {
		d := newDying(t, Options{})
		must(t, d.p.CreateThin(ctx, 1))
		h := d.thin(1)
		write(t, h, fill(1, 2*blk), 0)
		must(t, h.Flush())
		write(t, h, fill(2, blk), blk)
		write(t, h, fill(3, 9*blk), 2*blk)
		d.die()
		return d
	}
	tries := 0
	for n := 0; ; n++ {
		d := prepare(t)
		// The n-th request to the metadata from the start of the takeover fails.
		o := d.o
		o.step = func(name string) {
			if name == "found" {
				d.meta.Add(dev.Rule{Ops: dev.OpAny, Skip: n, Times: 1})
			}
		}
		p, err := d.tryOpen(o)
		if err == nil {
			d.p = p
		} else {
			if !errors.Is(err, dev.ErrInjected) {
				t.Fatalf("request %d: %v", n, err)
			}
			d.open()
		}
		h := d.thin(1)
		wantBytes(t, h, 1, blk, 0)
		wantBytes(t, h, 2, blk, blk)
		wantBytes(t, h, 3, 9*blk, 2*blk)
		d.close(h)
		if err == nil {
			break
		}
		tries++
	}
	if tries < 5 {
		t.Errorf("only %d requests were made to fail", tries)
	}

	d := prepare(t)
	o := d.o
	o.step = func(name string) {
		if name == "found" {
			d.data.Add(dev.Rule{Ops: dev.OpFlush, Times: 1})
		}
	}
	if _, err := d.tryOpen(o); !errors.Is(err, dev.ErrInjected) {
		t.Fatalf("open with a sync that fails: %v", err)
	}
	d.open()
	if j := d.journal(); !d.p.meta.NeedsCheck() || j.TakenOver != 0 || j.Problem == "" {
		t.Errorf("after a sync that failed: needs_check %v, journal %+v", d.p.meta.NeedsCheck(), j)
	}
	must(t, d.p.Close())
	d.p = nil
}

// TestGrowthUnderWay: a write to blocks that a growth has added is acknowledged before the growth is.
func TestGrowthUnderWay(t *testing.T) {
	t.Parallel()
	d := newDying(t, Options{ErrorIfNoSpace: true})
	d.size = 128 << 20
	must(t, d.p.CreateThin(ctx, 1))
	h := d.thin(1)
	write(t, h, fill(1, 64<<20), 0)
	must(t, h.Flush())
	must(t, resize(d.p.data.Device, 80<<20))
	must(t, d.p.data.findZero(1024, 1280))
	d.p.applyMu.Lock()
	must(t, d.p.meta.GrowData(1280)) // not committed yet
	d.p.applyMu.Unlock()
	d.p.spaceFreed()
	write(t, h, fill(2, 3*blk), 64<<20)
	d.dieAndOpen()
	h = d.thin(1)
	wantBytes(t, h, 1, 64<<20, 0)
	wantBytes(t, h, 2, 3*blk, 64<<20)
	if n := d.p.meta.DataBlocks(); n < 1027 || n > 1280 {
		t.Errorf("%d data blocks", n)
	}
	must(t, d.p.GrowData(ctx, 80<<20))
	write(t, h, fill(3, 8<<20), 70<<20)
	d.close(h)
}

// TestDeviceNotAcknowledged: changes of a device whose creation was not committed go with it.
func TestDeviceNotAcknowledged(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	d.p.applyMu.Lock()
	must(t, d.p.meta.CreateThin(2))
	d.p.applyMu.Unlock()
	write(t, d.thin(2), fill(2, 3*blk), 0)
	write(t, d.thin(1), fill(1, blk), 0)
	d.dieAndOpen()
	if devs, err := d.p.Devices(ctx); err != nil || len(devs) != 1 {
		t.Errorf("devices %v, %v", devs, err)
	}
	if j := d.journal(); j.TakenOver != 1 || j.Problem != "" {
		t.Errorf("journal %+v", j)
	}
	h := d.thin(1)
	wantBytes(t, h, 1, blk, 0)
	d.close(h)
}

// TestContradiction: entries that name blocks in use, or beyond the end, are left out and said.
func TestContradiction(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	must(t, d.p.CreateThin(ctx, 2))
	h := d.thin(1)
	write(t, h, fill(1, 4*blk), 0)
	must(t, h.Flush())
	var used thin.DataBlock
	must(t, d.p.meta.LookupRange(1, 0, 1, func(e thin.Entry) bool { used = e.Block; return true }))
	j := d.p.journal
	for _, e := range []journal.Entry{
		{ID: 2, VBlock: 7, Len: 1, Block: used},           // device 1 has it
		{ID: 2, VBlock: 8, Len: 1, Block: 500},            // twice
		{ID: 2, VBlock: 9, Len: 1, Block: 500},            //
		{ID: 2, VBlock: 10, Len: 2, Block: 1 << 30},       // beyond the end
		{ID: 1, VBlock: 0, Len: 1, Block: used},           // known
		{ID: 99, VBlock: 0, Len: 512, Block: 600},         // no such device
		{ID: 2, VBlock: 1 << 39, Len: 4, Block: 700},      // far out
		{ID: 2, VBlock: 20, Len: 100, Removed: true},      // nothing there
		{ID: 1, VBlock: 512, Len: 512, Block: 1023 - 600}, // some of it in use by now
	} {
		must(t, j.Append(e))
	}
	d.dieAndOpen()
	s := d.journal()
	if s.TakenOver == 0 || !strings.Contains(s.Problem, "contradict") {
		t.Errorf("journal %+v", s)
	}
	h = d.thin(1)
	wantBytes(t, h, 1, 4*blk, 0)
	d.close(h)
}

// TestTinyJournal: with 64 slots writers wait for commits all the time, and nothing is lost.
func TestTinyJournal(t *testing.T) {
	t.Parallel()
	d := newDying(t, Options{JournalBytes: 4*4096 + 8*32})
	const workers = 8
	var devs [workers]*Thin
	for w := range devs {
		must(t, d.p.CreateThin(ctx, thin.DevID(w+1)))
		devs[w] = d.thin(thin.DevID(w + 1))
	}
	round := func(c byte) {
		var wg sync.WaitGroup
		for w := range devs {
			wg.Go(func() {
				for i := range int64(60) {
					switch {
					case c > 1 && i%5 == 4:
						if err := devs[w].Discard(i*blk, blk); err != nil {
							t.Error(err)
						}
					case i%7 != 6:
						if _, err := devs[w].WriteAt(fill(c+byte(w), blk), i*blk); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
	}
	check := func(c byte) {
		t.Helper()
		for w := range devs {
			for i := range int64(60) {
				want := c + byte(w)
				if i%7 == 6 || c > 1 && i%5 == 4 {
					want = 0
				}
				wantBytes(t, devs[w], want, blk, i*blk)
			}
		}
	}
	round(1)
	check(1)
	if n := d.p.commits.writes.Load(); n < 3 {
		t.Errorf("%d commits: the journal was never full", n)
	}
	d.dieAndOpen()
	for w := range devs {
		devs[w] = d.thin(thin.DevID(w + 1))
	}
	check(1)
	for w := range thin.DevID(workers) { // shared, so that writes need blocks again
		must(t, d.p.CreateSnap(ctx, 100+w, w+1))
	}
	round(20)
	d.dieAndOpen()
	for w := range devs {
		devs[w] = d.thin(thin.DevID(w + 1))
	}
	check(20)
	d.close(devs[:]...)
}

// TestHalfFullJournalCommits: no timer and no number of pending mappings starts this commit.
func TestHalfFullJournalCommits(t *testing.T) {
	d := newDying(t, Options{JournalBytes: 20 << 10, MaxPending: 1 << 20})
	must(t, d.p.CreateThin(ctx, 1))
	h := d.thin(1)
	must(t, h.Flush())
	before := d.p.commits.writes.Load()
	for i := range int64(30) { // 64 slots
		write(t, h, fill(1, 512), i*blk)
	}
	if n := d.p.commits.writes.Load(); n != before {
		t.Fatalf("%d commits before it was half full", n-before)
	}
	for i := int64(30); i < 40; i++ {
		write(t, h, fill(1, 512), i*blk)
	}
	eventually(t, "a commit", func() bool { return d.p.commits.writes.Load() > before })
	d.close(h)
}

// TestListedBeforeJournal: what is in the journal's open generation is on the list that the next
// commit goes by. The other way round a commit that begins in between would have the change in
// the generation that it closes, and not in its own set.
func TestListedBeforeJournal(t *testing.T) {
	d := newDying(t, Options{JournalBytes: 20 << 10})
	must(t, d.p.CreateThin(ctx, 1))
	must(t, d.p.CreateThin(ctx, 2))
	a, b := d.thin(1), d.thin(2)
	seen := false
	d.p.opts.step = func(name string) {
		if name == "half" {
			d.p.dirtyMu.Lock()
			seen = slices.Contains(d.p.dirtyDevs, b.d) && len(b.d.dirty) == 1
			d.p.dirtyMu.Unlock()
			if b.d.table.at(0).entries[0].Load() != absent {
				t.Error("the mapping can be seen before it is in the journal")
			}
		}
	}
	for i := range int64(32) {
		write(t, a, fill(1, 512), i*blk)
	}
	write(t, b, fill(1, 512), 0)
	if !seen {
		t.Error("the device is not on the list while its first change is in the journal")
	}
	d.close(a, b)
}

// TestMappedWritesLeaveTheJournalAlone: it costs only who changes a mapping.
func TestMappedWritesLeaveTheJournalAlone(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	h := d.thin(1)
	write(t, h, fill(1, 130*blk), 0)
	n := d.journal().Entries
	if n != 2 { // a run has 128 blocks at most
		t.Errorf("%d entries for 130 blocks in a row, want 2", n)
	}
	p := fill(2, 4096)
	allocs := testing.AllocsPerRun(100, func() {
		write(t, h, p, 8192)
		must(t, h.TryWriteAt(p, 8192))
	})
	if got := d.journal().Entries; got != n || allocs != 0 {
		t.Errorf("%d entries after overwrites, want %d; %v allocations, want 0", got, n, allocs)
	}
	d.close(h)
}

// TestFirstWriteAllocations: the journal adds nothing to what a first write allocates.
func TestFirstWriteAllocations(t *testing.T) {
	var got [2]float64
	for i, none := range []bool{true, false} {
		d := newDying(t, Options{NoJournal: none})
		must(t, d.p.CreateThin(ctx, 1))
		h := d.thin(1)
		write(t, h, fill(1, blk), 500*blk) // the leaf and an extent are there
		off, p := int64(0), fill(2, blk)
		got[i] = testing.AllocsPerRun(200, func() {
			write(t, h, p, off)
			off += blk
		})
		d.close(h)
	}
	if got[1] > got[0] {
		t.Errorf("%v allocations a first write with a journal, %v without", got[1], got[0])
	}
}

// TestJournalOptions: without a place, and without being wanted.
func TestJournalOptions(t *testing.T) {
	d := newDying(t, Options{})
	must(t, d.p.CreateThin(ctx, 1))
	write(t, d.thin(1), fill(1, blk), 0)
	d.die()
	dirs := d.o.JournalDirs
	// Whoever wants no journal still takes over what is there.
	d.o.NoJournal = true
	d.open()
	if j := d.journal(); j.State != "off" || j.TakenOver != 1 {
		t.Errorf("without a journal: %+v", j)
	}
	h := d.thin(1)
	wantBytes(t, h, 1, blk, 0)
	d.close(h)

	d.o.NoJournal, d.o.JournalDirs = false, []string{"/proc/no/place"}
	if _, err := d.tryOpen(d.o); !errors.Is(err, ErrNoJournal) {
		t.Errorf("open without a place: %v, want ErrNoJournal", err)
	}
	d.o.JournalOptional = true
	d.open()
	if j := d.journal(); j.State != "off" || j.Problem == "" {
		t.Errorf("without a place: %+v", j)
	}
	d.o.JournalDirs = dirs
	d.close()
}

// TestFormatDiscards: a pool made anew in the same file is not met by the journal of the old one,
// not even if the two look the same.
func TestFormatDiscards(t *testing.T) {
	dir := shm(t)
	l := Location{Dir: filepath.Join(dir, "pool")}
	format := func() *Pool {
		t.Helper()
		must(t, Format(ctx, l, FormatOptions{DataBytes: 64 << 20, Force: true}))
		p, err := Open(ctx, l, Options{Logger: quiet, CommitInterval: time.Hour})
		must(t, err)
		must(t, p.CreateThin(ctx, 1))
		return p
	}
	d := &dyingPool{t: t, l: l, p: format(), size: 1 << 20}
	write(t, d.thin(1), fill(1, blk), 0)
	d.die()
	if w, err := JournalWaiting(l); err != nil || w == nil {
		t.Fatalf("waiting: %v, %v", w, err)
	}
	p := format()
	if s, err := p.Status(ctx); err != nil || s.Journal.TakenOver != 0 || s.Journal.Problem != "" {
		t.Errorf("journal %+v, %v", s.Journal, err)
	}
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
	must(t, err)
	wantBytes(t, h, 0, blk, 0)
	must(t, h.Close())
	must(t, p.Close())

	d.p = format()
	write(t, d.thin(1), fill(2, blk), 0)
	d.die()
	must(t, TakeOver(ctx, l, Options{Logger: quiet}))
	if w, err := JournalWaiting(l); err != nil || w != nil {
		t.Errorf("taken over, and waiting: %v, %v", w, err)
	}
	v, err := Open(ctx, l, Options{Logger: quiet})
	must(t, err)
	if i, err := v.Device(ctx, 1); err != nil || i.MappedBlocks != 1 {
		t.Errorf("device %+v, %v", i, err)
	}
	must(t, v.Close())
}

// TestBlockDevicesTakenOver: a pool on block devices is known by the number of its metadata device,
// under whatever name it is opened.
func TestBlockDevicesTakenOver(t *testing.T) {
	l := Location{Data: loop(t, 64<<20), Metadata: loop(t, 4<<20)}
	must(t, Format(ctx, l, FormatOptions{}))
	o := Options{Logger: quiet, CommitInterval: time.Hour}
	p, err := Open(ctx, l, o)
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	d := &dyingPool{t: t, l: l, p: p, size: 32 << 20}
	write(t, d.thin(1), fill(1, 3*blk), 5*blk)
	if name := filepath.Base(p.journal.Path()); !strings.HasPrefix(name, "block-7-") {
		t.Errorf("the journal is named %s", name)
	}
	d.die()
	other := filepath.Join(shm(t), "another-name")
	must(t, os.Symlink(l.Metadata, other))
	l.Metadata = other
	if w, err := JournalWaiting(l); err != nil || w == nil || w.Entries != 1 {
		t.Errorf("waiting: %+v, %v", w, err)
	}
	p, err = Open(ctx, l, o)
	must(t, err)
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 32 << 20})
	must(t, err)
	wantBytes(t, h, 1, 3*blk, 5*blk)
	wantBytes(t, h, 0, 5*blk, 0)
	must(t, h.Close())
	must(t, p.Close())
	if w, err := JournalWaiting(l); err != nil || w != nil {
		t.Errorf("waiting after a clean close: %+v, %v", w, err)
	}
}

// BenchmarkFirstWrite is the cost of the journal: the first write to each block, with one and
// without. bs=0 is the layer alone: whole blocks on a device whose data cost nothing.
func BenchmarkFirstWrite(b *testing.B) {
	for _, bs := range []int64{0, 4 << 10, 64 << 10, 1 << 20} {
		for _, none := range []bool{true, false} {
			name, n, alone := fmt.Sprintf("bs=%dKiB/journal=%v", bs>>10, !none), bs, bs == 0
			if alone {
				n = blk
			}
			b.Run(name, func(b *testing.B) {
				l := Location{Dir: filepath.Join(shm(b), "pool")}
				must(b, Format(ctx, l, FormatOptions{DataBytes: 4 * benchBytes}))
				p, err := Open(ctx, l, Options{NoJournal: none})
				must(b, err)
				b.Cleanup(func() { must(b, p.Close()) })
				must(b, p.CreateThin(ctx, 1))
				h := benchThin(b, p, 1, 1<<40)
				if alone {
					p.data.Device = nothing{p.data.Device}
				}
				buf := fill(1, n)
				b.ReportAllocs()
				off := int64(0)
				for b.Loop() {
					write(b, h, buf, off)
					if off += max(n, blk); off >= 2*benchBytes {
						b.StopTimer()
						must(b, h.Discard(0, off))
						must(b, p.Commit(ctx))
						off = 0
						b.StartTimer()
					}
				}
			})
		}
	}
}
