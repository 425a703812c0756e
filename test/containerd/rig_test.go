// Package containerd runs real containers on mica: Debian's containerd, ctr and runc, each test with
// a containerd, a daemon and a pool of its own. Set MICA_CONTAINERD to a directory with containerd,
// ctr and containerd-shim-runc-v2 of another version (2.x) to run the tests with those too.
package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A release is one set of containerd's programs.
type release struct {
	name  string
	dir   string // before PATH; empty: as installed
	major int
}

// releases are those that can be tested here.
func releases(t *testing.T) []release {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: containers need root")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm", "/bin/busybox"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here: %v", p, err)
		}
	}
	for _, p := range []string{"containerd", "ctr", "runc", "mke2fs"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("SKIPPED: %s is not installed (packages containerd, runc, e2fsprogs)", p)
		}
	}
	list := []release{{name: "installed"}}
	if dir := os.Getenv("MICA_CONTAINERD"); dir != "" {
		list = append(list, release{name: "other", dir: dir})
	}
	for i := range list {
		r := &list[i]
		out, err := exec.Command(r.program("containerd"), "--version").Output()
		f := strings.Fields(string(out))
		if err != nil || len(f) < 3 {
			t.Fatalf("%s --version: %v, %q", r.program("containerd"), err, out)
		}
		fmt.Sscanf(strings.TrimPrefix(f[2], "v"), "%d", &r.major)
		t.Logf("%s: %s", r.name, strings.TrimSpace(string(out)))
	}
	return list
}

func (r release) program(name string) string {
	if r.dir == "" {
		return name
	}
	return filepath.Join(r.dir, name)
}

// each runs a test with every release that is here.
func each(t *testing.T, fn func(t *testing.T, b *box)) {
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) { fn(t, newBox(t, r)) })
	}
}

// eachFS is each with both kinds of base file system, where the test is worth it.
func eachFS(t *testing.T, fn func(t *testing.T, b *box)) {
	for _, r := range releases(t) {
		for _, fs := range []string{"ext4", "xfs"} {
			t.Run(r.name+"/"+fs, func(t *testing.T) {
				if _, err := exec.LookPath("mkfs.xfs"); fs == "xfs" && err != nil {
					t.Skip("SKIPPED: mkfs.xfs is not installed (package xfsprogs)")
				}
				b := newBox(t, r)
				b.fs = fs
				fn(t, b)
			})
		}
	}
}

// mica builds the program once.
var micaProgram = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mica-bin-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "mica")
	cmd := exec.Command("go", "build", "-o", path, "mica/cmd/mica")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := micaProgram(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// A box is a host in a directory: a pool, a daemon, a containerd.
type box struct {
	*testing.T
	release
	dir, ns    string
	mica       string // program
	poolSize   string
	waitSpace  string // how long writes wait for space
	fs         string // of the base
	daemon     *process
	containerd *process
}

// A process is one that the test started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func newBox(t *testing.T, r release) *box {
	t.Helper()
	program, err := micaProgram()
	if err != nil {
		t.Fatalf("build mica: %v", err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "mica-ctr-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // roots of user namespaces have to pass
		t.Fatal(err)
	}
	b := &box{T: t, release: r, dir: dir, ns: "n" + filepath.Base(dir)[len("mica-ctr-"):], mica: program, poolSize: "4G", waitSpace: "60s", fs: "ext4"}
	t.Cleanup(b.clear)
	return b
}

func (b *box) path(name string) string { return filepath.Join(b.dir, name) }

func (b *box) write(name, text string) string {
	b.Helper()
	p := b.path(name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	return p
}

// start starts a program that writes to a log file of its name.
func (b *box) start(name string, argv ...string) *process {
	b.Helper()
	log, err := os.OpenFile(b.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if b.release.dir != "" {
		cmd.Env = append(os.Environ(), "PATH="+b.release.dir+":"+os.Getenv("PATH"))
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() { cmd.Wait(); close(p.done) }()
	return p
}

// end sends a signal and waits for the end.
func (p *process) end(sig syscall.Signal) {
	if p == nil {
		return
	}
	p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

func (b *box) writeConfig() {
	b.Helper()
	b.write("mica.toml", fmt.Sprintf(`root = %q
run = %q
[pool]
size = %q
no_space_timeout = %q
[containers]
base_size = "1G"
file_system = %q
[exports]
link_dir = %q
[containerd]
address = %q
`, b.path("root"), b.path("run"), b.poolSize, b.waitSpace, b.fs, b.path("links"), b.path("c.sock")))
}

func (b *box) startMica() {
	b.Helper()
	b.writeConfig()
	b.daemon = b.start("mica", b.mica, "serve", "--config", b.path("mica.toml"))
	b.waitFor("the daemon", func() bool {
		_, err := b.tryMica("status", "--json")
		return err == nil
	})
	b.waitFor("the base file system", func() bool { return b.status().Store.BaseReady })
}

func (b *box) startContainerd() {
	b.Helper()
	version, diff := 2, ""
	if b.major >= 2 { // proxies for diff, and capabilities, came later than 1.6
		version = 3
		diff = fmt.Sprintf(`
    capabilities = ["remap-ids"]
    [proxy_plugins.mica.exports]
      root = %q
  [proxy_plugins.mica-diff]
    type = "diff"
    address = %q
[plugins."io.containerd.service.v1.diff-service"]
  default = ["mica-diff", "walking"]
[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/amd64"
    snapshotter = "mica"
    differ = "mica-diff"
`, b.path("root"), b.path("run/diff.sock"))
	}
	b.write("containerd.toml", fmt.Sprintf(`version = %d
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[proxy_plugins]
  [proxy_plugins.mica]
    type = "snapshot"
    address = %q
%s`, version, b.path("croot"), b.path("cstate"), b.path("c.sock"), b.path("c.sock.ttrpc"), b.path("run/snapshotter.sock"), diff))
	b.containerd = b.start("containerd", b.program("containerd"), "--config", b.path("containerd.toml"))
	b.waitFor("containerd", func() bool {
		_, err := b.tryCtr(5*time.Second, "version")
		return err == nil
	})
}

// up starts everything.
func (b *box) up() *box {
	b.Helper()
	b.startMica()
	b.startContainerd()
	return b
}

func (b *box) waitFor(what string, fn func() bool) {
	b.Helper()
	for end := time.Now().Add(30 * time.Second); !fn(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			b.logs()
			b.Fatalf("%s did not come", what)
		}
	}
}

// logs shows the ends of the logs.
func (b *box) logs() {
	for _, name := range []string{"mica.log", "containerd.log"} {
		text, _ := os.ReadFile(b.path(name))
		if n := len(text) - 4000; n > 0 {
			text = text[n:]
		}
		b.Logf("%s:\n%s", name, text)
	}
}

func run(timeout time.Duration, argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(argv[:min(len(argv), 8)], " "), err, strings.TrimSpace(stderr.String()))
	}
	return out.String(), err
}

func (b *box) tryMica(args ...string) (string, error) {
	return run(time.Minute, append([]string{b.mica, "--run", b.path("run")}, args...)...)
}

func (b *box) tryCtr(timeout time.Duration, args ...string) (string, error) {
	return run(timeout, append([]string{b.program("ctr"), "--address", b.path("c.sock"), "-n", b.ns, "--timeout", timeout.String()}, args...)...)
}

// ctr runs ctr and returns what it printed.
func (b *box) ctr(args ...string) string {
	b.Helper()
	out, err := b.tryCtr(time.Minute, args...)
	if err != nil {
		b.logs()
		b.Fatal(err)
	}
	return out
}

// in runs a script in a new container and returns what it printed; the container goes.
func (b *box) in(image, name, script string) string {
	b.Helper()
	return b.ctr("run", "--rm", "--snapshotter", "mica", image, name, "/bin/sh", "-c", script)
}

// run starts a container in the background.
func (b *box) run(image, name, script string) {
	b.Helper()
	b.ctr("run", "-d", "--snapshotter", "mica", image, name, "/bin/sh", "-c", script)
}

var execs int

// exec runs a script in a running container.
func (b *box) exec(name, script string) string {
	b.Helper()
	execs++
	return b.ctr("tasks", "exec", "--exec-id", "e"+strconv.Itoa(execs), name, "/bin/sh", "-c", script)
}

// kill ends a container and removes it.
func (b *box) kill(names ...string) {
	b.Helper()
	for _, n := range names {
		b.ctr("tasks", "kill", "-s", "SIGKILL", n)
	}
	for _, n := range names {
		b.waitFor("the end of "+n, func() bool { return !strings.Contains(b.ctr("tasks", "ls"), n+" ") || b.stopped(n) })
		b.tryCtr(time.Minute, "tasks", "rm", n)
		b.ctr("containers", "rm", n)
	}
}

func (b *box) stopped(name string) bool {
	for line := range strings.Lines(b.ctr("tasks", "ls")) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name {
			return f[2] == "STOPPED"
		}
	}
	return true
}

// status is what the tests need of the daemon's status.
type status struct {
	Pool struct {
		DataUsed    uint64 `json:"data_used"`
		DataFreeing uint64 `json:"data_freeing"`
		Devices     int    `json:"devices"`
		Waiting     int    `json:"waiting_for_space"`
	} `json:"pool"`
	Store struct {
		BaseReady bool `json:"base_ready"`
		Attached  int  `json:"attached"`
		Queue     []struct {
			Kind, Object string
			LastErr      string `json:"last_error"`
		} `json:"queue"`
	} `json:"store"`
}

func (b *box) status() (st status) {
	b.Helper()
	out, err := b.tryMica("status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &st)
	}
	if err != nil {
		b.logs()
		b.Fatal(err)
	}
	return st
}

// settled is the status when nothing is on its way any more.
func (b *box) settled() (st status) {
	b.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		st = b.status()
		if len(st.Store.Queue) == 0 && st.Pool.DataFreeing == 0 {
			return st
		}
		if time.Now().After(end) {
			b.logs()
			b.Fatalf("not settled: %+v", st)
		}
	}
}

// collect lets containerd's garbage collector run, and waits for it. By itself it runs some time after
// something was removed.
func (b *box) collect() {
	b.Helper()
	b.ctr("leases", "create", "--id", "collect")
	b.ctr("leases", "delete", "--sync", "collect")
}

// wantBack fails unless the pool holds what it held before.
func (b *box) wantBack(before status) {
	b.Helper()
	b.collect()
	var now status
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if now = b.settled(); now.Pool.DataUsed == before.Pool.DataUsed && now.Pool.Devices == before.Pool.Devices && now.Store.Attached == 0 {
			return
		}
	}
	df, _ := b.tryMica("df")
	b.Errorf("pool uses %d blocks with %d devices, %d attached; before %d, %d, 0\n%s",
		now.Pool.DataUsed, now.Pool.Devices, now.Store.Attached, before.Pool.DataUsed, before.Pool.Devices, df)
}

// clear takes everything away, whatever a test left.
func (b *box) clear() {
	if b.Failed() {
		b.logs()
	}
	if b.containerd != nil {
		out, _ := b.tryCtr(10*time.Second, "containers", "ls", "-q")
		for n := range strings.FieldsSeq(out) {
			b.tryCtr(10*time.Second, "tasks", "kill", "-s", "SIGKILL", n)
		}
		time.Sleep(100 * time.Millisecond)
		for n := range strings.FieldsSeq(out) {
			b.tryCtr(10*time.Second, "tasks", "rm", "-f", n)
			b.tryCtr(10*time.Second, "containers", "rm", n)
		}
		b.containerd.end(syscall.SIGTERM)
	}
	for _, pid := range b.processes("shim", b.path("c.sock")) {
		unix.Kill(pid, unix.SIGKILL)
	}
	unmountBelow(b.dir)
	b.tryMica("shutdown")
	b.daemon.end(syscall.SIGTERM)
	unmountBelow(b.dir)
	b.force()
	if path, err := exec.LookPath("thin_check"); err == nil && b.daemon != nil {
		if out, err := exec.Command(path, b.path("root/pool/metadata")).CombinedOutput(); err != nil {
			b.Errorf("thin_check: %v\n%s", err, out)
		}
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.Errorf("clear: %v", err)
	}
	// What runc and the kernel keep by namespace.
	for _, ns := range []string{b.ns, b.ns + "b"} {
		os.RemoveAll(filepath.Join("/run/containerd/runc", ns))
		for _, pattern := range []string{"/sys/fs/cgroup/" + ns, "/sys/fs/cgroup/*/" + ns} {
			dirs, _ := filepath.Glob(pattern)
			for _, dir := range dirs {
				unix.Rmdir(dir)
			}
		}
	}
}

// processes are those whose command line has all the words; one of them is a path of this test's.
func (b *box) processes(words ...string) []int {
	var pids []int
	procs, _ := os.ReadDir("/proc")
next:
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmd, _ := os.ReadFile("/proc/" + p.Name() + "/cmdline")
		for _, w := range words {
			if !bytes.Contains(cmd, []byte(w)) {
				continue next
			}
		}
		pids = append(pids, pid)
	}
	return pids
}

// force takes away what an orderly end has left: it happens after a failure only.
func (b *box) force() {
	for _, pid := range b.processes("holder", b.path("run/holder.sock")) {
		unix.Kill(pid, unix.SIGKILL)
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if text, _ := os.ReadFile(l); bytes.HasPrefix(text, []byte(b.dir+"/")) {
			b.Errorf("%s is left", strings.Split(l, "/")[3])
			run(10*time.Second, "losetup", "-d", "/dev/"+strings.Split(l, "/")[3])
		}
	}
	text, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 2 && strings.HasPrefix(f[1], b.dir+"/") {
			unix.Unmount(f[1], unix.MNT_DETACH)
		}
	}
}

// unmountBelow takes away mounts below a directory, the inner ones first.
func unmountBelow(dir string) {
	for range 3 {
		text, _ := os.ReadFile("/proc/self/mounts")
		var dirs []string
		for line := range strings.Lines(string(text)) {
			// Not the mounts of the daemon: it takes them away itself.
			if f := strings.Fields(line); len(f) > 2 && strings.HasPrefix(f[1], dir+"/") && !strings.HasPrefix(f[1], dir+"/run/") {
				dirs = append(dirs, f[1])
			}
		}
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := unix.Unmount(dirs[i], 0); errors.Is(err, unix.EBUSY) {
				unix.Unmount(dirs[i], unix.MNT_DETACH)
			}
		}
	}
}
