// Package e2e drives the real program as its users do: a daemon in a directory of its own, the
// commands, the block devices and sockets that they give, and the field's tools on the other
// side. Every test ends with the pool before two checkers and with nothing left on the machine.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/internal/testbox"
)

// program is the real binary, built once.
var (
	program    string
	buildFlags []string
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == writerRole {
		os.Exit(runWriter(os.Args[2:]))
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	removeStale()
	dir, err := os.MkdirTemp("", "mica-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "mica")
	build := exec.Command("go", append(append([]string{"build"}, buildFlags...), "-o", program, "mica/cmd/mica")...)
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build mica: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// marker is in the environment of everything that a box starts, so that all of it can be found.
const marker = "MICA_E2E_BOX="

// A box is a place in memory for one daemon, with its own ROOT, RUN and links.
type box struct {
	*testing.T
	dir, root, run, pool string
	config               string // text of the configuration; changed before start
	program              string // the binary, where it is another than that of all tests
	serve                *exec.Cmd
	daemon               *testbox.Daemon // that of serve
	tools                []*exec.Cmd
	watchdog             *time.Timer
	atEnd                []func() // in the reverse order, before the machine is looked at
	noCheck              bool     // the pool at the end is damaged on purpose, or not there
}

// newBox makes a box. At the end of the test everything in it is taken down and looked at.
func newBox(t *testing.T, tools ...string) *box {
	t.Helper()
	testbox.Need(t, append(tools, "e2fsck")...)
	dir, err := os.MkdirTemp("/dev/shm", fmt.Sprintf("mica-e2e-%d-", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	b := &box{T: t, dir: dir, root: filepath.Join(dir, "root"), run: filepath.Join(dir, "run")}
	b.pool = filepath.Join(b.root, "pool")
	b.config = "[pool]\nsize = \"2G\"\n[containers]\nbase_size = \"512M\"\n"
	b.watchdog = time.AfterFunc(boxLimit, b.giveUp)
	t.Cleanup(b.takeDown)
	return b
}

// boxLimit bounds the life of a box. A test that hangs in a read of what nobody serves would not
// end with go test's own limit, and leave everything behind.
const boxLimit = 4 * time.Minute

// giveUp shows what the daemon is at, and kills everything in the box.
func (b *box) giveUp() {
	b.Errorf("the test is not over after %v: everything it started is killed", boxLimit)
	if b.serve != nil {
		b.serve.Process.Signal(syscall.SIGQUIT)
		time.Sleep(2 * time.Second)
	}
	for _, pid := range b.processes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// command makes a command of the program.
func (b *box) command(args ...string) *exec.Cmd {
	p := program
	if b.program != "" {
		p = b.program
	}
	c := exec.Command(p, args...)
	// A program with the race detector would sleep for a second at its end.
	c.Env = append(os.Environ(), "MICA_RUN="+b.run, marker+b.dir, "GORACE=atexit_sleep_ms=0")
	c.Dir = b.dir
	return c
}

// tool makes a command of another program.
func (b *box) tool(name string, args ...string) *exec.Cmd {
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), "LC_ALL=C", marker+b.dir)
	c.Dir = b.dir
	return c
}

func (b *box) try(args ...string) (stdout, stderr string, code int) {
	b.Helper()
	return testbox.Run(b, b.command(args...))
}

func (b *box) tryCommand(c *exec.Cmd) (stdout, stderr string, code int) {
	b.Helper()
	return testbox.Run(b, c)
}

// mica runs a command that must succeed and returns what it printed, without the last newline.
func (b *box) mica(args ...string) string {
	b.Helper()
	out, stderr, code := b.try(args...)
	if code != 0 {
		b.Fatalf("mica %s: exit status %d\n%s", strings.Join(args, " "), code, stderr)
	}
	return strings.TrimSuffix(out, "\n")
}

// fails runs a command that must end with exit status 1, print nothing, and say all the words.
func (b *box) fails(args []string, words ...string) string {
	b.Helper()
	out, stderr, code := b.try(args...)
	b.wantFailure(strings.Join(args, " "), out, stderr, code, 1, words)
	return stderr
}

// misused is fails for a mistake in the command line, with exit status 2.
func (b *box) misused(args []string, words ...string) {
	b.Helper()
	out, stderr, code := b.try(args...)
	b.wantFailure(strings.Join(args, " "), out, stderr, code, 2, words)
}

func (b *box) wantFailure(what, out, stderr string, code, want int, words []string) {
	b.Helper()
	if code != want || out != "" {
		b.Errorf("mica %s: exit status %d, want %d\nstdout: %s\nstderr: %s", what, code, want, out, stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr, w) {
			b.Errorf("mica %s: the message does not say %q: %s", what, w, stderr)
		}
	}
	if strings.Contains(stderr, "goroutine ") || strings.Contains(stderr, "panic") {
		b.Errorf("mica %s: panicked", what)
	}
}

// sh runs another program, which must succeed, and returns what it printed.
func (b *box) sh(name string, args ...string) string {
	b.Helper()
	out, err := b.tool(name, args...).CombinedOutput()
	if err != nil {
		b.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// asJSON runs a command with --json and decodes what it prints.
func asJSON[T any](b *box, args ...string) (v T) {
	b.Helper()
	return testbox.Decode[T](b, args, b.mica(append(args, "--json")...))
}

func (b *box) status() api.Status {
	b.Helper()
	return asJSON[api.Status](b, "status")
}

func (b *box) serveArgs() []string {
	b.Helper()
	file := filepath.Join(b.dir, "config.toml")
	links := "[exports]\nlink_dir = \"" + filepath.Join(b.dir, "links") + "\"\n"
	if err := os.WriteFile(file, []byte(b.config+links), 0o600); err != nil {
		b.Fatal(err)
	}
	return []string{"serve", "--root", b.root, "--run", b.run, "--config", file}
}

// start starts the daemon and waits until it answers.
func (b *box) start() {
	b.Helper()
	b.daemon = testbox.Start(b, b.command(b.serveArgs()...), b.path("log"), b.run)
	b.serve = b.daemon.Cmd
}

// stop ends the daemon with a signal and waits for it. The exit code is returned, -1 for a kill.
func (b *box) stop(sig os.Signal) int {
	b.Helper()
	code := b.daemon.Stop(b, sig)
	b.serve = nil
	return code
}

func (b *box) waitEnd() int {
	b.Helper()
	code := b.daemon.WaitEnd(b)
	b.serve = nil
	return code
}

// shutdown detaches everything and ends the daemon.
func (b *box) shutdown() {
	b.Helper()
	b.mica("shutdown")
	if code := b.waitEnd(); code != 0 {
		b.Errorf("the daemon ended with %d after a shutdown", code)
	}
}

func (b *box) path(name string) string { return filepath.Join(b.dir, name) }

func (b *box) mkdir(name string) string {
	b.Helper()
	if err := os.MkdirAll(b.path(name), 0o755); err != nil {
		b.Fatal(err)
	}
	return b.path(name)
}

func (b *box) writeFile(name string, text []byte) string {
	b.Helper()
	if err := os.WriteFile(b.path(name), text, 0o644); err != nil {
		b.Fatal(err)
	}
	return b.path(name)
}

func (b *box) readFile(path string) []byte {
	b.Helper()
	t, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	return t
}

// mount mounts a container on a directory of the box and returns it.
func (b *box) mount(name string, flags ...string) string {
	b.Helper()
	dir := b.mkdir("mnt/" + name)
	b.mica(append([]string{"mount", name, dir}, flags...)...)
	return dir
}

// background starts a tool that the end of the test kills if it still runs.
func (b *box) background(c *exec.Cmd) *exec.Cmd {
	b.Helper()
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	b.tools = append(b.tools, c)
	return c
}

// A figure is what a failed command must leave as it was.
type figure struct {
	used                                           uint64 // data blocks
	devices, images, layers, containers, snapshots int
}

// figures waits until nothing is on its way any more, and returns the numbers of the pool and
// the store.
func (b *box) figures() figure {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		st := b.status()
		if len(st.Store.Queue) == 0 && st.Pool.DataFreeing == 0 && st.Store.BaseReady && st.Running == 0 {
			s := st.Store
			return figure{st.Pool.DataUsed, st.Pool.Devices, s.Images, s.Layers, s.Containers, s.Snapshots}
		}
		if time.Now().After(deadline) {
			b.Fatalf("it does not come to rest: queue %+v, %d blocks being freed, %d operations", st.Store.Queue, st.Pool.DataFreeing, st.Running)
		}
	}
}

// eventually waits until a condition holds.
func (b *box) eventually(what string, cond func() bool) {
	b.Helper()
	testbox.Eventually(b, what, cond)
}

// unmount takes away what the test mounted itself.
func (b *box) unmount(dir string) {
	b.Helper()
	if err := unix.Unmount(dir, 0); err != nil {
		b.Fatalf("unmount %s: %v", dir, err)
	}
}
