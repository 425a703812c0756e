// Package kernel holds the tests in which pools cross between mica and a real kernel.
package kernel

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/crossing"
	"mica/internal/vm"
	"mica/internal/vm/wire"
)

// A rig is the one test machine of this package, with a pair of disks that every scenario
// formats anew.
type rig struct {
	m          *vm.Machine
	dir        string
	data, meta string // files; vda and vdb in the guest
}

var (
	rigOnce sync.Once
	theRig  *rig
	rigErr  error
)

func TestMain(m *testing.M) {
	code := m.Run()
	if theRig != nil {
		theRig.m.Close()
		if bad := vm.Complaints(theRig.m.Console()); len(bad) > 0 {
			fmt.Printf("the guest's kernel complained:\n%s\n", theRig.m.Console())
			code = 1
		}
		os.RemoveAll(theRig.dir)
	}
	vm.PrintSkipped()
	os.Exit(code)
}

// machine boots the rig at its first use.
func machine(t *testing.T) *rig {
	t.Helper()
	vm.Require(t)
	rigOnce.Do(func() { theRig, rigErr = newRig() })
	if rigErr != nil {
		t.Fatal(rigErr)
	}
	return theRig
}

func newRig() (*rig, error) {
	parent := "" // memory is faster than the disk where there is some
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		parent = "/dev/shm"
	}
	removeStale(filepath.Join(cmp.Or(parent, os.TempDir()), "mica-kernel-*"))
	dir, err := os.MkdirTemp(parent, fmt.Sprintf("mica-kernel-%d-", os.Getpid()))
	if err != nil {
		return nil, err
	}
	r := &rig{dir: dir, data: filepath.Join(dir, "data"), meta: filepath.Join(dir, "metadata")}
	for _, f := range []string{r.data, r.meta} {
		if err := os.WriteFile(f, make([]byte, 4096), 0o600); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	program := filepath.Join(dir, "kernelops")
	if err := vm.BuildTo(ctx, program, "mica/internal/cmd/kernelops"); err != nil {
		return nil, err
	}
	dmTest := filepath.Join(dir, "dmioctl.test")
	if err := vm.BuildTestTo(ctx, dmTest, "mica/internal/dmioctl"); err != nil {
		return nil, err
	}
	engineTest := filepath.Join(dir, "kernel.test")
	if err := vm.BuildTestTo(ctx, engineTest, "mica/engine/kernel"); err != nil {
		return nil, err
	}
	binary, image := filepath.Join(dir, "mica"), filepath.Join(dir, "image.tar")
	if err := vm.BuildTo(ctx, binary, "mica/cmd/mica"); err != nil {
		return nil, err
	}
	if err := makeImage(ctx, dir, image); err != nil {
		return nil, err
	}
	files, err := vm.Programs("mke2fs", "e2fsck", "resize2fs", "dmsetup")
	if err != nil {
		return nil, err
	}
	maps.Copy(files, map[string]string{"/bin/kernelops": program, "/bin/dmioctl.test": dmTest,
		"/bin/kernel.test": engineTest, "/bin/mica": binary, "/root/image.tar": image})
	r.m, err = vm.Boot(ctx, vm.Config{
		Disks:    []vm.Disk{{Path: r.data}, {Path: r.meta}},
		Modules:  []string{"dm-thin-pool", "dm-flakey", "loop"},
		Files:    files,
		CPUs:     1,
		MemoryMB: 1024,
	})
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return r, nil
}

// makeImage makes a small image with the project's own tool.
func makeImage(ctx context.Context, dir, file string) error {
	root := filepath.Join(dir, "root")
	for name, size := range map[string]int{"etc/release": 100, "bin/large": 3 << 20} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte(name), size/len(name)), 0o644); err != nil {
			return err
		}
	}
	out, err := exec.CommandContext(ctx, "go", "run", "mica/internal/cmd/mkimage", "-o", file, "-name", "base:1", root).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkimage: %w: %s", err, out)
	}
	return nil
}

// removeStale takes away what killed or panicked runs left: directories named after a process
// that is no more.
func removeStale(pattern string) {
	dirs, _ := filepath.Glob(pattern)
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "mica-kernel-%d-", &pid); err == nil && unix.Kill(pid, 0) == unix.ESRCH {
			os.RemoveAll(dir)
		}
	}
}

// format makes both disks empty.
func (r *rig) format(t *testing.T) {
	t.Helper()
	for _, f := range []string{r.data, r.meta} {
		if err := os.Truncate(f, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// resize gives both disks their sizes, also in the guest's eyes.
func (r *rig) resize(t *testing.T, dataBytes, metadataBytes int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i, size := range []int64{dataBytes, metadataBytes} {
		if err := r.m.Resize(ctx, i, size); err != nil {
			t.Fatal(err)
		}
	}
}

// kernel has the guest do a job.
func (r *rig) kernel(job crossing.Job) (*crossing.Report, error) {
	job.Data, job.Metadata = "/dev/vda", "/dev/vdb"
	in, err := json.Marshal(job)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	res, err := r.m.Run(ctx, wire.Command{Args: []string{"/bin/kernelops"}, Stdin: in})
	if err != nil {
		return nil, err
	}
	if res.Code != 0 {
		return nil, fmt.Errorf("%s", bytes.TrimSpace(res.Stderr))
	}
	var report crossing.Report
	if err := json.Unmarshal(res.Stdout, &report); err != nil {
		return nil, fmt.Errorf("report of the guest: %w", err)
	}
	return &report, nil
}
