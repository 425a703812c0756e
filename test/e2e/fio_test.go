package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mica/layer"
)

// fio makes a run of fio that writes with random block sizes from 512 bytes in 4 jobs, each in a
// part of its own, and verifies everything that it wrote.
func (b *box) fio(jobMiB, offMiB int, more ...string) *exec.Cmd {
	args := []string{"--name=v", "--rw=randwrite", "--bsrange=512-128k", "--numjobs=4", "--iodepth=8",
		fmt.Sprintf("--size=%dm", jobMiB), fmt.Sprintf("--offset=%dm", offMiB), fmt.Sprintf("--offset_increment=%dm", jobMiB),
		"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_dump=0", "--group_reporting",
		"--randseed=4711", "--allow_file_create=1"}
	c := b.tool("fio", append(args, more...)...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	return c
}

// endFio waits for a run of fio and wants no error in it.
func (b *box) endFio(c *exec.Cmd) {
	b.Helper()
	err := c.Wait()
	out := c.Stdout.(*bytes.Buffer).String()
	if err != nil || !strings.Contains(out, "err= 0") || strings.Contains(out, "verify:") || strings.Contains(out, "bad magic") {
		b.Fatalf("fio: %v\n%s", err, out)
	}
}

func running(c *exec.Cmd) bool {
	// A process that has ended and was not waited for is a zombie.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Process.Pid))
	return err == nil && !bytes.Contains(text, []byte(") Z "))
}

// A moment is a snapshot taken while a writer appended lines.
type moment struct {
	name   string
	before int // lines that were durable before the snapshot began
	snap   layer.Snapshot
}

// snapshotsWhile takes snapshots of a container for as long as fio runs, at most so many.
func (b *box) snapshotsWhile(c *exec.Cmd, name, prefix string, w *writer, most int, flags ...string) []moment {
	b.Helper()
	var list []moment
	for i := 0; i < most && running(c); i++ {
		m := moment{name: fmt.Sprint(prefix, i)}
		if w != nil {
			w.wait(b.T, 3)
			m.before = w.count()
		}
		m.snap = asJSON[layer.Snapshot](b, append([]string{"snapshot", name, m.name}, flags...)...)
		list = append(list, m)
		time.Sleep(200 * time.Millisecond)
	}
	if len(list) < 3 {
		b.Errorf("only %d snapshots were taken while fio ran", len(list))
	}
	return list
}

// TestFioFileSystem: fio with verification on the ext4 of a mounted container, direct and
// buffered, with snapshots taken while it runs. fio finds no error; every snapshot is a sound
// file system after its journal was replayed on a copy, and holds every line that was durable
// before it began.
func TestFioFileSystem(t *testing.T) {
	b := newBox(t, "fio", "debugfs")
	b.start()
	b.smallImage()
	b.mica("create", "small", "web")
	dir := b.mount("web")
	var moments []moment
	w := b.startWriter("append", filepath.Join(dir, "lines"))
	for _, mode := range []string{"direct", "buffered"} {
		args := []string{"--filename=" + filepath.Join(dir, mode), "--ioengine=libaio", "--loops=8", "--direct=0"}
		if mode == "direct" {
			args[3] = "--direct=1"
		}
		c := b.background(b.fio(12, 0, args...))
		moments = append(moments, b.snapshotsWhile(c, "web", mode, w, 6)...)
		b.endFio(c)
	}
	lines := w.stop(t)
	if got := strings.Fields(string(b.readFile(filepath.Join(dir, "lines")))); len(got) != len(lines) {
		t.Errorf("%d lines, %d were written", len(got), len(lines))
	}
	b.mica("umount", "web")
	b.shutdown()
	for _, m := range moments {
		if m.snap.Level != layer.LevelFileSystem {
			t.Errorf("snapshot %s: level %s", m.name, m.snap.Level)
		}
		b.checkCopy(m, true)
	}
	t.Logf("%d snapshots while fio ran, %d lines", len(moments), len(lines))
}

// checkCopy makes a copy of a snapshot in the closed pool, exports it, replays its journal and
// checks its file system. With lines, the file /lines holds all that it must and no gap.
func (b *box) checkCopy(m moment, lines bool) {
	b.Helper()
	const id = 1 << 20 // far from the store's own
	b.mica("thin", "snap", b.pool, strconv.Itoa(id), fmt.Sprint(m.snap.Device))
	defer b.mica("thin", "rm", b.pool, strconv.Itoa(id))
	file, end := b.exportFile(id, m.snap.SizeBytes)
	defer end()
	out, err := b.tool("e2fsck", "-fy", "-E", "journal_only", file).CombinedOutput()
	if err != nil && err.(*exec.ExitError).ExitCode() != 1 { // 1: changed, which a replay may do
		b.Errorf("snapshot %s: replay: %v\n%s", m.name, err, out)
	}
	if out, err := b.tool("e2fsck", "-fn", file).CombinedOutput(); err != nil {
		b.Errorf("snapshot %s: e2fsck: %v\n%s", m.name, err, out)
	}
	if !lines {
		return
	}
	got, err := b.tool("debugfs", "-R", "cat /lines", file).Output()
	if err != nil {
		b.Errorf("snapshot %s: debugfs: %v", m.name, err)
	}
	n := 0
	for _, l := range strings.Fields(string(got)) {
		if l != strconv.Itoa(n) {
			b.Errorf("snapshot %s: line %d is %q", m.name, n, l)
			return
		}
		n++
	}
	if n < m.before {
		b.Errorf("snapshot %s holds %d lines, %d were durable before it began", m.name, n, m.before)
	}
}

// exportFile exports a thin device of the closed pool as a file until end is called.
func (b *box) exportFile(id int, size int64) (file string, end func()) {
	b.Helper()
	file = b.writeFile("export", nil)
	return file, b.export(file, "--fuse", file, strconv.Itoa(id), size)
}

func (b *box) export(want, kind, where, id string, size int64) (end func()) {
	b.Helper()
	c := b.command("thin", "export", b.pool, id, "--size", fmt.Sprint(size), kind, where)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	b.background(c)
	line := make([]byte, 4096)
	n, _ := out.Read(line)
	if got := strings.TrimSpace(string(line[:n])); got != want {
		c.Wait()
		b.Fatalf("thin export %s %s printed %q, want %q: %s", id, kind, got, want, stderr.String())
	}
	return func() {
		b.Helper()
		c.Process.Signal(os.Interrupt)
		if err := c.Wait(); err != nil {
			b.Errorf("thin export %s %s: %v: %s", id, kind, err, stderr.String())
		}
	}
}

// TestFioNBD: fio with its own NBD client on a container that is attached as NBD, writing where a
// file of its ext4 lies, with snapshots taken while it runs; then on a device of the closed pool.
func TestFioNBD(t *testing.T) {
	b := newBox(t, "fio", "filefrag")
	if out, _ := exec.Command("fio", "--enghelp").Output(); !bytes.Contains(out, []byte("nbd")) {
		t.Skip("SKIPPED: needs a fio with the engine nbd")
	}
	b.start()
	b.smallImage()
	b.mica("create", "small", "vm")
	dir := b.mount("vm")
	b.sh("fallocate", "-l", "96M", filepath.Join(dir, "area"))
	at := b.extent(filepath.Join(dir, "area"), 64<<20)
	b.mica("umount", "vm")
	uri := b.mica("attach", "vm", "--as", "nbd", "--trust-guest")
	c := b.background(b.fio(16, int(at>>20), "--ioengine=nbd", "--uri="+uri, "--loops=8"))
	moments := b.snapshotsWhile(c, "vm", "nbd", nil, 5, "--crash-ok")
	b.endFio(c)
	b.mica("detach", "vm")
	b.shutdown()
	for _, m := range moments {
		b.checkCopy(m, false)
	}

	const id, socket = "1048577", "thin.sock"
	b.mica("thin", "create", b.pool, id)
	uri = "nbd+unix:///?socket=" + b.path(socket)
	end := b.export(uri, "--nbd", b.path(socket), id, 64<<20)
	c = b.background(b.fio(16, 0, "--ioengine=nbd", "--uri="+uri))
	b.endFio(c)
	end()
	// What fio verified is what the pool holds.
	c = b.command("thin", "read", b.pool, id, "--length", "64M")
	image, err := os.Create(b.path("image"))
	if err != nil {
		t.Fatal(err)
	}
	c.Stdout = image
	if err := c.Run(); err != nil {
		t.Fatalf("thin read: %v", err)
	}
	image.Close()
	c = b.background(b.fio(16, 0, "--ioengine=libaio", "--filename="+b.path("image"), "--verify_only"))
	b.endFio(c)
}

// extent finds a place where a file has n bytes without a gap, on a border of a MiB, and returns
// it in bytes of the file system.
func (b *box) extent(path string, n int64) int64 {
	b.Helper()
	for _, l := range strings.Split(b.sh("filefrag", "-b1", "-e", "-v", path), "\n") {
		w := strings.FieldsFunc(l, func(r rune) bool { return r == ':' || r == '.' || r == ' ' })
		if len(w) < 6 {
			continue
		}
		begin, err1 := strconv.ParseInt(w[3], 10, 64)
		end, err2 := strconv.ParseInt(w[4], 10, 64)
		begin = (begin + 1<<20 - 1) &^ (1<<20 - 1)
		if err1 == nil && err2 == nil && end+1-begin >= n {
			return begin
		}
	}
	b.Fatalf("%s has no %d bytes without a gap", path, n)
	return 0
}
