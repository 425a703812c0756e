package layer

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
