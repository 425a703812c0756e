package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// ErrUnavailable: this host lacks a part of the test machine. The error says which.
var ErrUnavailable = errors.New("no test machine")

// minQEMU is the first major version that runs this kernel reliably under software emulation;
// 7.2 miscompiles and half of its boots end in an oops.
const minQEMU = 10

// A kit is what machines are made of.
type kit struct {
	qemu, kernel, busybox string
	tree                  *moduleTree
}

// baseModules are those every machine needs: its disks and its line to the host.
var baseModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng"}

// cacheDir is where scripts/setup.sh puts the kernel.
func cacheDir() string {
	if d := os.Getenv("MICA_CACHE"); d != "" {
		return d
	}
	if os.Geteuid() == 0 {
		return "/var/cache/mica"
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "/nonexistent"
	}
	return filepath.Join(d, "mica")
}

// findKit looks for the parts once per process.
var findKit = sync.OnceValues(func() (*kit, error) {
	missing := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s (scripts/setup.sh vm installs it)", ErrUnavailable, fmt.Sprintf(format, args...))
	}
	k := &kit{}
	var err error
	if k.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return nil, missing("qemu-system-x86_64 is not installed")
	}
	out, err := exec.Command(k.qemu, "--version").Output()
	if err != nil {
		return nil, missing("%s --version: %v", k.qemu, err)
	}
	found := regexp.MustCompile(`version (\d+)`).FindSubmatch(out)
	if found == nil {
		return nil, missing("%s tells no version", k.qemu)
	}
	if v, _ := strconv.Atoi(string(found[1])); v < minQEMU {
		return nil, missing("QEMU %d, %d or later is needed", v, minQEMU)
	}
	if k.busybox, err = exec.LookPath("busybox"); err != nil {
		return nil, missing("busybox is not installed")
	}
	dir := filepath.Join(cacheDir(), "kernel")
	k.kernel = filepath.Join(dir, "vmlinuz")
	if _, err := os.Stat(k.kernel); err != nil {
		return nil, missing("no kernel in %s", dir)
	}
	if k.tree, err = openModuleTree(filepath.Join(dir, "modules")); err != nil {
		return nil, missing("%v", err)
	}
	return k, nil
})

// writeInitramfs builds the agent and writes everything the guest starts with into file.
func (k *kit) writeInitramfs(ctx context.Context, file string, c Config) error {
	agent := filepath.Join(filepath.Dir(file), "vmagent")
	if err := build(ctx, agent, "build", "mica/internal/cmd/vmagent"); err != nil {
		return err
	}
	a := newArchive()
	for _, d := range []string{"bin", "dev", "proc", "sys", "run", "tmp", "etc", "mnt", "root"} {
		a.dir(d)
	}
	a.charDevice("dev/console", 5, 1)
	a.charDevice("dev/null", 1, 3)
	a.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	a.symlink("etc/mtab", "/proc/mounts")
	add := func(guest, host string) error {
		data, err := os.ReadFile(host)
		if err != nil {
			return err
		}
		a.file(guest, 0o755, data)
		return nil
	}
	if err := add("init", agent); err != nil {
		return err
	}
	if err := add("bin/busybox", k.busybox); err != nil {
		return err
	}
	applets, err := exec.CommandContext(ctx, k.busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", k.busybox, err)
	}
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			a.symlink("bin/"+name, "busybox")
		}
	}
	for guest, host := range c.Files {
		if err := add(guest, host); err != nil {
			return err
		}
	}
	modules, err := k.tree.resolve(append(baseModules[:len(baseModules):len(baseModules)], c.Modules...)...)
	if err != nil {
		return err
	}
	for i, mod := range modules {
		a.file(fmt.Sprintf("modules/%03d-%s.ko", i, mod.name), 0o644, mod.image)
	}
	var buf bytes.Buffer
	if err := a.writeTo(&buf); err != nil {
		return err
	}
	return os.WriteFile(file, buf.Bytes(), 0o644)
}

// build runs `go build -o out pkg` or `go test -c -o out pkg` for the guest: static, stripped,
// with the build tag guest, by which tests that need the guest's kernel are told apart.
func build(ctx context.Context, out, verb, pkg string) error {
	args := []string{verb}
	if verb == "test" {
		args = append(args, "-c")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "-tags=guest", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s %s: %w\n%s", verb, pkg, err, text)
	}
	return nil
}
