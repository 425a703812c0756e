package snapshotter

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
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
	"mica/export/holder"
	"mica/internal/storetest"
	"mica/layer"
	"mica/layer/helper"
)

// Short names for what the tests say all the time.
var (
	ok         = storetest.OK
	tctx       = storetest.Context
	eachFS     = storetest.EachFS
	waitFor    = storetest.WaitFor
	testLogger = storetest.Logger
)

func must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return storetest.Must[T](t)
}

func TestMain(m *testing.M) {
	storetest.PlayRole(map[string]func(string) error{
		"helper": func(string) error {
			noteHelper()
			return helper.Run(context.Background(), os.Stdin, os.Stdout, nil)
		},
		"client": clientRole,
	})
	os.Exit(m.Run())
}

// rig is a pool on memory with a store on it.
type rig struct {
	t     testing.TB
	host  *storetest.Host
	dir   string
	poolO user.Options
	o     layer.Options // changed before open
	pool  *user.Pool
	store *layer.Store
	log   *slog.Logger
	all   []*Snapshotter

	wrapPool func(engine.Pool) engine.Pool // nil: as it is
}

func newRig(t testing.TB, dataBytes int64) *rig {
	t.Helper()
	h := storetest.NewHost(t, "sn")
	h.Holder = true
	r := &rig{t: t, host: h, dir: h.Dir, log: testLogger()}
	t.Cleanup(func() {
		// In order: a loop device outlives the end of its server, and would be left.
		storetest.UnmountIn(h.Dir, func(at string) bool { return strings.HasPrefix(at, h.Dir+"/m") })
		if r.store != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			r.store.Nudge()
			if busy, err := r.store.DetachSnaps(ctx); err != nil || len(busy) > 0 {
				t.Errorf("detach at the end: %v, %v", busy, err)
			}
			cancel()
		}
		r.close()
		if c, err := holder.Dial(h.HolderSocket()); err == nil {
			c.Quit(true)
			c.Close()
		}
		storetest.UnmountIn(h.Dir, func(string) bool { return true })
	})
	helpers := filepath.Join(h.Dir, "helpers")
	ok(t, os.WriteFile(helpers, nil, 0o600))
	os.Setenv(helpersEnv, helpers)
	ok(t, h.Format(dataBytes))
	r.o = layer.Options{Root: filepath.Join(h.Dir, "root"), Run: h.Run, BaseSize: 1 << 30, Discard: true, Logger: r.log,
		HelperCommand: storetest.Role("helper"), HelperTimeout: 30 * time.Second}
	return r
}

// openRig makes a rig of 1 GiB with a kind of file system ("": the usual one) and opens it, with a
// snapshotter on it.
func openRig(t testing.TB, fs string) (*rig, *Snapshotter, context.Context) {
	t.Helper()
	r := newRig(t, 1<<30)
	r.o.FSType = fs
	r.open()
	return r, r.snapshotter("mica"), tctx(t)
}

// open opens pool, exporter and store.
func (r *rig) open() *rig {
	r.t.Helper()
	ctx := tctx(r.t)
	e, err := r.host.Open(ctx, r.poolO, r.log)
	ok(r.t, err)
	r.pool = r.host.Pool
	r.o.Pool, r.o.Exporter = r.pool, e
	if r.wrapPool != nil {
		r.o.Pool = r.wrapPool(r.pool)
	}
	r.store, err = layer.Open(ctx, r.o)
	ok(r.t, err)
	waitFor(r.t, "the base", func() bool { return must[layer.Status](r.t)(r.store.Status(ctx)).BaseReady })
	return r
}

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
	r.store = nil
	r.host.Close()
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
	return r.host.Used(r.store.WaitQueue, func() bool { return len(r.store.Queue()) == 0 })
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
