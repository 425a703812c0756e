package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/engine/user"
	"mica/internal/recordfs"
	"mica/internal/storetest"
)

// Short names for what the tests say all the time.
var (
	ok       = storetest.OK
	tctx     = storetest.Context
	needRoot = storetest.NeedRoot
	eachFS   = storetest.EachFS
	waitFor  = storetest.WaitFor
)

func must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return storetest.Must[T](t)
}

func TestMain(m *testing.M) {
	storetest.PlayRole(map[string]func(string) error{
		"serve":    serveRole,
		"recordfs": func(dir string) error { return recordfs.Serve(dir, os.Stdin, os.Stdout) },
	})
	// The race detector makes every process that ends wait for a second.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func testLogger(t testing.TB) *slog.Logger {
	level := slog.LevelError
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// rig is a real pool on memory, with the FUSE exporter and a store on it.
type rig struct {
	t      testing.TB
	host   *storetest.Host
	dir    string
	pool   *user.Pool
	s      *Store
	o      Options // changed before open
	holder bool
	fault  func(string) error
	mounts []string

	dataBytes   int64 // of the pool
	noSpaceWait time.Duration
	wrap        func(engine.Pool) engine.Pool // nil: as it is
}

func newRig(t testing.TB) *rig {
	t.Helper()
	h := storetest.NewHost(t, "layer")
	return &rig{t: t, host: h, dir: h.Dir, dataBytes: 8 << 30}
}

// rigOptions are those of a store in a directory, but for what is below it.
func rigOptions(dir string, log *slog.Logger) Options {
	return Options{Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"), BaseSize: 2 << 30, Logger: log,
		HelperCommand: storetest.Role("helper"), HelperTimeout: 30 * time.Second}
}

// open opens pool, exporter and store.
func (r *rig) open() *Store {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatal(err)
	}
	return r.s
}

// openImage opens, and imports an image "a" with a file "a" that says "a".
func (r *rig) openImage() (*Store, context.Context) {
	r.t.Helper()
	s := r.open()
	importImage(r.t, s, "a", []file{{name: "a", data: "a"}})
	return s, tctx(r.t)
}

func (r *rig) tryOpen() error {
	ctx := tctx(r.t)
	o := rigOptions(r.dir, testLogger(r.t))
	if r.o.BaseSize != 0 {
		o.BaseSize = r.o.BaseSize
	}
	o.FSType, o.NBD, o.AcceptPool, o.NoTrim = r.o.FSType, r.o.NBD, r.o.AcceptPool, r.o.NoTrim
	o.Discard = r.o.Discard
	if err := r.host.Format(r.dataBytes); err != nil {
		return err
	}
	r.host.Holder = r.holder
	e, err := r.host.Open(ctx, user.Options{NoSpaceTimeout: r.noSpaceWait}, o.Logger)
	if err != nil {
		return err
	}
	r.pool = r.host.Pool
	o.Pool, o.Exporter = r.pool, e
	if r.wrap != nil {
		o.Pool = r.wrap(r.pool)
	}
	r.s, err = open(ctx, o, nil, r.fault)
	if err != nil {
		e.Close()
		r.host.Close()
		return err
	}
	r.t.Cleanup(func() {
		// Before the serving ends: an unmount needs it.
		for _, dir := range r.mounts {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
		r.close()
	})
	return nil
}

// close closes store and pool, and holds thin_check against what is left.
func (r *rig) close() {
	r.t.Helper()
	if r.s == nil {
		return
	}
	if err := r.s.Close(); err != nil && r.fault == nil {
		r.t.Errorf("close the store: %v", err)
	}
	r.s = nil
	r.host.Close()
}

func (r *rig) reopen() *Store {
	r.t.Helper()
	r.close()
	return r.open()
}

// used is what the pool holds, in blocks, when nothing is on its way any more.
func (r *rig) used() uint64 {
	r.t.Helper()
	return r.host.Used(r.s.WaitQueue, func() bool { return true })
}

// file is an entry of a test layer: content, or a whiteout ("name" with no content and del).
type file struct {
	name string
	data string
	del  bool
}

func layerTar(t testing.TB, files ...file) (tarball []byte, diffID string) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		name := f.name
		if f.del {
			dir, base := filepath.Split(name)
			name = dir + ".wh." + base
		}
		ok(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(1_600_000_000, 0)}))
		_, err := io.WriteString(w, f.data)
		ok(t, err)
	}
	ok(t, w.Close())
	sum := sha256.Sum256(buf.Bytes())
	return buf.Bytes(), "sha256:" + hex.EncodeToString(sum[:])
}

func chainOf(parent, diffID string) string {
	if parent == "" {
		return diffID
	}
	sum := sha256.Sum256([]byte(parent + " " + diffID))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// importImage makes an image of layers, each a list of files.
func importImage(t testing.TB, s *Store, name string, layers ...[]file) Image {
	t.Helper()
	ctx := tctx(t)
	im := must[Import](t)(s.BeginImport(ctx))
	chain := ""
	var ids []string
	for _, files := range layers {
		tarball, diff := layerTar(t, files...)
		parent := chain
		chain = chainOf(parent, diff)
		ids = append(ids, `"`+diff+`"`)
		_, err := im.ApplyLayer(ctx, LayerSpec{ParentChain: parent, ChainID: chain, DiffID: diff}, bytes.NewReader(tarball))
		ok(t, err)
	}
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%s]},"x":"kept"}`, strings.Join(ids, ","))
	sum := sha256.Sum256([]byte(config))
	return must[Image](t)(im.Commit(ctx, ImageSpec{Name: name, ChainID: chain, Config: []byte(config),
		Digest: "sha256:" + hex.EncodeToString(sum[:]), Platform: "linux/amd64"}))
}

func create(t testing.TB, s *Store, name, image string) Container {
	t.Helper()
	c, created, err := s.Create(tctx(t), CreateOptions{Name: name, Image: image})
	ok(t, err)
	if !created {
		t.Fatalf("container %s was there", name)
	}
	return c
}

// mounted attaches and mounts a container and calls fn with the directory.
func (r *rig) mounted(name string, fn func(dir string)) {
	r.t.Helper()
	dir := r.mount(name)
	fn(dir)
	r.unmount(name, dir)
}

func (r *rig) mount(name string) string {
	r.t.Helper()
	ctx := tctx(r.t)
	a := must[Attachment](r.t)(r.s.Attach(ctx, name, AttachOptions{}))
	dir, err := os.MkdirTemp(r.dir, "mnt-")
	ok(r.t, err)
	out, err := exec.Command("mount", "-t", a.FSType, "-o", strings.Join(a.MountOptions, ","), a.Link, dir).CombinedOutput()
	if err != nil {
		r.t.Fatalf("mount %s: %v\n%s", a.Link, err, out)
	}
	r.mounts = append(r.mounts, dir)
	ok(r.t, r.s.NoteMount(ctx, name, dir))
	return dir
}

func (r *rig) unmount(name, dir string) {
	r.t.Helper()
	ok(r.t, unix.Unmount(dir, 0))
	ok(r.t, r.s.Detach(tctx(r.t), name, DetachOptions{}))
}

func write(t testing.TB, dir, name, data string) {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
	ok(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644))
}

// tree reads all files below dir: path to content.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	m := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		rel, _ := filepath.Rel(dir, p)
		m[rel] = string(b)
		return err
	})
	ok(t, err)
	return m
}

func contents(r *rig, name string) (m map[string]string) {
	r.t.Helper()
	r.mounted(name, func(dir string) { m = tree(r.t, dir) })
	return m
}

func wantErr(t testing.TB, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

func quietLogger() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// few is n, or 1 with the race detector, where all takes several times as long.
func few(n int) int {
	if raceEnabled {
		return 1
	}
	return n
}
