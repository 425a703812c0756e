package helper

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/layer/archive"
)

const testUUID = "6d696361-0000-4000-8000-0123456789ab"

// The test binary plays the helper too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "role-helper" {
		if err := Run(context.Background(), os.Stdin, os.Stdout, os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "role-silent" {
		time.Sleep(time.Hour)
	}
	// The race detector makes every process that ends wait for a second.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	os.Exit(m.Run())
}

func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting and loop devices need root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("SKIPPED: no loop devices here: %v", err)
	}
	for _, tool := range append(tools, "losetup", "mke2fs") {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
}

func shmDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "mica-helper-")
	if err != nil {
		t.Skipf("SKIPPED: no memory file system: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func run(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

type bench struct {
	t    testing.TB
	dir  string
	file string
	node string
	c    *Client
}

// newBench makes a loop device of size bytes on a sparse file.
func newBench(t testing.TB, size int64) *bench {
	t.Helper()
	b := &bench{t: t, dir: shmDir(t)}
	mnt := filepath.Join(b.dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	b.c = &Client{Command: []string{"/proc/self/exe", "role-helper"}, Dir: mnt, Timeout: 30 * time.Second}
	b.node, b.file = b.disk("disk", size)
	return b
}

func (b *bench) disk(name string, size int64) (node, file string) {
	b.t.Helper()
	file = filepath.Join(b.dir, name)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		b.t.Fatal(err)
	}
	node = strings.TrimSpace(run(b.t, "losetup", "-f", "--show", file))
	b.t.Cleanup(func() { run(b.t, "losetup", "-d", node) })
	return node, file
}

func (b *bench) mount(opts ...string) string {
	b.t.Helper()
	dir, err := os.MkdirTemp(b.dir, "m")
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.c.Mount(tctx(b.t), b.node, dir, "ext4", opts); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func tctx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func (b *bench) mkfs() {
	b.t.Helper()
	if err := b.c.Mkfs(tctx(b.t), b.node, "ext4", testUUID); err != nil {
		b.t.Fatal(err)
	}
}

func layerTar(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, content := range files {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, content)
	}
	w.Close()
	return buf.Bytes()
}

func noMounts(t testing.TB, node string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), node+" ") {
		t.Errorf("%s is still mounted here", node)
	}
}

// The base has the fixed features, whatever the host's configuration says, no lost+found, and
// costs few blocks.
func TestMkfs(t *testing.T) {
	needRoot(t, "dumpe2fs", "e2fsck")
	b := newBench(t, 10<<30)
	t.Setenv("MKE2FS_CONFIG", "/nonexistent")
	b.mkfs()
	out := run(t, "dumpe2fs", "-h", b.node)
	field := func(name string) string {
		for _, l := range strings.Split(out, "\n") {
			if v, ok := strings.CutPrefix(l, name+":"); ok {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	want := "has_journal ext_attr resize_inode dir_index filetype extent 64bit flex_bg sparse_super large_file huge_file dir_nlink extra_isize metadata_csum"
	if got := field("Filesystem features"); got != want {
		t.Errorf("features\n got %s\nwant %s", got, want)
	}
	for name, want := range map[string]string{"Filesystem UUID": testUUID, "Directory Hash Seed": testUUID,
		"Errors behavior": "Remount read-only", "Inode size": "256", "Block size": "4096",
		"Filesystem state": "clean", "Maximum mount count": "-1", "Reserved block count": "0"} {
		if got := field(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	run(t, "e2fsck", "-fn", b.node)
	var st unix.Stat_t
	if err := unix.Stat(b.file, &st); err != nil {
		t.Fatal(err)
	}
	t.Logf("a base of 10 GiB occupies %d KiB", st.Blocks/2)
	if st.Blocks/2 > 8<<10 {
		t.Errorf("base occupies %d KiB, want 8 MiB at most", st.Blocks/2)
	}
	dir := b.mount()
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 0 {
		t.Errorf("a new base holds %v (%v), want nothing", names, err)
	}
}

func TestApplyDiff(t *testing.T) {
	needRoot(t)
	b := newBench(t, 256<<20)
	b.mkfs()
	big := strings.Repeat("mica", 1<<18)
	st, err := b.c.Apply(tctx(t), b.node, "ext4", true, bytes.NewReader(layerTar(t, map[string]string{"a/b": "hello", "big": big})))
	if err != nil {
		t.Fatal(err)
	}
	if st.Entries != 2 || st.Bytes != int64(len(big)+5) || st.Trimmed == 0 {
		t.Errorf("stats %+v", st)
	}
	noMounts(t, b.node)
	var buf bytes.Buffer
	if _, err := b.c.Diff(tctx(t), "", b.node, "ext4", nil, &buf); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	r := tar.NewReader(&buf)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		c, _ := io.ReadAll(r)
		got[h.Name] = string(c)
	}
	if got["a/b"] != "hello" || got["big"] != big {
		t.Errorf("diff has %d entries, a/b %q", len(got), got["a/b"])
	}
	noMounts(t, b.node)
}

// What goes wrong in an apply or diff comes back typed, and no mount stays.
func TestApplyErrors(t *testing.T) {
	needRoot(t)
	b := newBench(t, 64<<20)
	b.mkfs()
	ours := errors.New("digest does not match")
	for _, tc := range []struct {
		name string
		r    io.Reader
		want error
	}{
		{"escape", bytes.NewReader(layerTar(t, map[string]string{"../x": "y"})), archive.ErrEscape},
		{"cut", bytes.NewReader(layerTar(t, map[string]string{"x": strings.Repeat("y", 5000)})[:3000]), io.ErrUnexpectedEOF},
		{"no space", bytes.NewReader(layerTar(t, map[string]string{"x": strings.Repeat("y", 80<<20)})), syscall.ENOSPC},
		{"reader", io.MultiReader(bytes.NewReader(layerTar(t, map[string]string{"x": "y"})), failing{ours}), ours},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := b.c.Apply(tctx(t), b.node, "ext4", false, tc.r)
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			noMounts(t, b.node)
		})
	}
	out := errors.New("disk of the reader is full")
	if _, err := b.c.Diff(tctx(t), "", b.node, "ext4", nil, failing{out}); !errors.Is(err, out) {
		t.Errorf("diff: %v, want %v", err, out)
	}
	empty, _ := b.disk("empty", 16<<20)
	if _, err := b.c.Apply(tctx(t), empty, "ext4", false, bytes.NewReader(nil)); !errors.Is(err, ErrFileSystem) {
		t.Errorf("apply on no file system: %v, want ErrFileSystem", err)
	}
	if err := b.c.Replay(tctx(t), "/dev/does-not-exist", "ext4"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("replay of nothing: %v, want ENOENT", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error)  { return 0, f.err }
func (f failing) Write([]byte) (int, error) { return 0, f.err }

// A cancelled apply ends at once, and its mount with it.
func TestApplyCancel(t *testing.T) {
	needRoot(t)
	b := newBench(t, 64<<20)
	b.mkfs()
	ctx, cancel := context.WithCancel(tctx(t))
	pr, pw := io.Pipe()
	defer pw.Close()
	go func() {
		pw.Write(layerTar(t, map[string]string{"x": "y"})[:1024])
		cancel()
	}()
	if _, err := b.c.Apply(ctx, b.node, "ext4", false, pr); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want canceled", err)
	}
	waitIdle(t, b.c, b.node)
	// A helper that moves nothing is killed.
	c := *b.c
	c.Stall = 100 * time.Millisecond
	c.Command = []string{"/proc/self/exe", "role-silent"}
	if _, err := c.Apply(tctx(t), b.node, "ext4", false, bytes.NewReader(make([]byte, 1<<20))); !errors.Is(err, ErrTimeout) {
		t.Fatalf("stalled apply: %v, want ErrTimeout", err)
	}
	c.Timeout = 100 * time.Millisecond
	if err := c.Replay(tctx(t), b.node, "ext4"); !errors.Is(err, ErrTimeout) {
		t.Fatalf("silent helper: %v, want ErrTimeout", err)
	}
	c.Command = []string{"/bin/false"}
	if err := c.Replay(tctx(t), b.node, "ext4"); !errors.Is(err, ErrDied) && !errors.Is(err, syscall.EPIPE) {
		t.Fatalf("dead helper: %v, want ErrDied", err)
	}
}

// waitIdle waits until a node is free: the kernel takes mounts of killed processes away a little later.
func waitIdle(t testing.TB, c *Client, node string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s, err := c.Probe(tctx(t), node)
		if err != nil {
			t.Fatal(err)
		}
		if s == StateIdle {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s stays %s", node, s)
		}
	}
}

// blocked reports whether a write to a file in dir waits. It ends when the file system is thawed.
func tryWrite(dir string) <-chan error {
	ch := make(chan error, 1)
	go func() { ch <- os.WriteFile(filepath.Join(dir, "probe"), []byte("x"), 0o600) }()
	return ch
}

func stillBlocked(ch <-chan error) bool {
	select {
	case <-ch:
		return false
	case <-time.After(150 * time.Millisecond):
		return true
	}
}

func TestFreeze(t *testing.T) {
	needRoot(t)
	b := newBench(t, 64<<20)
	b.mkfs()
	if f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", ""); err != nil || f.State != StateIdle {
		t.Fatalf("not mounted: %v %v, want idle", f, err)
	}
	dir := b.mount()
	b.c.Freeze = 20 * time.Second
	f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", "")
	if err != nil || f.State != StateFrozen {
		t.Fatalf("freeze: %+v %v", f, err)
	}
	w := tryWrite(dir)
	if !stillBlocked(w) {
		t.Error("a write went through a frozen file system")
	}
	if err := f.Thaw(tctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := <-w; err != nil {
		t.Error(err)
	}

	t.Run("expires", func(t *testing.T) {
		b.c.Freeze = 200 * time.Millisecond
		f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", "")
		if err != nil || f.State != StateFrozen {
			t.Fatalf("freeze: %+v %v", f, err)
		}
		if err := <-tryWrite(dir); err != nil { // ends by itself
			t.Error(err)
		}
		if err := f.Thaw(tctx(t)); !errors.Is(err, ErrTimeout) {
			t.Errorf("thaw after the time: %v, want ErrTimeout", err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		b.c.Freeze = 20 * time.Second
		f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", "")
		if err != nil || f.State != StateFrozen {
			t.Fatalf("freeze: %+v %v", f, err)
		}
		f.p.kill()
		<-f.p.done
		w := tryWrite(dir)
		if !stillBlocked(w) {
			t.Log("the kernel thawed by itself")
		}
		if err := f.Thaw(tctx(t)); err == nil || errors.Is(err, ErrTimeout) {
			t.Errorf("thaw by a dead helper: %v", err)
		}
		if s, err := b.c.Thaw(tctx(t), b.node, "ext4"); err != nil || s != StateThawed {
			t.Fatalf("thaw: %s %v", s, err)
		}
		if err := <-w; err != nil {
			t.Error(err)
		}
		if s, err := b.c.Thaw(tctx(t), b.node, "ext4"); err != nil || s != StateIdle {
			t.Errorf("second thaw: %s %v, want idle", s, err)
		}
	})
	t.Run("daemon dies", func(t *testing.T) { // only the pipe's end and SIGTERM are left
		f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", "")
		if err != nil || f.State != StateFrozen {
			t.Fatalf("freeze: %+v %v", f, err)
		}
		syscall.Kill(f.p.cmd.Process.Pid, syscall.SIGTERM)
		if err := <-tryWrite(dir); err != nil {
			t.Error(err)
		}
		<-f.p.done
		f.p.finish()
	})
	t.Run("nobody listens", func(t *testing.T) { // the daemon died while the helper was about to freeze
		p, err := b.c.start(Request{Op: opFreeze, Node: b.node, FSType: "ext4", Dir: b.c.Dir, FreezeMS: 20000}, thawing)
		if err != nil {
			t.Fatal(err)
		}
		p.stdout.Close()
		w := tryWrite(dir)
		for end := time.Now().Add(10 * time.Second); !stillBlocked(w) && time.Now().Before(end); {
			w = tryWrite(dir)
		}
		p.stdin.Close()
		select {
		case err := <-w:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Error("it was left frozen")
			b.c.Thaw(tctx(t), b.node, "ext4")
			<-w
		}
		p.finish()
	})
	t.Run("record", func(t *testing.T) {
		record := filepath.Join(t.TempDir(), "record")
		if f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", record); err == nil {
			f.Thaw(tctx(t))
			t.Error("frozen without the record that was named")
		}
		r, err := os.Create(record)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", record)
		if err != nil || f.State != StateFrozen {
			t.Fatalf("freeze: %+v %v", f, err)
		}
		if err := unix.Flock(int(r.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("lock of the record while it is frozen: %v, want EWOULDBLOCK", err)
		}
		if err := f.Thaw(tctx(t)); err != nil {
			t.Error(err)
		}
		if err := unix.Flock(int(r.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			t.Errorf("lock of the record afterwards: %v", err)
		}
	})
	t.Run("unmounted while frozen", func(t *testing.T) {
		f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", "")
		if err != nil || f.State != StateFrozen {
			t.Fatalf("freeze: %+v %v", f, err)
		}
		f.p.kill()
		<-f.p.done
		f.p.finish()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if s, err := b.c.Thaw(tctx(t), b.node, "ext4"); err != nil || s != StateThawed {
			t.Fatalf("thaw: %s %v", s, err)
		}
		waitIdle(t, b.c, b.node)
	})
	t.Run("read-only", func(t *testing.T) {
		for _, opts := range [][]string{{"ro"}, {"ro", "noload"}} {
			dir := b.mount(opts...)
			if f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", ""); err != nil || f.State != StateReadOnly {
				t.Errorf("%v: %+v %v, want read-only", opts, f, err)
			}
			if err := b.c.Unmount(tctx(t), dir); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("claimed by something else", func(t *testing.T) {
		waitIdle(t, b.c, b.node) // any process that was just forked may have had a copy of the mount
		fd, err := unix.Open(b.node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if f, err := b.c.FreezeNode(tctx(t), b.node, "ext4", ""); err != nil || f.State != StateForeign {
			t.Errorf("%+v %v, want foreign", f, err)
		}
	})
}

// A helper that is killed in the middle leaves no mount behind, here or anywhere.
func TestKilledHelperLeavesNothing(t *testing.T) {
	needRoot(t)
	b := newBench(t, 64<<20)
	b.mkfs()
	p, err := b.c.start(Request{Op: opApply, Node: b.node, FSType: "ext4", Dir: b.c.Dir}, streamIn)
	if err != nil {
		t.Fatal(err)
	}
	p.data.Write(layerTar(t, map[string]string{"x": strings.Repeat("y", 100000)})[:50000])
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		// Not by a probe: its exclusive open would be in the way of the mount.
		if text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", p.cmd.Process.Pid)); strings.Contains(string(text), b.node+" ") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the helper did not mount")
		}
	}
	noMounts(t, b.node) // not in our namespace
	p.kill()
	p.finish()
	waitIdle(t, b.c, b.node)
	ents, err := os.ReadDir(b.c.Dir)
	if err != nil || len(ents) != 0 {
		t.Errorf("left in %s: %v %v", b.c.Dir, ents, err)
	}
}

// What the host unmounts is gone from running helpers too.
func TestHelperDoesNotPinMounts(t *testing.T) {
	needRoot(t)
	b := newBench(t, 64<<20)
	b.mkfs()
	other, _ := b.disk("other", 64<<20)
	if err := b.c.Mkfs(tctx(t), other, "ext4", testUUID); err != nil {
		t.Fatal(err)
	}
	dir := b.mount()
	p, err := b.c.start(Request{Op: opApply, Node: other, FSType: "ext4", Dir: b.c.Dir}, streamIn)
	if err != nil {
		t.Fatal(err)
	}
	defer p.finish()
	for s := State(""); s != StateBusy; time.Sleep(5 * time.Millisecond) {
		s, _ = b.c.Probe(tctx(t), other)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	waitIdle(t, b.c, b.node)
	p.kill()
}

func TestGrowMountedAndNot(t *testing.T) {
	needRoot(t, "e2fsck")
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprintf("mounted=%v", mounted), func(t *testing.T) {
			b := newBench(t, 256<<20)
			b.mkfs()
			size := func(dir string) int64 {
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil {
					t.Fatal(err)
				}
				return int64(st.Blocks) * st.Bsize
			}
			dir := ""
			if mounted {
				dir = b.mount()
			}
			if err := os.Truncate(b.file, 40<<30); err != nil {
				t.Fatal(err)
			}
			run(t, "losetup", "-c", b.node)
			err := b.c.Grow(tctx(t), b.node, "ext4")
			if mounted && errors.Is(err, syscall.EPERM) {
				t.Skip("SKIPPED: growing a mounted ext4 needs CAP_SYS_RESOURCE, which this machine does not give")
			}
			if err != nil {
				t.Fatal(err)
			}
			if !mounted {
				dir = b.mount()
			}
			if got := size(dir); got < 39<<30 {
				t.Errorf("file system has %d bytes, want about 40 GiB", got)
			}
			if err := b.c.Unmount(tctx(t), dir); err != nil {
				t.Fatal(err)
			}
			run(t, "e2fsck", "-fn", b.node)
		})
	}
}

// A crashed file system is clean after a replay.
func TestReplay(t *testing.T) {
	needRoot(t, "e2fsck", "dumpe2fs")
	b := newBench(t, 64<<20)
	b.mkfs()
	dir := b.mount()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syncFS(dir); err != nil {
		t.Fatal(err)
	}
	crashed := filepath.Join(b.dir, "crashed")
	run(t, "cp", "--sparse=always", b.file, crashed)
	node := strings.TrimSpace(run(t, "losetup", "-f", "--show", crashed))
	defer run(t, "losetup", "-d", node)
	if !strings.Contains(run(t, "dumpe2fs", "-h", node), "needs_recovery") {
		t.Fatal("the copy does not need recovery")
	}
	if err := b.c.Replay(tctx(t), node, "ext4"); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(run(t, "dumpe2fs", "-h", node), "needs_recovery") {
		t.Error("still needs recovery")
	}
	run(t, "e2fsck", "-fn", node)
}

func TestXFS(t *testing.T) {
	needRoot(t, "mkfs.xfs", "xfs_growfs")
	b := newBench(t, 512<<20)
	if err := b.c.Mkfs(tctx(t), b.node, "xfs", testUUID); err != nil {
		t.Fatal(err)
	}
	// The fixed features, whatever this mkfs.xfs makes by default, and no large times.
	info := run(t, "xfs_db", "-r", "-c", "version", "-c", "uuid", b.node)
	for _, word := range []string{"V5", "CRC", "FTYPE", "FINOBT", "SPARSE_INODES", "REFLINK", testUUID} {
		if !strings.Contains(info, word) {
			t.Errorf("no %s in\n%s", word, info)
		}
	}
	for _, word := range []string{"BIGTIME", "INOBTCNT", "NREXT64", "RMAPBT", "PARENT"} {
		if strings.Contains(info, word) {
			t.Errorf("%s, which kernel 5.4 does not know, in\n%s", word, info)
		}
	}
	if _, err := b.c.Apply(tctx(t), b.node, "xfs", true, bytes.NewReader(layerTar(t, map[string]string{"x": "y"}))); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(b.file, 1<<30); err != nil {
		t.Fatal(err)
	}
	run(t, "losetup", "-c", b.node)
	if err := b.c.Grow(tctx(t), b.node, "xfs"); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if st, err := b.c.Diff(tctx(t), "", b.node, "xfs", nil, &buf); err != nil || st.Entries == 0 {
		t.Fatalf("diff: %+v %v", st, err)
	}
}

// Run refuses what it cannot do safely.
func TestRunRefuses(t *testing.T) {
	var out bytes.Buffer
	if err := Run(context.Background(), strings.NewReader("{"), &out, nil); err == nil {
		t.Error("half a request was accepted")
	}
	if err := Run(context.Background(), strings.NewReader(strings.Repeat("x", 1<<20)+"\n"), &out, nil); err == nil {
		t.Error("a request of 1 MiB was accepted")
	}
	if err := Run(context.Background(), strings.NewReader("{}\n"), &out, []string{"extra"}); err == nil {
		t.Error("an argument was accepted")
	}
}
