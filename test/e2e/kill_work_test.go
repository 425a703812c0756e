package e2e

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// usable fails if a mounted file system does not take a write: it is frozen, or its device hangs.
func (b *box) usable(dir string) {
	b.Helper()
	c := b.tool("sh", "-c", `echo alive >"$1/alive" && sync -f "$1/alive" && rm "$1/alive"`, "sh", dir)
	if err := b.ends(b.background(c), 20*time.Second); err != nil {
		b.Fatalf("%s takes no write: %v", dir, err)
	}
}

// ends waits for a tool, but not for ever.
func (b *box) ends(c *exec.Cmd, limit time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		c.Process.Kill()
		return errors.New("it has not ended")
	}
}

// frozen reports whether the daemon has noted that it freezes something.
func (b *box) frozen() bool {
	list, _ := filepath.Glob(filepath.Join(b.run, "freeze", "*.json"))
	return len(list) > 0
}

// TestKilledDuringWork kills the daemon while a mount, an fstrim, a freeze and a commit of a mounted
// container are under way. The next daemon has the pool at once, every file system takes writes
// again, and what was asked for can be done.
func TestKilledDuringWork(t *testing.T) {
	b := newBox(t, "fstrim")
	b.start()
	b.needResend()
	b.smallImage()
	b.mica("create", "small", "web")
	web := b.mount("web")
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewSource(seed))
	slowest := time.Duration(0)
	kill := func() {
		t.Helper()
		b.stop(syscall.SIGKILL)
		down := time.Now()
		b.start()
		slowest = max(slowest, time.Since(down))
		b.usable(web)
	}
	soon := func(most int) { time.Sleep(time.Duration(rng.Intn(most*1000)) * time.Microsecond) }

	for i := range 4 { // a mount
		name := fmt.Sprintf("m%d", i)
		b.mica("create", "small", name)
		dir := b.mkdir("mnt/" + name)
		c := b.background(b.command("mount", name, dir))
		soon(60)
		kill()
		if err := b.ends(c, 30*time.Second); err != nil {
			b.mica("mount", name, dir)
		}
		b.usable(dir)
		if got := string(b.readFile(filepath.Join(dir, "etc/motd"))); got != "high\n" {
			t.Errorf("%s holds %q after the kill", name, got)
		}
		b.mica("umount", name)
	}
	for range 4 { // an fstrim
		b.writeFile("mnt/web/junk", pattern(7, 24<<20))
		b.sh("sync", "-f", web)
		if err := os.Remove(filepath.Join(web, "junk")); err != nil {
			t.Fatal(err)
		}
		b.sh("sync", "-f", web)
		c := b.background(b.tool("fstrim", web))
		soon(30)
		kill()
		if err := b.ends(c, 30*time.Second); err != nil {
			t.Errorf("fstrim: %v", err)
		}
	}
	freezes := 0
	for i := range 6 { // a freeze, for a snapshot or a commit
		b.writeFile(fmt.Sprintf("mnt/web/f%d", i), []byte(fmt.Sprint(i)))
		snap := fmt.Sprintf("s%d", i)
		args := []string{"snapshot", "web", snap}
		if i%3 == 2 {
			args = []string{"commit", "web", "image-" + snap}
		}
		c := b.background(b.command(args...))
		for limit := time.Now().Add(10 * time.Second); !b.frozen() && running(c) && time.Now().Before(limit); {
			time.Sleep(200 * time.Microsecond)
		}
		if b.frozen() {
			freezes++
		}
		soon(10)
		kill()
		err := b.ends(c, 30*time.Second)
		if b.frozen() {
			b.eventually("nothing is noted as frozen", func() bool { return !b.frozen() })
		}
		if err != nil {
			if _, stderr, code := b.try(args...); code != 0 && !strings.Contains(stderr, "already exists") {
				t.Errorf("%v again: %s", args, stderr)
			}
		}
	}
	if freezes == 0 {
		t.Error("no kill came while something was frozen: the test tests little")
	}
	t.Logf("%d of 6 kills while something was frozen; longest start of a daemon %v", freezes, slowest.Round(time.Millisecond))
	for i := range 6 {
		if got := string(b.readFile(filepath.Join(web, fmt.Sprintf("f%d", i)))); got != fmt.Sprint(i) {
			t.Errorf("f%d holds %q", i, got)
		}
	}
	b.mica("umount", "web")
	b.sh("e2fsck", "-fn", b.mica("attach", "web"))
	b.mica("detach", "web")
}

// TestKilledPool kills `mica thin export` and looks at the pool with the commands that need no daemon:
// those that look say that something waits, those that write take it over, and those that would
// make it worthless refuse.
func TestKilledPool(t *testing.T) {
	b := newBox(t)
	b.noCheck = true // no daemon, no ROOT
	pool := b.path("p")
	writes := func(fill byte) {
		t.Helper()
		file := b.path("device")
		b.writeFile("device", nil)
		c := b.background(b.command("thin", "export", pool, "1", "--size", "16M", "--fuse", file))
		b.eventually("the export is there", func() bool {
			st, err := os.Stat(file)
			return err == nil && st.Size() == 16<<20
		})
		f, err := os.OpenFile(file, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem)
		for i := range mem {
			mem[i] = fill
		}
		if _, err := f.WriteAt(mem, 3<<20); err != nil {
			t.Fatal(err)
		}
		c.Process.Kill() // before the commit, a second later
		c.Wait()
		f.Close()
		if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	holds := func() string { return b.mica("thin", "read", pool, "1", "--offset", "3M", "--length", "16") }
	const waits = "wait in /"
	looks := func(args ...string) {
		t.Helper()
		_, stderr, code := b.try(args...)
		if code != 0 || !strings.Contains(stderr, waits) || !strings.Contains(stderr, "was killed") {
			t.Errorf("mica %s: exit status %d, %q, want 0 and that something waits", strings.Join(args, " "), code, stderr)
		}
	}

	b.mica("pool", "create", pool, "--size", "64M")
	b.mica("thin", "create", pool, "1")
	writes('a')
	for _, args := range [][]string{{"ls"}, {"check"}, {"dump"}, {"read", "1", "--length", "512"}, {"rmap", "--region", "0..10"}, {"delta", "1", "1"}} {
		looks(append([]string{"thin", args[0], pool}, args[1:]...)...)
	}
	looks("pool", "check", pool)
	meta := filepath.Join(pool, "metadata")
	b.fails([]string{"thin", "check", "--metadata", meta, "--repair-leaks"}, "wait in", "needs the data device too")
	_, stderr, code := b.try("thin", "create", pool, "2")
	if code != 0 || !strings.Contains(stderr, "16 blocks") || !strings.Contains(stderr, "taken over") {
		t.Errorf("thin create: exit status %d, %q, want 0 and 16 blocks taken over", code, stderr)
	}
	if got := holds(); got != strings.Repeat("a", 16) {
		t.Errorf("it holds %q", got)
	}

	writes('b') // in place: nothing waits
	if _, stderr, _ := b.try("thin", "ls", pool); strings.Contains(stderr, waits) {
		t.Errorf("after writes to mapped blocks: %s", stderr)
	}
	b.mica("thin", "discard", pool, "1", "--offset", "0", "--length", "16M")
	writes('c')
	b.mica("thin", "check", pool, "--repair-leaks") // a repair takes over first
	if got := holds(); got != strings.Repeat("c", 16) {
		t.Errorf("after a check that repairs it holds %q", got)
	}

	// A pool that is written anew from a dump has nothing to do with what waits.
	dump := b.path("dump.xml")
	b.mica("thin", "dump", pool, "-o", dump)
	b.mica("thin", "discard", pool, "1", "--offset", "0", "--length", "16M")
	writes('d')
	b.fails([]string{"thin", "restore", pool, "-i", dump}, "not empty") // refused: nothing happens
	looks("thin", "ls", pool)
	if _, stderr, code := b.try("thin", "restore", pool, "-i", dump, "--force"); code != 0 || !strings.Contains(stderr, "waited in /") || !strings.Contains(stderr, "given up") {
		t.Errorf("thin restore: exit status %d, %q, want 0 and what was given up", code, stderr)
	}
	if _, stderr, _ := b.try("thin", "ls", pool); stderr != "" {
		t.Errorf("after a restore: %s", stderr)
	}
	b.mica("thin", "discard", pool, "1", "--offset", "0", "--length", "16M")
	writes('e')
	b.mica("pool", "trim", pool)
	if got := holds(); got != strings.Repeat("e", 16) {
		t.Errorf("after a trim it holds %q", got)
	}
}
