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
	"mica/export/fuse"
	"mica/export/holder"
	"mica/internal/recordfs"
	"mica/layer/helper"
)

// The test binary plays the small roles too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "role-") {
		var err error
		switch os.Args[1] {
		case "role-helper":
			err = helper.Run(context.Background(), os.Stdin, os.Stdout, nil)
		case "role-fuse-helper":
			err = fuse.RunHelper(context.Background(), os.Stdin, os.Stdout)
		case "role-holder":
			err = holder.Run(context.Background(), os.Args[2])
		case "role-serve":
			err = serveRole(os.Args[2])
		case "role-recordfs":
			err = recordfs.Serve(os.Args[2], os.Stdin, os.Stdout)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
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
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
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
	dir    string
	loc    user.Location
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
	needRoot(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-layer-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, loc: user.Location{Dir: filepath.Join(dir, "pool")}}
	if err := os.Mkdir(r.loc.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.dataBytes = 8 << 30
	return r
}

func rigOptions(dir string, log *slog.Logger) (Options, fuse.Options) {
	run := filepath.Join(dir, "run")
	return Options{Root: filepath.Join(dir, "root"), Run: run, BaseSize: 2 << 30, Logger: log,
			HelperCommand: []string{"/proc/self/exe", "role-helper"}, HelperTimeout: 30 * time.Second},
		fuse.Options{RunDir: run, LinkDir: filepath.Join(dir, "links"), Logger: log,
			HelperCommand: []string{"/proc/self/exe", "role-fuse-helper"}}
}

// open opens pool, exporter and store.
func (r *rig) open() *Store {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatal(err)
	}
	return r.s
}

func (r *rig) tryOpen() error {
	ctx := tctx(r.t)
	o, fo := rigOptions(r.dir, testLogger(r.t))
	if r.o.BaseSize != 0 {
		o.BaseSize = r.o.BaseSize
	}
	o.FSType, o.NBD, o.AcceptPool, o.NoTrim = r.o.FSType, r.o.NBD, r.o.AcceptPool, r.o.NoTrim
	o.Discard = r.o.Discard
	if r.holder {
		fo.HolderSocket = filepath.Join(r.dir, "holder.sock")
		fo.HolderCommand = []string{"/proc/self/exe", "role-holder", fo.HolderSocket}
	}
	if _, err := os.Stat(r.loc.DataPath()); err != nil {
		if err := user.Format(ctx, r.loc, user.FormatOptions{DataBytes: r.dataBytes}); err != nil {
			return err
		}
	}
	var err error
	if r.pool, err = user.Open(ctx, r.loc, user.Options{Logger: o.Logger, NoSpaceTimeout: r.noSpaceWait}); err != nil {
		return err
	}
	e, err := fuse.New(fo)
	if err != nil {
		r.pool.Close()
		return err
	}
	o.Pool, o.Exporter = r.pool, e
	if r.wrap != nil {
		o.Pool = r.wrap(r.pool)
	}
	r.s, err = open(ctx, o, nil, r.fault)
	if err != nil {
		e.Close()
		r.pool.Close()
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
	if err := r.pool.Close(); err != nil {
		r.t.Errorf("close the pool: %v", err)
	}
	r.s = nil
	if path, err := exec.LookPath("thin_check"); err == nil {
		if out, err := exec.Command(path, r.loc.MetadataPath()).CombinedOutput(); err != nil {
			r.t.Errorf("thin_check: %v\n%s", err, out)
		}
	}
}

func (r *rig) reopen() *Store {
	r.t.Helper()
	r.close()
	return r.open()
}

// used is what the pool holds, in blocks, when nothing is on its way any more.
func (r *rig) used() uint64 {
	r.t.Helper()
	ctx := tctx(r.t)
	if err := r.s.WaitQueue(ctx); err != nil {
		r.t.Fatal(err)
	}
	if err := r.pool.Commit(ctx); err != nil {
		r.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		st, err := r.pool.Status(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		if st.DataFreeing == 0 || time.Now().After(end) {
			return st.DataUsed
		}
	}
}

func must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
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
