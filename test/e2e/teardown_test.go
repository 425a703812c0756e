package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/testbox"
)

// takeDown ends everything in the box, lets two checkers look at the pool, and fails the test if
// anything is left on the machine.
func (b *box) takeDown() {
	b.watchdog.Stop()
	for _, c := range b.tools {
		if c.ProcessState == nil {
			c.Process.Kill()
			c.Wait()
		}
	}
	fuseDir := filepath.Join(b.run, "fuse") + "/"
	for _, m := range mountsBelow(b.path("mnt")) {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			b.Errorf("unmount %s: %v", m, err)
		}
	}
	if b.serve != nil {
		b.endDaemon()
	}
	for i := range b.atEnd {
		b.atEnd[len(b.atEnd)-1-i]()
	}
	b.awaitNoProcess()
	for _, dev := range loopsBelow(b.dir) {
		b.Errorf("loop device %s is left", dev)
		exec.Command("losetup", "-d", dev).Run()
	}
	// A root on a file system of its own is the test's.
	for _, m := range mountsBelow(b.dir) {
		if strings.HasPrefix(m, fuseDir) {
			b.Errorf("%s is left mounted", m)
		}
	}
	if !b.noCheck {
		b.checkPool()
	}
	b.checkFiles()
	for _, m := range mountsBelow(b.dir) {
		unix.Unmount(m, unix.MNT_DETACH)
	}
	log, _ := os.ReadFile(b.path("log"))
	for _, bad := range []string{"panic: ", "DATA RACE", "fatal error: "} {
		if bytes.Contains(log, []byte(bad)) {
			b.Errorf("the daemon's log has a %q", bad)
		}
	}
	if b.Failed() {
		b.Logf("daemon:\n%s", log[max(0, len(log)-64<<10):])
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.Error(err)
	}
}

// endDaemon shuts the daemon down, or kills it if that does not help.
func (b *box) endDaemon() {
	out, err := b.command("shutdown").CombinedOutput()
	if err != nil {
		b.Errorf("shutdown at the end of the test: %v\n%s", err, out)
		b.serve.Process.Kill()
	}
	select {
	case err := <-b.daemon.Exited:
		if err != nil && !b.Failed() {
			b.Errorf("the daemon ended badly: %v", err)
		}
	case <-time.After(30 * time.Second):
		b.Error("the daemon does not end")
		b.serve.Process.Kill()
		<-b.daemon.Exited
	}
	b.serve = nil
}

// awaitNoProcess gives what is ending some time, then kills it by its id and says so.
func (b *box) awaitNoProcess() {
	for deadline := time.Now().Add(10 * time.Second); len(b.processes()) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	for _, pid := range b.processes() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		b.Errorf("process %d is left: %s", pid, bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		unix.Kill(pid, unix.SIGKILL)
	}
	for deadline := time.Now().Add(5 * time.Second); len(b.processes()) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
}

// removeStale takes away the boxes of test programs that were killed.
func removeStale() {
	dirs, _ := filepath.Glob("/dev/shm/mica-e2e-*-*")
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.Split(dir, "-")[2])
		if err != nil || unix.Kill(pid, 0) == nil {
			continue
		}
		fmt.Printf("removing %s, which a killed test has left\n", dir)
		b := &box{dir: dir}
		for _, p := range b.processes() {
			unix.Kill(p, unix.SIGKILL)
		}
		for deadline := time.Now().Add(10 * time.Second); len(b.processes()) > 0 && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
		for _, m := range mountsBelow(dir) {
			unix.Unmount(m, unix.MNT_DETACH)
		}
		for _, l := range loopsBelow(dir) {
			exec.Command("losetup", "-d", l).Run()
		}
		os.RemoveAll(dir)
	}
}

// processes lists the living processes that carry this box's marker.
func (b *box) processes() []int {
	var list []int
	dirs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, d := range dirs {
		env, err := os.ReadFile(d)
		pid, _ := strconv.Atoi(strings.Split(d, "/")[2])
		if err == nil && pid != os.Getpid() && slices.Contains(strings.Split(string(env), "\x00"), marker+b.dir) {
			list = append(list, pid)
		}
	}
	return list
}

func mountsBelow(dir string) []string { return testbox.Mounts(dir) }

// loopsBelow lists loop devices on files below a directory.
func loopsBelow(dir string) []string {
	var list []string
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(text), dir+"/") {
			list = append(list, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return list
}

// checkPool holds Debian's thin_check and thin_dump against the program's own commands.
func (b *box) checkPool() {
	b.Helper()
	meta := filepath.Join(b.pool, "metadata")
	if _, err := os.Stat(meta); err != nil {
		b.Errorf("no pool at the end: %v", err)
		return
	}
	checkMetadata(b, meta)
}

func checkMetadata(b *box, meta string) {
	b.Helper()
	out, stderr, code := b.try("thin", "check", "--metadata", meta)
	if code != 0 {
		b.Errorf("mica thin check: exit status %d\n%s%s", code, out, stderr)
	}
	if path, err := exec.LookPath("thin_check"); err != nil {
		b.Logf("NOTE: thin_check is not installed, the pool was not compared")
		return
	} else if out, err := exec.Command(path, meta).CombinedOutput(); err != nil {
		b.Errorf("thin_check: %v\n%s", err, out)
	}
	ours, stderr, code := b.try("thin", "dump", "--metadata", meta)
	if code != 0 {
		b.Errorf("mica thin dump: exit status %d\n%s", code, stderr)
	}
	theirs, err := exec.Command("thin_dump", meta).Output()
	if err != nil {
		b.Errorf("thin_dump: %v", err)
	}
	if ours != string(theirs) {
		b.Errorf("mica thin dump and thin_dump differ: %s", firstDifference(ours, string(theirs)))
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range g {
		if i >= len(w) || g[i] != w[i] {
			return fmt.Sprintf("line %d: %q, want %q", i+1, g[i], strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""))
		}
	}
	return fmt.Sprintf("ends at line %d, want %d lines", len(g), len(w))
}

// checkFiles: ROOT holds a pool and a catalog and nothing else, RUN nothing that works, and there
// is no link to a node.
func (b *box) checkFiles() {
	var left []string
	filepath.WalkDir(b.root, func(path string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(b.root, path)
		switch rel {
		case ".", "pool", "pool/data", "pool/metadata", "pool/backups", "catalog.db", "spool", "daemon.lock", "lost+found":
		default:
			if strings.HasPrefix(rel, "pool/backups/metadata-") && strings.HasSuffix(rel, ".zst") {
				return nil // made at a clean end
			}
			left = append(left, "ROOT/"+rel)
		}
		return nil
	})
	for _, dir := range []string{b.path("links"), filepath.Join(b.run, "fuse"), filepath.Join(b.run, "mnt")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			left = append(left, filepath.Join(dir, e.Name()))
		}
	}
	entries, _ := os.ReadDir(b.run)
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 {
			left = append(left, "RUN/"+e.Name())
		}
	}
	if st, err := os.Stat(filepath.Join(b.pool, "metadata")); err == nil {
		for _, dir := range []string{"/run/mica-journal", "/dev/shm/mica-journal"} {
			found, _ := filepath.Glob(fmt.Sprintf("%s/file-*-%d*", dir, st.Sys().(*syscall.Stat_t).Ino))
			left = append(left, found...)
		}
	}
	if len(left) > 0 {
		b.Errorf("files are left: %q", left)
	}
}
