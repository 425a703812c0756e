package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/thin"
)

func statfsBytes(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}

// A counter is a process that appends numbers to a file and syncs each, until it is stopped. It
// prints what is durable.
type counter struct {
	cmd  *exec.Cmd
	line chan int
}

func startCounter(t *testing.T, path string) *counter {
	t.Helper()
	c := &counter{line: make(chan int, 1<<16)}
	c.cmd = exec.Command("sh", "-c", `i=0; while :; do echo $i >> "$0" && sync "$0" || { echo failed; exit 1; }; echo $i; i=$((i+1)); done`, path)
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.line)
		for s := bufio.NewScanner(out); s.Scan(); {
			n, err := strconv.Atoi(s.Text())
			if err != nil {
				n = -1
			}
			c.line <- n
		}
	}()
	t.Cleanup(func() { c.cmd.Process.Kill(); c.cmd.Wait() })
	return c
}

// next waits for n more numbers and returns the last; the test ends if the counter failed.
func (c *counter) next(t *testing.T, n int) (last int) {
	t.Helper()
	for range n {
		select {
		case v, ok := <-c.line:
			if !ok || v < 0 {
				t.Fatal("a write to the mounted container failed")
			}
			last = v
		case <-time.After(30 * time.Second):
			t.Fatal("writes to the mounted container hang")
		}
	}
	return last
}

// drain reads what is there.
func (c *counter) drain() {
	for {
		select {
		case <-c.line:
		default:
			return
		}
	}
}

func (c *counter) stop() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
}

// checkNumbers: the file holds 0, 1, 2, ... to at least last.
func checkNumbers(t *testing.T, path string, last int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(b))
	for i, l := range lines {
		if l != strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if len(lines) <= last {
		t.Fatalf("%d lines, the last that was acknowledged is %d", len(lines), last)
	}
}

// TestKilledDaemon: kill -9 of the daemon, again and again, is a pause for whoever writes to a
// mounted container: no error, nothing acknowledged is lost, and the same node goes on.
func TestKilledDaemon(t *testing.T) {
	b := newBox(t)
	b.start()
	if !asJSON[api.Status](b, "status").Exports.Resend {
		t.Skip("SKIPPED: this kernel cannot resend FUSE requests: want Linux 6.9 or later")
	}
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	dir := b.mica("mount", "web")
	node := attachedNode(b, "web")
	holder := b.holderPID()
	count := startCounter(t, dir+"/numbers")
	last := count.next(t, 20)
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		b.stop(syscall.SIGKILL)
		b.start()
		count.drain()
		last = count.next(t, 10)
		if got := attachedNode(b, "web"); got != node {
			t.Fatalf("the node was %s and is %s", node, got)
		}
	}
	if got := b.holderPID(); got != holder {
		t.Errorf("the holder was process %s and is %s", holder, got)
	}
	// In order, too: the daemon ends with 0 and leaves the mount waiting.
	if code := b.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("SIGTERM with a mounted container: exit status %d", code)
	}
	b.start()
	count.drain()
	last = count.next(t, 10)
	count.stop()
	checkNumbers(t, dir+"/numbers", last)
	if msg := b.fails("shutdown"); !strings.Contains(msg, "web: mounted on "+dir) {
		t.Errorf("shutdown with a mounted container: %s", msg)
	}
	checkNumbers(t, dir+"/numbers", last) // and it goes on
	b.mica("umount", "web")
	dir = b.mica("mount", "web")
	checkNumbers(t, dir+"/numbers", last)
	b.mica("umount", "web")
	if text := b.mica("pool", "check"); !strings.Contains(text, "clean") {
		t.Errorf("pool check: %s", text)
	}
}

// TestKilledDaemonsPool: while nodes of a daemon that was killed, or ended in order, wait for the next
// one, nobody else writes to its pool: not a command, not a daemon with another run directory. Looking
// is allowed. When the last one is detached the pool is anybody's.
func TestKilledDaemonsPool(t *testing.T) {
	b := newBox(t)
	b.start()
	if !asJSON[api.Status](b, "status").Exports.Resend {
		t.Skip("SKIPPED: this kernel cannot resend FUSE requests: want Linux 6.9 or later")
	}
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	b.mica("mount", "web")
	pool := filepath.Join(b.root, "pool")
	dump := filepath.Join(b.dir, "dump.xml")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		b.stop(sig)
		b.mica("thin", "dump", pool, "-o", dump)
		for _, args := range [][]string{
			{"thin", "create", pool, "9000"}, {"thin", "rm", pool, "1"}, {"pool", "trim", pool}, {"pool", "grow", pool, "--size", "200G"},
			{"thin", "restore", pool, "-i", dump, "--force"}, {"thin", "check", pool, "--repair-leaks"}, {"thin", "check", pool, "--clear-needs-check"},
			{"pool", "create", pool, "--force"}, {"pool", "restore", pool, "--from", dump, "--yes", "--without-journal"},
			{"pool", "repair", pool, "--swap", "--without-journal"}, {"pool", "switch", pool, "--to", "user"},
			{"serve", "--root", b.root, "--run", b.mkdir("run2")},
		} {
			if msg := b.fails(args...); !strings.Contains(msg, "mica serve --run "+b.run) {
				t.Errorf("%v: mica %s: %s", sig, strings.Join(args, " "), msg)
			}
		}
		b.mica("thin", "ls", pool)
		b.start()
	}
	b.mica("umount", "web")
	b.stop(syscall.SIGTERM)
	b.mica("thin", "create", pool, "9000")
	b.mica("thin", "rm", pool, "9000")
	b.start()
}

func attachedNode(b *box, name string) string {
	b.Helper()
	for _, a := range asJSON[api.Status](b, "status").Store.Attachments {
		if a.Container == name {
			return a.Node
		}
	}
	b.Fatalf("%s is not attached", name)
	return ""
}

// TestSecondDaemon: a second daemon, whichever directory it shares with the first, is refused at
// once and names the first; so are commands on the closed pool.
func TestSecondDaemon(t *testing.T) {
	b := newBox(t)
	b.start()
	pid := strconv.Itoa(b.serve.Process.Pid)
	other := b.mkdir("other")
	for _, args := range [][]string{
		{"serve", "--root", b.root, "--run", b.run},
		{"serve", "--root", b.root, "--run", other},
		{"serve", "--root", other, "--run", b.run},
	} {
		start := time.Now()
		msg := b.fails(args...)
		if !strings.Contains(msg, "process "+pid) || !strings.Contains(msg, "--root "+b.root+" --run "+b.run) {
			t.Errorf("mica %s does not name process %s: %s", strings.Join(args, " "), pid, msg)
		}
		if d := time.Since(start); d > 8*time.Second {
			t.Errorf("mica %s waited %v for a daemon that answers", strings.Join(args, " "), d)
		}
	}
	if msg := b.fails("thin", "create", b.root+"/pool", "7"); !strings.Contains(msg, pid) || !strings.Contains(msg, "mica status") {
		t.Errorf("thin create on the daemon's pool: %s", msg)
	}
	b.mica("ls") // the first goes on
}

// devices are the thin devices of the closed pool.
func (b *box) devices() []thin.DevID {
	b.Helper()
	var ids []thin.DevID
	for _, d := range asJSON[[]struct{ ID thin.DevID }](b, "thin", "ls", b.root+"/pool") {
		ids = append(ids, d.ID)
	}
	return ids
}

// TestForeignDevice: a device made by `mica thin create` is never touched by the daemon, in ten
// restarts with work between them; and a catalog that is deleted deletes no device.
func TestForeignDevice(t *testing.T) {
	b := newBox(t)
	b.start()
	b.settle()
	b.stop(syscall.SIGTERM)
	pool := b.root + "/pool"
	b.mica("thin", "create", pool, "7")
	w := b.command("thin", "write", pool, "7", "--offset", "1M")
	w.Stdin = strings.NewReader("foreign")
	if out, err := w.CombinedOutput(); err != nil {
		t.Fatalf("thin write: %v\n%s", err, out)
	}
	image := b.testImage()
	for i := range 10 {
		b.start()
		st := asJSON[api.Status](b, "status")
		if !slices.Equal(st.Store.Foreign, []thin.DevID{7}) {
			t.Fatalf("restart %d: foreign devices %v", i, st.Store.Foreign)
		}
		name := fmt.Sprint("c", i)
		if i == 0 {
			b.mica("image", "import", image)
		}
		b.mica("create", "test:1", name)
		if i%2 == 1 {
			b.mica("rm", name)
		}
		if sig := []os.Signal{syscall.SIGTERM, syscall.SIGKILL}[i%2]; b.stop(sig) > 0 {
			t.Fatalf("restart %d: the daemon ended badly", i)
		}
	}
	if got := b.mica("thin", "read", pool, "7", "--offset", "1M", "--length", "7"); got != "foreign" {
		t.Errorf("the foreign device holds %q", got)
	}
	b.start()
	b.settle()
	b.stop(syscall.SIGTERM)
	before := b.devices()
	if len(before) != 1+1+2+5 { // ours, the base, two layers, five containers
		t.Errorf("devices %v", before)
	}
	if err := os.Remove(filepath.Join(b.root, "catalog.db")); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.settle()
	st := asJSON[api.Status](b, "status")
	if len(st.Store.Foreign) != len(before) {
		t.Errorf("without a catalog %d devices are foreign, want %d", len(st.Store.Foreign), len(before))
	}
	b.mica("image", "import", image) // it is a new store, and works
	b.mica("create", "test:1", "new")
	b.stop(syscall.SIGTERM)
	after := b.devices()
	for _, id := range before {
		if !slices.Contains(after, id) {
			t.Errorf("device %d is gone", id)
		}
	}
}

// TestInterruptedImport: Ctrl-C, a killed client and a killed daemon leave nothing of an import.
func TestInterruptedImport(t *testing.T) {
	b := newBox(t)
	b.start()
	empty := b.settle()
	archive, err := os.ReadFile(b.testImage())
	if err != nil {
		t.Fatal(err)
	}
	nothing := func(when string) {
		t.Helper()
		if got := b.mica("image", "ls", "--json"); got != "[]" {
			t.Errorf("%s: images %s", when, got)
		}
		if n := b.settle().DataUsed; n != empty.DataUsed {
			t.Errorf("%s: %d blocks are used, %d before", when, n, empty.DataUsed)
		}
	}
	half := func() *exec.Cmd {
		c := b.command("image", "import", "-", "--name", "half")
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write(archive[:len(archive)/2]); err != nil {
			t.Fatal(err)
		}
		b.eventually("the import runs", func() bool { return asJSON[api.Status](b, "status").Running > 0 })
		return c
	}
	c := half()
	c.Process.Signal(os.Interrupt)
	c.Wait()
	if code := c.ProcessState.ExitCode(); code != 1 {
		t.Errorf("Ctrl-C: exit status %d, want 1", code)
	}
	nothing("Ctrl-C")
	c = half()
	c.Process.Kill()
	c.Wait()
	b.eventually("the import ends", func() bool { return asJSON[api.Status](b, "status").Running == 0 })
	nothing("killed client")
	c = half()
	b.stop(syscall.SIGKILL)
	if c.Wait() == nil {
		t.Error("the import succeeded although the daemon was killed")
	}
	b.start()
	nothing("killed daemon")
	cut := filepath.Join(b.dir, "cut.tar")
	if err := os.WriteFile(cut, archive[:len(archive)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if msg := b.fails("image", "import", cut); !strings.Contains(msg, cut) {
		t.Errorf("an archive that is cut short: %s", msg)
	}
	nothing("archive cut short")
	if msg := b.fails("image", "import", filepath.Join(b.dir, "none.tar")); !strings.Contains(msg, "no such file") {
		t.Errorf("an archive that is not there: %s", msg)
	}
	b.mica("image", "import", filepath.Join(b.dir, "image.tar"))
}

// TestSpace: the pool grows by itself where that is configured, and a full one says so; space that
// comes back lets writers go on.
func TestSpace(t *testing.T) {
	b := newBox(t)
	b.config = filepath.Join(b.dir, "config.toml")
	b.write(b.config, `
[pool]
size = "64M"
error_if_no_space = true
[auto_extend]
enabled = true
threshold = "80%"
step = "50%"
max = "96M"
[containers]
base_size = "256M"
`)
	b.start()
	b.settle()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	dir := b.mica("mount", "web")
	b.write(dir+"/a", string(pattern(2, 50<<20)))
	b.eventually("the pool grows", func() bool { return asJSON[api.Status](b, "status").Pool.DataSpaceBytes == 96<<20 })
	if text := b.mica("events", "--no-follow", "--kind", "grow"); !strings.Contains(text, "pool") {
		t.Errorf("no event of the growth: %q", text)
	}
	f, err := os.Create(dir + "/b")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(pattern(3, 60<<20))
	if err == nil {
		err = f.Sync()
	}
	f.Close()
	if err == nil {
		t.Error("110 MiB fit into a pool of 96 MiB")
	}
	b.eventually("the events tell of it", func() bool {
		text := b.mica("events", "--no-follow", "--json")
		return strings.Contains(text, `"out_of_data_space"`) && strings.Contains(text, `"low_water_mark"`)
	})
	b.mica("pool", "grow", "--size", "256M")
	if p := asJSON[api.Status](b, "status").Pool; p.Mode != "rw" || p.DataSpaceBytes != 256<<20 {
		t.Errorf("after growing: mode %s, %d bytes", p.Mode, p.DataSpaceBytes)
	}
	// The pool has refused writes. Blocks of the file system itself may have been among them, which is said
	// once, by the unmount that takes the device away all the same.
	if _, stderr, code := b.try("umount", "web"); code != 0 && !strings.Contains(stderr, "loop device detached with unwritten data") {
		t.Errorf("umount: %s", stderr)
	}
	if l, err := b.client().Attachments(context.Background(), ""); err != nil || len(l) > 0 {
		t.Errorf("still attached: %+v, %v", l, err)
	}
}
