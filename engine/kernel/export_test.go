//go:build guest

package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/export"
	"mica/export/dm"
	"mica/thin"
)

var _ export.Noder = (*Thin)(nil)

// TestNodesGivenOut is what package export/dm promises, with devices of this engine.
func TestNodesGivenOut(t *testing.T) {
	dir := newDir(t, 32<<20, 2<<20, 64<<10)
	run, links := t.TempDir(), filepath.Join(t.TempDir(), "links")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	exporter := func() *dm.Exporter {
		t.Helper()
		e, err := dm.New(dm.Options{RunDir: run, LinkDir: links, DetachWait: 1})
		must(err)
		return e
	}
	p, err := Open(ctx, Source{Dir: dir}, Options{})
	must(err)
	must(p.CreateThin(ctx, 1))
	must(p.CreateSnap(ctx, 2, 1))
	open := func(p *Pool, id uint32, ro bool) engine.Thin {
		t.Helper()
		d, err := p.Open(ctx, thin.DevID(id), engine.OpenOptions{SizeBytes: 16 << 20, ReadOnly: ro})
		must(err)
		return d
	}
	e := exporter()
	if e.Kind() != "dm" {
		t.Errorf("kind %q", e.Kind())
	}
	d := open(p, 1, false)
	if _, err := e.Attach(ctx, "x", dev.NewMem(1<<20), export.AttachOptions{}); !errors.Is(err, dev.ErrUnsupported) {
		t.Errorf("attach a device without a node: %v", err)
	}
	for _, name := range []string{"", "../up", ".hidden"} {
		if _, err := e.Attach(ctx, name, d, export.AttachOptions{}); err == nil {
			t.Errorf("attached as %q", name)
		}
	}
	if _, err := e.Attach(ctx, "x", d, export.AttachOptions{SectorSize: 4096}); !errors.Is(err, dev.ErrUnsupported) {
		t.Errorf("attach with sectors that the node does not have: %v", err)
	}
	a, err := e.Attach(ctx, "x", d, export.AttachOptions{SectorSize: 512})
	must(err)
	if _, err := e.Attach(ctx, "x", d, export.AttachOptions{}); !errors.Is(err, export.ErrExists) {
		t.Errorf("attach twice: %v", err)
	}
	if to, err := os.Readlink(a.Link()); err != nil || to != a.Node() || a.Name() != "x" || filepath.Dir(a.Link()) != links {
		t.Errorf("link %s to %s, %v", a.Link(), to, err)
	}
	ro := open(p, 2, true)
	b, err := e.Attach(ctx, "y", ro, export.AttachOptions{ReadOnly: true})
	must(err)
	if f, err := os.OpenFile(b.Link(), os.O_RDWR, 0); err == nil {
		if _, err = f.WriteAt(make([]byte, 512), 0); err == nil && f.Sync() == nil {
			t.Error("a read-only node takes writes")
		}
		f.Close()
	}

	// A file system, grown while it is mounted, busy while it is.
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", a.Link()).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	must(os.MkdirAll("/mnt/dm", 0o755))
	must(unix.Mount(a.Node(), "/mnt/dm", "ext4", 0, ""))
	must(os.WriteFile("/mnt/dm/file", []byte("hello"), 0o600))
	must(d.Resize(32 << 20))
	must(a.Resize(ctx))
	if out, err := exec.Command("resize2fs", a.Node()).CombinedOutput(); err != nil {
		t.Errorf("resize2fs: %v: %s", err, out)
	}
	err = a.Detach(ctx)
	if !errors.Is(err, export.ErrBusy) || !strings.Contains(fmt.Sprint(err), "/mnt/dm") {
		t.Errorf("detach what is mounted: %v", err)
	}
	if _, err := os.Stat(a.Link()); err != nil {
		t.Errorf("a refused detach took the link: %v", err)
	}

	// The end of the process: everything stays, for the next one.
	must(e.Close())
	select {
	case <-a.Done():
	default:
		t.Error("an attachment of a closed exporter is not done")
	}
	node, link := a.Node(), a.Link()
	must(errors.Join(d.Close(), ro.Close(), p.Close()))
	must(os.WriteFile("/mnt/dm/other", []byte("alone"), 0o600))
	p, err = Open(ctx, Source{Dir: dir}, Options{})
	must(err)
	e = exporter()
	list, err := e.Survivors(ctx)
	if err != nil || len(list) != 2 {
		t.Errorf("survivors %v, %v", list, err)
	}
	d = open(p, 1, false)
	must(d.Resize(32 << 20))
	if _, err := e.Attach(ctx, "x", d, export.AttachOptions{}); !errors.Is(err, export.ErrExists) {
		t.Errorf("attach under the name of a survivor: %v", err)
	}
	if _, err := e.Adopt(ctx, "z", d); !errors.Is(err, export.ErrNotFound) {
		t.Errorf("adopt what is not there: %v", err)
	}
	a, err = e.Adopt(ctx, "x", d)
	must(err)
	if a.Node() != node || a.Link() != link {
		t.Errorf("adopted as %s, %s; was %s, %s", a.Node(), a.Link(), node, link)
	}
	must(e.Drop(ctx, "y"))
	if _, err := os.Lstat(filepath.Join(links, "y")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link of a dropped survivor: %v", err)
	}
	if busy := p.Sweep(); len(busy) > 0 {
		t.Errorf("in use by nobody: %v", busy)
	}
	must(unix.Unmount("/mnt/dm", 0))
	must(a.Detach(ctx))
	must(a.Detach(ctx))
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link of a detached device: %v", err)
	}
	must(errors.Join(d.Close(), e.Close(), p.Close()))

	// After a reboot, or when somebody has taken the device away, nothing is left to survive.
	p, err = Open(ctx, Source{Dir: dir}, Options{})
	must(err)
	e = exporter()
	d = open(p, 1, false)
	_, err = e.Attach(ctx, "gone", d, export.AttachOptions{})
	must(err)
	must(e.Close())
	d.(*Thin).KeepNode(false)
	must(errors.Join(d.Close(), p.Close()))
	e = exporter()
	if list, err := e.Survivors(context.Background()); err != nil || len(list) > 0 {
		t.Errorf("survivors %v, %v", list, err)
	}
	if l, err := os.ReadDir(links); err != nil || len(l) > 0 {
		t.Errorf("stale links: %v, %v", l, err)
	}
	must(e.Close())
	if left := leftOver(t); len(left) > 0 {
		t.Errorf("left in the kernel: %v", left)
	}
}
