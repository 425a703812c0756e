package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"mica/engine"
	"mica/engine/user"
	"mica/export/fuse"
	"mica/export/holder"
	"mica/layer"
	"mica/layer/helper"
)

// The test binary plays the small roles too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "role-") {
		var err error
		switch os.Args[1] {
		case "role-helper":
			noteHelper()
			err = helper.Run(context.Background(), os.Stdin, os.Stdout, nil)
		case "role-fuse-helper":
			err = fuse.RunHelper(context.Background(), os.Stdin, os.Stdout)
		case "role-holder":
			err = holder.Run(context.Background(), os.Args[2])
		case "role-client":
			err = clientRole(os.Args[2])
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// needRoot skips a test that cannot run here, loudly.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting, FUSE and loop devices need root")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here: %v", p, err)
		}
	}
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("SKIPPED: mke2fs is not installed (package e2fsprogs)")
	}
}

func tctx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func testLogger() *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

// rig is a pool on memory with a store on it.
type rig struct {
	t     testing.TB
	dir   string
	loc   user.Location
	poolO user.Options
	o     layer.Options // changed before open
	pool  *user.Pool
	exp   *fuse.Exporter
	store *layer.Store
	log   *slog.Logger
	all   []*Snapshotter

	wrapPool func(engine.Pool) engine.Pool // nil: as it is
}

func newRig(t testing.TB, dataBytes int64) *rig {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-sn-")
	ok(t, err)
	r := &rig{t: t, dir: dir, loc: user.Location{Dir: filepath.Join(dir, "pool")}, log: testLogger()}
	t.Cleanup(func() {
		// In order: a loop device outlives the end of its server, and would be left.
		unmountIn(dir, func(at string) bool { return strings.HasPrefix(at, dir+"/m") })
		if r.store != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			r.store.Nudge()
			if busy, err := r.store.DetachSnaps(ctx); err != nil || len(busy) > 0 {
				t.Errorf("detach at the end: %v, %v", busy, err)
			}
			cancel()
		}
		r.close()
		if c, err := holder.Dial(filepath.Join(dir, "holder.sock")); err == nil {
			c.Quit(true)
			c.Close()
		}
		unmountIn(dir, func(string) bool { return true })
		os.RemoveAll(dir)
	})
	ok(t, os.Mkdir(r.loc.Dir, 0o700))
	helpers := filepath.Join(dir, "helpers")
	ok(t, os.WriteFile(helpers, nil, 0o600))
	os.Setenv(helpersEnv, helpers)
	ok(t, user.Format(context.Background(), r.loc, user.FormatOptions{DataBytes: dataBytes}))
	run := filepath.Join(dir, "run")
	r.o = layer.Options{Root: filepath.Join(dir, "root"), Run: run, BaseSize: 1 << 30, Discard: true, Logger: r.log,
		HelperCommand: []string{"/proc/self/exe", "role-helper"}, HelperTimeout: 30 * time.Second}
	r.poolO.Logger = r.log
	return r
}

// open opens pool, exporter and store.
func (r *rig) open() *rig {
	r.t.Helper()
	ctx := tctx(r.t)
	var err error
	r.pool, err = user.Open(ctx, r.loc, r.poolO)
	ok(r.t, err)
	sock := filepath.Join(r.dir, "holder.sock")
	r.exp, err = fuse.New(fuse.Options{RunDir: r.o.Run, LinkDir: r.links(), Logger: r.log, HolderSocket: sock,
		HolderCommand: []string{"/proc/self/exe", "role-holder", sock}, HelperCommand: []string{"/proc/self/exe", "role-fuse-helper"}})
	ok(r.t, err)
	r.o.Pool, r.o.Exporter = r.pool, r.exp
	if r.wrapPool != nil {
		r.o.Pool = r.wrapPool(r.pool)
	}
	r.store, err = layer.Open(ctx, r.o)
	ok(r.t, err)
	waitFor(r.t, "the base", func() bool { return must[layer.Status](r.t)(r.store.Status(ctx)).BaseReady })
	return r
}

func (r *rig) links() string { return filepath.Join(r.dir, "links") }

func (r *rig) close() {
	if r.store == nil {
		return
	}
	for _, s := range r.all {
		s.Close()
	}
	r.all = nil
	if err := r.store.Close(); err != nil {
		r.t.Errorf("close the store: %v", err)
	}
	if err := r.pool.Close(); err != nil {
		r.t.Errorf("close the pool: %v", err)
	}
	r.store = nil
	if path, err := exec.LookPath("thin_check"); err == nil {
		if out, err := exec.Command(path, r.loc.MetadataPath()).CombinedOutput(); err != nil {
			r.t.Errorf("thin_check: %v\n%s", err, out)
		}
	}
}

// snapshotter makes one with what callers usually want.
func (r *rig) snapshotter(name string, change ...func(*Options)) *Snapshotter {
	r.t.Helper()
	o := Options{Name: name, Store: r.store, ShareLayers: true, Logger: r.log}
	for _, fn := range change {
		fn(&o)
	}
	s, err := New(o)
	ok(r.t, err)
	r.all = append(r.all, s)
	return s
}

// used is how many blocks the pool holds when nothing is on its way any more.
func (r *rig) used() uint64 {
	r.t.Helper()
	ctx := tctx(r.t)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		ok(r.t, r.store.WaitQueue(ctx))
		ok(r.t, r.pool.Commit(ctx))
		st, err := r.pool.Status(ctx)
		ok(r.t, err)
		if st.DataFreeing == 0 && len(r.store.Queue()) == 0 || time.Now().After(end) {
			return st.DataUsed
		}
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func waitFor(t testing.TB, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		ok(t, err)
		return v
	}
}

// serveOn serves a snapshotter on a socket and returns a client of it, as containerd has one.
func serveOn(t testing.TB, sn snapshots.Snapshotter, sock string) (client snapshots.Snapshotter, stop func()) {
	t.Helper()
	l, err := net.Listen("unix", sock)
	ok(t, err)
	srv := NewServer(ServerOptions{Snapshotter: sn, UID: os.Getuid(), Logger: testLogger()})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "mica"), func() {
		conn.Close()
		srv.Stop(time.Second)
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
}

// mountOn mounts and returns what unmounts.
func (r *rig) mountOn(m []mount.Mount) (dir string, unmount func()) {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.dir, "m-")
	ok(r.t, err)
	ok(r.t, mount.All(m, dir))
	done := false
	unmount = func() {
		if !done {
			done = true
			ok(r.t, unix.Unmount(dir, 0))
			ok(r.t, os.Remove(dir))
		}
	}
	return dir, unmount
}

// fill prepares a snapshot, writes files (path: contents) and unmounts.
func (r *rig) fill(sn snapshots.Snapshotter, key, parent string, files map[string]string, opts ...snapshots.Opt) {
	r.t.Helper()
	m, err := sn.Prepare(tctx(r.t), key, parent, opts...)
	ok(r.t, err)
	dir, unmount := r.mountOn(m)
	for name, text := range files {
		writeFile(r.t, filepath.Join(dir, name), text)
	}
	unmount()
}

// layer makes a committed snapshot with files.
func (r *rig) layer(sn snapshots.Snapshotter, name, parent string, files map[string]string, opts ...snapshots.Opt) {
	r.t.Helper()
	r.fill(sn, "extract-1 "+name, parent, files, opts...)
	ok(r.t, sn.Commit(tctx(r.t), name, "extract-1 "+name, opts...))
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	ok(t, os.WriteFile(path, []byte(text), 0o644))
}

// read returns a file's contents as a mount shows it.
func (r *rig) read(m []mount.Mount, name string) string {
	r.t.Helper()
	dir, unmount := r.mountOn(m)
	defer unmount()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return ""
	}
	ok(r.t, err)
	return string(b)
}

// wantClass fails unless an error is of a class and says the words.
func wantClass(t testing.TB, err error, is func(error) bool, words ...string) {
	t.Helper()
	if err == nil || !is(err) {
		t.Errorf("error %v is not of the class that is wanted", err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// unmountIn takes away what a test left mounted below dir.
func unmountIn(dir string, which func(at string) bool) {
	text, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) > 1 && strings.HasPrefix(f[1], dir+"/") && which(f[1]) {
			if unix.Unmount(f[1], 0) != nil {
				unix.Unmount(f[1], unix.MNT_DETACH)
			}
		}
	}
}

// eachFS runs a test on every kind of base file system.
func eachFS(t *testing.T, fn func(t *testing.T, fs string)) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs.xfs"); fs == "xfs" && err != nil {
				t.Skip("SKIPPED: mkfs.xfs is not installed (package xfsprogs)")
			}
			fn(t, fs)
		})
	}
}
