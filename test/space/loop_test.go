package space

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export"
	"mica/export/fuse"
	"mica/internal/trial"
	"mica/thin"
)

// TestNoLoopDevice: the kernel gives out no loop device. Attaching fails with an error that says so
// and leaves no mount, no file and nothing open; when there are loop devices again, it works.
func TestNoLoopDevice(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("SKIPPED: no unshare here")
	}
	dir := shm(t)
	meta, data := dev.NewMem(2<<20), dev.NewMem(8<<20)
	must(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: blockSize, DataBlocks: 128}))
	p, err := user.New(meta, data, user.Options{Logger: trial.Quiet})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 4 << 20})
	must(t, err)
	run := filepath.Join(dir, "run")
	exe, err := os.Executable()
	must(t, err)
	broken := []string{"unshare", "-m", "sh", "-c", "mount --bind /dev/null /dev/loop-control && exec " + exe + " role-fuse-helper"}
	for i, helper := range [][]string{broken, broken, {exe, "role-fuse-helper"}} {
		e, err := fuse.New(fuse.Options{RunDir: run, HelperCommand: helper, Logger: trial.Quiet})
		must(t, err)
		a, err := e.Attach(ctx, "dev", h, export.AttachOptions{})
		switch {
		case i < 2 && (err == nil || !strings.Contains(err.Error(), "loop")):
			t.Errorf("attach %d: %v, want an error about loop devices", i, err)
		case i == 2:
			must(t, err)
			must(t, a.Detach(ctx))
		}
		must(t, e.Close())
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		if strings.Contains(string(mounts), run) {
			t.Errorf("attach %d left a mount", i)
		}
		if list, _ := os.ReadDir(filepath.Join(run, "fuse")); len(list) > 0 {
			var names []string
			for _, l := range list {
				names = append(names, l.Name())
			}
			if strings.Contains(strings.Join(names, " "), "dev") {
				t.Errorf("attach %d left %v", i, names)
			}
		}
	}
	must(t, h.Close())
	must(t, p.Close())
}
