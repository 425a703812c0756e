package snapshotter

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// BenchmarkLife is the life of a container: prepare, mount, write and fsync, unmount, remove.
func BenchmarkLife(b *testing.B) {
	r := newRig(b, 8<<30).open()
	s := r.snapshotter("mica")
	ctx := tctx(b)
	r.layer(s, "p", "", map[string]string{"a": "a"})
	dir := filepath.Join(r.dir, "mnt")
	ok(b, os.Mkdir(dir, 0o755))
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprint("k", i)
		m := must[[]mount.Mount](b)(s.Prepare(ctx, key, "p"))
		ok(b, mount.All(m, dir))
		f, err := os.Create(filepath.Join(dir, "x"))
		ok(b, err)
		_, err = f.WriteString("x")
		ok(b, err)
		ok(b, f.Sync())
		ok(b, f.Close())
		ok(b, unix.Unmount(dir, 0))
		ok(b, s.Remove(ctx, key))
	}
}

// BenchmarkPrepare100 prepares 100 snapshots at once, and removes them; the commits are shared.
func BenchmarkPrepare100(b *testing.B) {
	r := newRig(b, 8<<30).open()
	s := r.snapshotter("mica")
	ctx := tctx(b)
	r.layer(s, "p", "", map[string]string{"a": "a"})
	all := func(fn func(key string) error) {
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				if err := fn(fmt.Sprint("k", i)); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
	}
	var commits uint64
	for b.Loop() {
		before, err := r.pool.Status(ctx)
		ok(b, err)
		all(func(key string) error { _, err := s.Prepare(ctx, key, "p"); return err })
		after, err := r.pool.Status(ctx)
		ok(b, err)
		commits += after.Commits - before.Commits
		b.StopTimer()
		all(func(key string) error { return s.Remove(ctx, key) })
		ok(b, r.store.WaitQueue(ctx))
		b.StartTimer()
	}
	b.ReportMetric(float64(commits)/float64(b.N), "commits/op")
}
