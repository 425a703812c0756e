package keep

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/node"
)

// A host is a kernel whose block devices are what is in a map: number to cookie.
type host struct {
	mu   sync.Mutex
	devs map[int]string // guarded by mu
	log  []string       // guarded by mu
}

func (h *host) note(format string, a ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.log = append(h.log, fmt.Sprintf(format, a...))
}

func (h *host) set(n int, cookie string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if cookie == "" {
		delete(h.devs, n)
	} else {
		h.devs[n] = cookie
	}
}

var theHost *host // of the test that runs

type record struct {
	N      int    `json:"n"`
	Cookie string `json:"cookie"`
	Shape
}

func (r record) Path() string { return "/dev/fake" + strconv.Itoa(r.N) }

func (r record) IsThere() bool {
	theHost.mu.Lock()
	defer theHost.mu.Unlock()
	return theHost.devs[r.N] == r.Cookie
}

func numberOf(path string) (int, error) { return strconv.Atoi(strings.TrimPrefix(path, "/dev/fake")) }

// A fakeNode is a device in our hands.
type fakeNode struct {
	x    *Exporter[record, *fakeNode]
	name string
	rec  record
	take error // what Take says; nil and ErrNotSynced take the device away
	grow error
	cut  func()
}

func (n *fakeNode) Grow(size int64) error {
	if n.grow != nil {
		return n.grow
	}
	n.rec.Size = size
	return n.x.Records.Put(n.name, n.rec)
}

func (n *fakeNode) Take(link string) error {
	theHost.note("take %s", n.name)
	if n.take == nil || errors.Is(n.take, node.ErrNotSynced) {
		os.Remove(link)
		theHost.set(n.rec.N, "")
		n.cut()
	}
	return n.take
}

func (n *fakeNode) Leave() { theHost.note("leave %s", n.name) }

func (n *fakeNode) Clear() error {
	theHost.note("clear %s", n.name)
	return nil
}

// A flushed counts flushes.
type flushed struct {
	*dev.Mem
	n *int
}

func (f flushed) Flush() error {
	*f.n++
	return nil
}

type rig struct {
	t   *testing.T
	dir string
	x   *Exporter[record, *fakeNode]
}

func newRig(t *testing.T) *rig {
	theHost = &host{devs: map[int]string{}}
	r := &rig{t: t, dir: t.TempDir()}
	r.open()
	return r
}

func (r *rig) open() {
	r.t.Helper()
	x := &Exporter[record, *fakeNode]{}
	r.x = x
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	err := x.Open(Options{Dir: filepath.Join(r.dir, "records"), Version: 1, LinkDir: r.links(), Log: log}, func() error {
		live, err := x.Live(func(rec record) int { return rec.N })
		if err != nil {
			return err
		}
		return x.CleanLinks("me", live, numberOf, func(n int, link string) bool { return theHost.devs[n] != "theirs" })
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { x.Close(nil) })
}

func (r *rig) links() string { return filepath.Join(r.dir, "links") }

func (r *rig) attach(name string, n int, d dev.Device, o export.AttachOptions) (export.Attachment, *fakeNode, error) {
	var made *fakeNode
	a, err := r.x.Attach(name, d, o, func(o export.AttachOptions, cut func()) (record, *fakeNode, error) {
		rec := record{N: n, Cookie: name, Shape: Shape{Size: d.Size(), SectorSize: o.SectorSize, ReadOnly: o.ReadOnly}}
		made = &fakeNode{x: r.x, name: name, rec: rec, cut: cut}
		theHost.set(n, name)
		err := errors.Join(r.x.Links.Mark("fake"+strconv.Itoa(n), "me"), r.x.Records.Put(name, rec), r.x.Links.Make(name, rec.Path()))
		return rec, made, err
	})
	return a, made, err
}

func (r *rig) has(name string) (link, rec, mark bool) {
	_, err := os.Lstat(filepath.Join(r.links(), name))
	got, _ := r.x.Records.Get(name)
	marks, _ := os.ReadDir(filepath.Join(r.links(), ".nodes"))
	return err == nil, got != nil, len(marks) > 0
}

// TestExporterDetach: what a detach does in which order, and what becomes of it when the driver refuses.
func TestExporterDetach(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		name  string
		take  error
		ro    bool
		want  error
		stays bool
	}{
		{name: "unused"},
		{name: "read-only", ro: true},
		{name: "busy", take: fmt.Errorf("open: %w", node.ErrBusy), want: export.ErrBusy, stays: true},
		{name: "refused", take: os.ErrPermission, want: os.ErrPermission, stays: true},
		{name: "taken by somebody else", take: node.ErrGone},
		{name: "not synced", take: node.ErrNotSynced, want: node.ErrNotSynced},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, flushes := newRig(t), 0
			a, n, err := r.attach("x", 7, flushed{dev.NewMem(1 << 20), &flushes}, export.AttachOptions{ReadOnly: c.ro})
			if err != nil {
				t.Fatal(err)
			}
			if a.Name() != "x" || a.Node() != "/dev/fake7" || a.Link() != filepath.Join(r.links(), "x") {
				t.Errorf("%q %q %q", a.Name(), a.Node(), a.Link())
			}
			n.take = c.take
			if err := a.Detach(ctx); c.want == nil && err != nil || !errors.Is(err, c.want) {
				t.Errorf("detach: %v, want %v", err, c.want)
			}
			link, rec, mark := r.has("x")
			if link != c.stays || rec != c.stays || mark != c.stays {
				t.Errorf("link %v, record %v, mark %v; want %v", link, rec, mark, c.stays)
			}
			ended := false
			select {
			case <-a.Done():
				ended = true
			default:
			}
			if ended == c.stays {
				t.Errorf("done: %v", ended)
			}
			want := "take x leave x clear x"
			if c.stays {
				want = "take x"
			}
			if got := strings.Join(theHost.log, " "); got != want {
				t.Errorf("%q, want %q", got, want)
			}
			if want := !c.ro && !c.stays; (flushes == 1) != want {
				t.Errorf("%d flushes", flushes)
			}
			n.take = nil
			if err := a.Detach(ctx); err != nil {
				t.Errorf("again: %v", err)
			}
			if _, _, err := r.attach("x", 8, dev.NewMem(1<<20), export.AttachOptions{}); err != nil {
				t.Errorf("the name is not free: %v", err)
			}
		})
	}
}

// TestExporterAttachRefused: before anything is made.
func TestExporterAttachRefused(t *testing.T) {
	r := newRig(t)
	for what, c := range map[string]struct {
		name string
		size int64
		o    export.AttachOptions
	}{
		"sector size": {"x", 1 << 20, export.AttachOptions{SectorSize: 1000}},
		"size":        {"x", 4096 + 512, export.AttachOptions{SectorSize: 4096}},
		"empty":       {"x", 0, export.AttachOptions{}},
		"name":        {"../x", 1 << 20, export.AttachOptions{}},
	} {
		if _, n, err := r.attach(c.name, 1, dev.NewMem(c.size), c.o); err == nil || n != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := r.x.Records.Put("old", record{N: 3, Cookie: "old"}); err != nil {
		t.Fatal(err)
	}
	if _, n, err := r.attach("old", 1, dev.NewMem(1<<20), export.AttachOptions{}); !errors.Is(err, export.ErrExists) || n != nil {
		t.Errorf("the name of a survivor: %v", err)
	}
}

func TestExporterResize(t *testing.T) {
	ctx, r := context.Background(), newRig(t)
	m := dev.NewMem(1 << 20)
	a, n, err := r.attach("x", 1, m, export.AttachOptions{SectorSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	resize := func(size int64, want error, words string) {
		t.Helper()
		if err := m.Resize(size); err != nil {
			t.Fatal(err)
		}
		err := a.Resize(ctx)
		if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) || want != nil && !errors.Is(err, want) {
			t.Errorf("to %d bytes: %v, want %q", size, err, words)
		}
	}
	n.grow = dev.ErrUnsupported
	resize(1<<20, nil, "") // nothing to do
	resize(2<<20, dev.ErrUnsupported, "resize")
	n.grow = nil
	resize(2<<20, nil, "")
	resize(2<<20+512, nil, "multiple of 4096")
	if rec, _ := r.x.Records.Get("x"); rec == nil || rec.Size != 2<<20 {
		t.Errorf("record: %+v", rec)
	}
	m2 := dev.NewMem(1 << 20)
	a.(*Attachment[record, *fakeNode]).d = m2
	if err := a.Resize(ctx); err == nil || !strings.Contains(err.Error(), "do not shrink") {
		t.Errorf("shrink: %v", err)
	}
}

// TestExporterSuccession: Close leaves the devices, the next exporter finds them and what is gone.
func TestExporterSuccession(t *testing.T) {
	ctx, r := context.Background(), newRig(t)
	for i, name := range []string{"adopted", "dropped", "lost", "shrunk", "late"} {
		if _, _, err := r.attach(name, i, dev.NewMem(1<<20), export.AttachOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(r.x.Close(nil), r.x.Close(nil)); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(theHost.log, " "); strings.Contains(got, "take") || strings.Count(got, "leave") != 5 {
		t.Errorf("close: %q", got)
	}
	if _, _, err := r.attach("x", 9, dev.NewMem(1<<20), export.AttachOptions{}); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("attach after the end: %v", err)
	}
	theHost.set(2, "") // lost
	theHost.set(20, "theirs")
	for link, to := range map[string]string{"stale": "/dev/fake30", "other": "/dev/fake20", "wrong": "/dev/fake0"} {
		if err := os.Symlink(to, filepath.Join(r.links(), link)); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	if got, err := r.x.Survivors(); err != nil || fmt.Sprint(got) != "[adopted dropped late shrunk]" {
		t.Errorf("survivors: %q, %v", got, err)
	}
	for name, want := range map[string]bool{"adopted": true, "lost": false, "stale": false, "wrong": false, "other": true} {
		if link, _, _ := r.has(name); link != want {
			t.Errorf("link %s: %v, want %v", name, link, want)
		}
	}
	if marks, _ := os.ReadDir(filepath.Join(r.links(), ".nodes")); len(marks) != 4 {
		t.Errorf("%d marks, want 4", len(marks))
	}
	adopt := func(name string, size int64) (export.Attachment, error) {
		return r.x.Adopt(ctx, name, dev.NewMem(size), func(rec record, cut func()) (*fakeNode, error) {
			return &fakeNode{x: r.x, name: name, rec: rec, cut: cut}, nil
		})
	}
	a, err := adopt("adopted", 2<<20)
	if err != nil {
		t.Fatal(err)
	}
	if rec, _ := r.x.Records.Get("adopted"); rec == nil || rec.Size != 2<<20 {
		t.Errorf("a device that has grown meanwhile: %+v", rec)
	}
	a.(*Attachment[record, *fakeNode]).N.cut() // the driver's side goes
	<-a.Done()
	if _, err := adopt("adopted", 2<<20); !errors.Is(err, export.ErrExists) {
		t.Errorf("adopted twice: %v", err)
	}
	if _, err := adopt("shrunk", 1<<19); err == nil {
		t.Error("a shorter device was taken")
	}
	theHost.set(4, "somebody")
	if _, err := adopt("late", 1<<20); !errors.Is(err, export.ErrNotFound) {
		t.Errorf("a device that has gone: %v", err)
	}
	if link, rec, _ := r.has("late"); link || rec {
		t.Error("what has gone is still noted")
	}
	cut := 0
	drop := func(name string) error {
		return r.x.Drop(name, func(rec record) error {
			if link, _, _ := r.has(name); link {
				t.Error("the link is there while the device goes")
			}
			cut++
			return nil
		})
	}
	if err := drop("dropped"); err != nil || cut != 1 {
		t.Errorf("drop: %v", err)
	}
	if err := drop("dropped"); !errors.Is(err, export.ErrNotFound) || cut != 1 {
		t.Errorf("dropped twice: %v", err)
	}
}

func TestRecover(t *testing.T) {
	busy, other, n := errors.New("busy"), errors.New("other"), 0
	err := Recover(context.Background(), busy, func() error {
		if n++; n < 4 {
			return busy
		}
		return nil
	})
	if err != nil || n != 4 {
		t.Errorf("%v after %d", err, n)
	}
	if err := Recover(context.Background(), busy, func() error { return other }); err != other {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := Recover(ctx, busy, func() error { return busy }); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
