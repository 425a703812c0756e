package layer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine/user"
	"mica/thin"
)

// apply imports one layer of a tar and returns the error.
func apply(t testing.TB, s *Store, tarball []byte, diff string) error {
	t.Helper()
	ctx := tctx(t)
	im := must[Import](t)(s.BeginImport(ctx))
	defer im.Abort(ctx)
	_, err := im.ApplyLayer(ctx, LayerSpec{ChainID: diff, DiffID: diff}, bytes.NewReader(tarball))
	return err
}

// TestImportIntoFullPool: writes of containers wait for ten minutes here. An import does not: into a
// full pool it is refused at once, and one for which the pool has too little room fails after some
// seconds. Both say why and leave nothing.
func TestImportIntoFullPool(t *testing.T) {
	r := newRig(t)
	r.dataBytes, r.noSpaceWait = 48<<20, 10*time.Minute
	r.o.BaseSize = 512 << 20
	s := r.open()
	importImage(t, s, "small", []file{{name: "x", data: "x"}})
	create(t, s, "a", "small")
	before := r.used()
	big, diff := layerTar(t, file{name: "big", data: strings.Repeat("0123456789abcdef", 4<<20)})
	begin := time.Now()
	err := apply(t, s, big, diff)
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "pool") {
		t.Errorf("64 MiB into a pool of 48: %v, want ErrNoSpace of the pool", err)
	}
	if d := time.Since(begin); d > 60*time.Second {
		t.Errorf("it failed after %v", d)
	}
	if after := r.used(); after != before {
		t.Errorf("%d data blocks are used afterwards, %d before", after, before)
	}
	// Now fill the pool to the last block.
	dir := r.mount("a")
	out, err := exec.Command("dd", "if=/dev/urandom", "of="+filepath.Join(dir, "f"), "bs=64k", "count=640", "oflag=direct", "status=none").CombinedOutput()
	if err != nil {
		t.Fatalf("dd: %v: %s", err, out)
	}
	st := must[string](t)(func() (string, error) {
		st, err := r.pool.Status(tctx(t))
		return fmt.Sprint(st.DataBlocks - st.DataUsed), err
	}())
	t.Logf("%s data blocks free", st)
	fill := exec.Command("dd", "if=/dev/urandom", "of="+filepath.Join(dir, "g"), "bs=64k", "oflag=direct", "status=none")
	ok(t, fill.Start())
	defer fill.Wait()
	defer fill.Process.Kill()
	waitFor(t, "a full pool", func() bool {
		st, err := r.pool.Status(tctx(t))
		return err == nil && st.Mode == "out_of_data_space" && st.WaitingForSpace > 0
	})
	small, diff := layerTar(t, file{name: "y", data: "y"})
	begin = time.Now()
	err = apply(t, s, small, diff)
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "data blocks") {
		t.Errorf("import into a full pool: %v, want ErrNoSpace with numbers", err)
	}
	if d := time.Since(begin); d > 4*time.Second {
		t.Errorf("it failed after %v, want at once", d)
	}
	ok(t, r.pool.GrowData(tctx(t), 512<<20))
	ok(t, fill.Process.Kill())
	ok(t, apply(t, s, small, diff))
	r.unmount("a", dir)
}

// TestCatalogDiskFull lets the file system under the catalog run full. What does not fit is refused
// with a clear error and undone; removing always works, and makes room; nothing that was acknowledged
// is lost, now or after the next start.
func TestCatalogDiskFull(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	ok(t, os.Mkdir(disk, 0o700))
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("SKIPPED: cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(disk, unix.MNT_DETACH)
		}
	})
	const block, blocks = 64 << 10, 4000
	meta, data := dev.NewMem(8<<20), dev.NewMem(blocks*block)
	ok(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: block, DataBlocks: blocks}))
	var pool *user.Pool
	p := &storePower{t: t}
	openAll := func() *Store {
		t.Helper()
		var err error
		meta, data = meta.Clone(), data.Clone()
		pool, err = user.New(meta, data, user.Options{Logger: quietLogger()})
		ok(t, err)
		o := p.options(filepath.Join(dir, "root"), filepath.Join(disk, "catalog.db"), pool)
		s, err := open(tctx(t), o, fakeFiles{p.e}, nil)
		ok(t, err)
		return s
	}
	s := openAll()
	ctx := tctx(t)
	importFake(t, s)
	labels := map[string]string{"filler": strings.Repeat("x", 3000)}
	names := map[string]bool{}
	devices := func() int { return len(must[[]thin.DeviceInfo](t)(pool.Devices(ctx))) }
	consistent := func(what string) {
		t.Helper()
		ok(t, s.WaitQueue(ctx))
		if n := devices(); n != 2+len(names) {
			t.Fatalf("%s: %d devices, want the base, the image's layer and %d containers", what, n, len(names))
		}
		if got := len(must[[]Container](t)(s.Containers(ctx, Filter{}))); got != len(names) {
			t.Fatalf("%s: %d containers, want %d", what, got, len(names))
		}
		if st := must[Status](t)(s.Status(ctx)); st.ReadOnly != "" || len(st.Broken)+len(st.Foreign) > 0 {
			t.Fatalf("%s: status %+v", what, st)
		}
	}
	seq := 0
	fill := func() (refused error) {
		t.Helper()
		for i := 0; i < 2000 && refused == nil; i++ {
			name := fmt.Sprintf("c%d", seq)
			seq++
			if _, _, refused = s.Create(ctx, CreateOptions{Name: name, Image: "img", Labels: labels}); refused == nil {
				names[name] = true
			}
		}
		return refused
	}
	for round := range 5 {
		err := fill()
		if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "catalog") {
			t.Fatalf("round %d: %v, want ErrNoSpace of the catalog", round, err)
		}
		consistent("full")
		t.Logf("%d containers fit", len(names))
		n := 0
		for name := range names {
			if err := s.Remove(ctx, name, RemoveOptions{}); err != nil {
				t.Fatalf("round %d: remove number %d with a full disk: %v", round, n, err)
			}
			delete(names, name)
			if n++; n == 20 {
				break
			}
		}
		consistent("after removals")
		if round == 2 { // also over a restart
			ok(t, errors.Join(s.Close(), pool.Close()))
			s = openAll()
			consistent("after a restart")
		}
	}
	if err := fill(); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	ok(t, unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT, "size=64m"))
	ok(t, second(s.Create(ctx, CreateOptions{Name: "again", Image: "img", Labels: labels})))
	names["again"] = true
	consistent("with room again")
	ok(t, errors.Join(s.Close(), pool.Close()))
	s = openAll()
	consistent("at the end")
	ok(t, errors.Join(s.Close(), pool.Close()))
}

// TestInodesRunOut: a layer with more files than the base has inodes is refused with an error that
// says so, and leaves nothing; what has fewer goes in.
func TestInodesRunOut(t *testing.T) {
	r := newRig(t)
	r.o.BaseSize = 64 << 20
	s := r.open()
	importImage(t, s, "small", []file{{name: "x", data: "x"}})
	before := r.used()
	many := func(n int) (tarball []byte, diff string) {
		var files []file
		for i := range n {
			files = append(files, file{name: fmt.Sprintf("d%d/f%d", i%50, i)})
		}
		return layerTar(t, files...)
	}
	tarball, diff := many(6000)
	err := apply(t, s, tarball, diff)
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "inode") {
		t.Errorf("6000 files on a base of 64 MiB: %v, want ErrNoSpace that names inodes", err)
	}
	if after := r.used(); after != before {
		t.Errorf("%d data blocks are used afterwards, %d before", after, before)
	}
	tarball, diff = many(1000)
	ok(t, apply(t, s, tarball, diff))
}
