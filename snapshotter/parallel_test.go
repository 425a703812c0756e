package snapshotter

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// TestParallelPrepares: 100 snapshots that are prepared at the same time share a few commits, and nothing
// of their devices is synced for it.
func TestParallelPrepares(t *testing.T) {
	r := newRig(t, 1<<30).open()
	s := r.snapshotter("mica")
	client, stop := serveOn(t, s, filepath.Join(r.dir, "sn.sock"))
	defer stop()
	r.layer(s, "p", "", map[string]string{"a": "text"})
	ctx := tctx(t)
	for what, sn := range map[string]snapshots.Snapshotter{"library": s, "socket": client} {
		a, err := r.pool.Status(ctx)
		ok(t, err)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				if _, err := sn.Prepare(ctx, fmt.Sprintf("%s%d", what, i), "p"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		b, err := r.pool.Status(ctx)
		ok(t, err)
		if n := b.Commits - a.Commits; n > 20 {
			t.Errorf("%s: %d commits, want 20 at most; one each would be 100", what, n)
		}
		if n := b.DataFlushes - a.DataFlushes; n > 0 {
			t.Errorf("%s: %d data flushes, want none: nothing was written", what, n)
		}
		t.Logf("%s: 100 prepares: %d commits, %d data and %d metadata flushes", what, b.Commits-a.Commits, b.DataFlushes-a.DataFlushes, b.MetaFlushes-a.MetaFlushes)
	}
}
