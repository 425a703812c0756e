package layer

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"mica/thin"
)

// What the steps of a container's life cost: commits and flushes are counted, times are shown.
func TestCosts(t *testing.T) { eachFS(t, testCosts) }

func testCosts(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	ok(t, second(s.Create(ctx, CreateOptions{Name: "first", Image: "a"}))) // reserves ids
	ok(t, r.pool.Commit(ctx))
	step := func(what string, most uint64, fn func()) {
		t.Helper()
		a, err := r.pool.Status(ctx)
		ok(t, err)
		begin := time.Now()
		fn()
		took := time.Since(begin)
		b, err := r.pool.Status(ctx)
		ok(t, err)
		n := b.DataFlushes - a.DataFlushes + b.MetaFlushes - a.MetaFlushes
		t.Logf("%-12s %8v  %d commits, %d data and %d metadata flushes", what, took.Round(time.Microsecond),
			b.Commits-a.Commits, b.DataFlushes-a.DataFlushes, b.MetaFlushes-a.MetaFlushes)
		if most > 0 && n > most {
			t.Errorf("%s: %d flushes of the pool, want %d at most", what, n, most)
		}
	}
	for i := range few(3) {
		n := fmt.Sprintf("c%d", i)
		step("create", 3, func() { ok(t, second(s.Create(ctx, CreateOptions{Name: n, Image: "a"}))) })
		var a Attachment
		var err error
		step("attach", 0, func() { a, err = s.Attach(ctx, n, AttachOptions{}); ok(t, err) })
		dir := r.dir + "/m" + n
		ok(t, os.Mkdir(dir, 0o755))
		step("mount", 0, func() { ok(t, s.files.(mounter).Mount(ctx, a.Node, dir, a.FSType, a.MountOptions)) })
		step("write+fsync", 0, func() {
			f, err := os.Create(dir + "/x")
			ok(t, err)
			_, err = f.WriteString("x")
			ok(t, err)
			ok(t, f.Sync())
			ok(t, f.Close())
		})
		step("snapshot", 0, func() { must[Snapshot](t)(s.Snapshot(ctx, n, SnapshotOptions{Name: "s"})) })
		step("unmount", 0, func() { ok(t, s.files.(mounter).Unmount(ctx, dir)) })
		step("detach", 0, func() { ok(t, s.Detach(ctx, n, DetachOptions{})) })
		step("fork 10", 0, func() {
			var names []string
			for k := range 10 {
				names = append(names, fmt.Sprintf("%s-f%d", n, k))
			}
			must[ForkResult](t)(s.Fork(ctx, n, ForkOptions{Names: names}))
		})
		step("rollback", 0, func() { must[Container](t)(s.Rollback(ctx, n, "s")) })
		step("remove", 0, func() { ok(t, s.Remove(ctx, n, RemoveOptions{Snapshots: true})) })
		ok(t, s.WaitQueue(ctx))
	}
}

type mounter interface {
	Mount(ctx context.Context, node, dir, fstype string, options []string) error
	Unmount(ctx context.Context, dir string) error
}

// TestForkCost: a thousand copies cost as many commits and flushes as one.
func TestForkCost(t *testing.T) {
	r := newRig(t)
	r.dataBytes = 64 << 30 // the metadata has room for a thousand devices
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	r.mounted("c", func(dir string) { write(t, dir, "b", "b") })
	var want [3]uint64
	for _, n := range []int{1, 10, 1000} {
		ids := must[[]thin.DevID](t)(s.cat.Alloc(ctx, n)) // what is reserved is not what is measured
		s.cat.Release(ids...)
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprintf("f%d-%d", n, i)
		}
		a, err := r.pool.Status(ctx)
		ok(t, err)
		begin := time.Now()
		must[ForkResult](t)(s.Fork(ctx, "c", ForkOptions{Names: names}))
		took := time.Since(begin)
		b, err := r.pool.Status(ctx)
		ok(t, err)
		got := [3]uint64{b.Commits - a.Commits, b.DataFlushes - a.DataFlushes, b.MetaFlushes - a.MetaFlushes}
		t.Logf("%d copies: %d commits, %d data and %d metadata flushes, %v", n, got[0], got[1], got[2], took.Round(time.Millisecond))
		if n == 1 {
			want = got
		} else if got[0] > want[0]+1 || got[1] > want[1]+1 || got[2] > want[2]+2 {
			t.Errorf("%d copies: %v commits, data and metadata flushes; one copy: %v", n, got, want)
		}
	}
	if m := contents(r, "f1000-999"); m["b"] != "b" {
		t.Errorf("a copy holds %v", m)
	}
}
