package snapshotter

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// TestXFS: on XFS too, a commit of what was unmounted in order looks into no file system, one of what
// was not is replayed first, and views mount without a log.
func TestXFS(t *testing.T) {
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("SKIPPED: mkfs.xfs is not installed (package xfsprogs)")
	}
	r := newRig(t, 2<<30)
	r.o.FSType = "xfs"
	r.open()
	s := r.snapshotter("mica")
	ctx := tctx(t)
	helpers := countHelpers(t)
	parent := ""
	for i := range 4 {
		name := fmt.Sprint("layer", i)
		r.layer(s, name, parent, map[string]string{name: strings.Repeat(name, 1000*i), "same": name})
		parent = name
	}
	if n := countHelpers(t) - helpers; n != 0 {
		t.Errorf("%d helpers were started for four layers, which mount", n)
	}
	v := must[[]mount.Mount](t)(s.View(ctx, "v", parent))
	if v[0].Type != "xfs" || r.read(v, "same") != "layer3" {
		t.Errorf("a view: %+v", v)
	}
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", parent))
	dir, _ := r.mountOn(m)
	writeFile(t, filepath.Join(dir, "x"), "synced")
	syncFS(t, dir)
	writeFile(t, filepath.Join(dir, "y"), "not synced")
	fuse := filepath.Join(r.o.Run, "fuse", filepath.Base(m[0].Source))
	unix.Unmount(fuse, unix.MNT_FORCE)
	unix.Unmount(fuse, unix.MNT_DETACH)
	unix.Unmount(dir, unix.MNT_DETACH)
	waitFor(t, "notice", func() bool {
		_, err := os.Stat(m[0].Source)
		return err != nil
	})
	helpers = countHelpers(t)
	ok(t, s.Commit(ctx, "c", "k"))
	if countHelpers(t) == helpers {
		t.Error("a file system that was not unmounted was committed as it is")
	}
	w := must[[]mount.Mount](t)(s.View(ctx, "w", "c"))
	if got := r.read(w, "x"); got != "synced" {
		t.Errorf("the commit holds %q", got)
	}
}
