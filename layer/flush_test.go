package layer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine/user"
	"mica/internal/recordfs"
	"mica/layer/internal/fake"
	"mica/thin"
)

// TestFlushes counts all that an operation waits for a disk for: data and metadata of the pool, and
// the catalog's file. A prepare takes five at most, many at the same time take a few for all of them,
// a fork of 1,000 as many as a fork of one.
func TestFlushes(t *testing.T) {
	needRoot(t)
	ctx := tctx(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-flush-")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	clock, mnt, end := recordedFiles(t, dir)
	const block, blocks = 64 << 10, 1 << 20
	meta, data := dev.NewMem(16384*4096), dev.NewMem(blocks*block)
	ok(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: block, DataBlocks: blocks}))
	countMeta, countData := dev.NewFault(meta), dev.NewFault(data)
	pool, err := user.New(countMeta, countData, user.Options{CommitInterval: time.Hour, Logger: quietLogger()})
	ok(t, err)
	e := fake.NewExporter()
	s, err := open(ctx, Options{Root: filepath.Join(dir, "root"), Run: filepath.Join(dir, "run"), Catalog: filepath.Join(mnt, "catalog.db"),
		Pool: pool, Exporter: e, BaseSize: 64 << 20, Logger: quietLogger()}, fakeFiles{e}, nil)
	ok(t, err)
	importFake(t, s)
	n := must[*SnapStore](t)(s.Snaps("sn", SnapOptions{}))
	prepare := func(key, parent string) error {
		_, err := n.Prepare(ctx, SnapSpec{Name: key, Parent: parent})
		return err
	}
	ok(t, prepare("extract", ""))
	ok(t, n.Commit(ctx, "parent", "extract", "", nil))
	create(t, s, "box", "img")

	type span struct {
		what       string
		begin, end int64
		pool       int64
	}
	var spans []span
	measure := func(what string, do func()) {
		t.Helper()
		ids := must[[]thin.DevID](t)(s.cat.Alloc(ctx, 1000)) // ids are reserved in batches, and here before
		s.cat.Release(ids...)
		flushes := func() int64 { return countMeta.Counts().Flushes + countData.Counts().Flushes }
		before, begin := flushes(), clock.Add(1)
		do()
		spans = append(spans, span{what, begin, clock.Add(1), flushes() - before})
	}
	for i := range 5 {
		measure("prepare", func() { ok(t, prepare(fmt.Sprint("p", i), "parent")) })
	}
	measure("100 prepares", func() {
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				if err := prepare(fmt.Sprint("many", i), "parent"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	for _, k := range []int{1, 1000} {
		measure(fmt.Sprint("fork of ", k), func() {
			o := ForkOptions{}
			for i := range k {
				o.Names = append(o.Names, fmt.Sprintf("f%d-%d", k, i))
			}
			must[ForkResult](t)(s.Fork(ctx, "box", o))
		})
	}
	ok(t, errors.Join(s.Close(), pool.Close(), end()))

	total := map[string]int64{}
	for _, sp := range spans {
		file := int64(0)
		for _, r := range must[[]dev.CrashRecord](t)(recordfs.Load(dir, "catalog.db")) {
			if r.Flush && int64(r.Begin) > sp.begin && int64(r.Begin) < sp.end {
				file++
			}
		}
		t.Logf("%s: %d flushes of the pool, %d of the catalog", sp.what, sp.pool, file)
		if file < 2 || sp.pool < 2 {
			t.Errorf("%s: fewer flushes than what is durable needs", sp.what)
		}
		total[sp.what] = max(total[sp.what], sp.pool+file)
	}
	for what, most := range map[string]int64{"prepare": 5, "100 prepares": 40, "fork of 1": 8, "fork of 1000": total["fork of 1"] + 1} {
		if total[what] > most {
			t.Errorf("%s: %d flushes, want %d at most", what, total[what], most)
		}
	}
}
