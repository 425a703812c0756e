package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/layer"
)

// numbers appends numbers to a file until stop is called, each durable before the next.
func numbers(t testing.TB, path string) (stop func() int) {
	quit, done := make(chan struct{}), make(chan int)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	ok(t, err)
	go func() {
		n := 0
		defer func() { f.Close(); done <- n }()
		for {
			select {
			case <-quit:
				return
			default:
			}
			if _, err := fmt.Fprintln(f, n+1); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			if err := f.Sync(); err != nil {
				t.Errorf("sync: %v", err)
				return
			}
			n++
		}
	}()
	return func() int { close(quit); return <-done }
}

// wantPrefix fails unless text is the numbers from 1 to some n.
func wantPrefix(t testing.TB, text string) int {
	t.Helper()
	lines := strings.Fields(text)
	for i, l := range lines {
		if l != strconv.Itoa(i+1) {
			t.Fatalf("line %d is %q", i+1, l)
		}
	}
	return len(lines)
}

// syncFS makes a file system durable; only this one, there may be others that hang.
func syncFS(t testing.TB, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	ok(t, err)
	defer f.Close()
	ok(t, unix.Syncfs(int(f.Fd())))
}

// TestCommitMounted: what is mounted and written to is committed as of a moment; the mount goes on,
// and its device goes when it is unmounted.
func TestCommitMounted(t *testing.T) { eachFS(t, testCommitMounted) }

func testCommitMounted(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "p", "", map[string]string{"a": "a"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	dir, unmount := r.mountOn(m)
	stop := numbers(t, filepath.Join(dir, "n"))
	waitFor(t, "some lines", func() bool { b, _ := os.ReadFile(filepath.Join(dir, "n")); return len(b) > 500 })
	before, err := os.ReadFile(filepath.Join(dir, "n"))
	ok(t, err)
	begin := time.Now()
	ok(t, s.Commit(ctx, "c", "k"))
	t.Logf("commit of what is written to: %v", time.Since(begin).Round(time.Millisecond))
	_, err = s.Stat(ctx, "k")
	wantClass(t, err, errdefs.IsNotFound)
	n := stop() // the mount goes on
	v := must[[]mount.Mount](t)(s.View(ctx, "v", "c"))
	got := wantPrefix(t, r.read(v, "n"))
	t.Logf("%d lines before the call, %d in the commit, %d at the end", strings.Count(string(before), "\n"), got, n)
	if got < strings.Count(string(before), "\n") || got > n {
		t.Errorf("%d lines in the commit, %d before it, %d at the end", got, strings.Count(string(before), "\n"), n)
	}
	if u := must[snapshots.Usage](t)(s.Usage(ctx, "c")); u.Size < 64<<10 {
		t.Errorf("usage %+v", u)
	}
	waitFor(t, "the holder in the queue", func() bool {
		for _, q := range r.store.Queue() {
			if q.Kind == "detach" && q.Object == "snap/mica/k" && strings.Contains(q.LastErr, dir) {
				return true
			}
		}
		return false
	})
	unmount()
	waitFor(t, "an empty queue", func() bool { return len(r.store.Queue()) == 0 })
	// The committed one is clean: a read-only mount without its journal, and a check, say so.
	must[[]mount.Mount](t)(s.Prepare(ctx, "k", "c"))
}

// TestRemoveMounted: removing what is mounted succeeds at once; its device and the export of its views
// are taken away when they are let go, and the queue names who holds them until then.
func TestRemoveMounted(t *testing.T) { eachFS(t, testRemoveMounted) }

func testRemoveMounted(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	empty := r.used()
	r.layer(s, "p", "", map[string]string{"a": "text"})
	dir, unmount := r.mountOn(must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p")))
	vdir, unmountView := r.mountOn(must[[]mount.Mount](t)(s.View(ctx, "v", "p")))
	begin := time.Now()
	ok(t, s.Remove(ctx, "k"))
	ok(t, s.Remove(ctx, "v"))
	ok(t, s.Remove(ctx, "p")) // its device is held by the view's mount
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("removing three took %v", d)
	}
	writeFile(t, filepath.Join(dir, "still"), "works")
	if b, err := os.ReadFile(filepath.Join(vdir, "a")); err != nil || string(b) != "text" {
		t.Errorf("the view's mount shows %q, %v", b, err)
	}
	waitFor(t, "the holders in the queue", func() bool {
		all := fmt.Sprintf("%+v", r.store.Queue())
		return strings.Contains(all, dir) && strings.Contains(all, vdir)
	})
	// The names are free.
	r.layer(s, "p", "", map[string]string{"a": "other"})
	v := must[[]mount.Mount](t)(s.View(ctx, "v", "p"))
	if got := r.read(v, "a"); got != "other" {
		t.Errorf("the new view shows %q", got)
	}
	ok(t, s.Remove(ctx, "v"))
	ok(t, s.Remove(ctx, "p"))
	unmount()
	unmountView()
	ok(t, s.Cleanup(ctx))
	waitFor(t, "an empty queue", func() bool { return len(r.store.Queue()) == 0 })
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning", n, empty)
	}
}

// TestViewAgain: a view of a parent whose last view was removed while mounted shares what is still
// there, and keeps it.
func TestViewAgain(t *testing.T) {
	r, s, ctx := openRig(t, "")
	r.layer(s, "p", "", map[string]string{"a": "text"})
	_, unmount := r.mountOn(must[[]mount.Mount](t)(s.View(ctx, "v", "p")))
	ok(t, s.Remove(ctx, "v"))
	w := must[[]mount.Mount](t)(s.View(ctx, "w", "p"))
	unmount()
	time.Sleep(50 * time.Millisecond)
	ok(t, s.Cleanup(ctx))
	if got := r.read(w, "a"); got != "text" {
		t.Errorf("the view shows %q", got)
	}
	ok(t, s.Remove(ctx, "w"))
	waitFor(t, "an empty queue", func() bool { return len(r.store.Queue()) == 0 })
	if n := len(r.store.SnapNodes()); n != 0 {
		t.Errorf("%d nodes are left", n)
	}
}

// TestRestart: nodes, mounts and what was being removed survive the store; a view's shared export
// does too. What was counted is right at the first call.
func TestRestart(t *testing.T) { eachFS(t, testRestart) }

func testRestart(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	empty := r.used()
	r.layer(s, "p", "", map[string]string{"a": "text"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	dir, unmount := r.mountOn(m)
	writeFile(t, filepath.Join(dir, "big"), strings.Repeat("x", 3<<20))
	syncFS(t, dir)
	idle := must[[]mount.Mount](t)(s.Prepare(ctx, "idle", "p"))
	gone, unmountGone := r.mountOn(must[[]mount.Mount](t)(s.Prepare(ctx, "gone", "p")))
	v := must[[]mount.Mount](t)(s.View(ctx, "v", "p"))
	vdir, unmountView := r.mountOn(v)
	ok(t, s.Remove(ctx, "gone"))
	usage := must[snapshots.Usage](t)(s.Usage(ctx, "k")).Size
	layerUsage := must[snapshots.Usage](t)(s.Usage(ctx, "p")).Size
	if usage < 3<<20 {
		t.Errorf("usage %d after 3 MiB were written", usage)
	}

	again := func() {
		t.Helper()
		r.close()
		r.open()
		s = r.snapshotter("mica")
		for key, want := range map[string][]mount.Mount{"k": m, "idle": idle} {
			if got := must[[]mount.Mount](t)(s.Mounts(ctx, key)); got[0].Source != want[0].Source {
				t.Errorf("%s: source %s, before %s", key, got[0].Source, want[0].Source)
			}
		}
		writeFile(t, filepath.Join(dir, "after"), "works")
		writeFile(t, filepath.Join(gone, "after"), "works")
		if b, err := os.ReadFile(filepath.Join(vdir, "a")); err != nil || string(b) != "text" {
			t.Errorf("the view's mount shows %q, %v", b, err)
		}
		if got := must[snapshots.Usage](t)(s.Usage(ctx, "p")).Size; got != layerUsage {
			t.Errorf("usage of the layer %d, before %d", got, layerUsage)
		}
		if got := must[snapshots.Usage](t)(s.Usage(ctx, "k")).Size; got < usage {
			t.Errorf("usage %d, before %d", got, usage)
		}
	}
	again()
	if got := must[[]mount.Mount](t)(s.Mounts(ctx, "v")); got[0].Source != v[0].Source {
		t.Errorf("view: source %s, before %s", got[0].Source, v[0].Source)
	}
	ok(t, s.Remove(ctx, "v")) // while mounted
	again()
	unmountView()
	unmountGone()
	unmount()
	ok(t, s.Commit(ctx, "c", "k"))
	if got := must[snapshots.Usage](t)(s.Usage(ctx, "c")).Size; got < usage || got > usage+1<<20 {
		t.Errorf("usage of the committed one %d, of the active one %d", got, usage)
	}
	again2 := must[[]mount.Mount](t)(s.View(ctx, "w", "c"))
	if got := r.read(again2, "after"); got != "works" {
		t.Errorf("the commit holds %q", got)
	}
	for _, k := range []string{"w", "c", "idle", "p"} {
		ok(t, s.Remove(ctx, k))
	}
	if n := r.used(); n != empty {
		t.Errorf("pool holds %d blocks, %d at the beginning; %+v", n, empty, r.store.Queue())
	}
}

// TestTakenAway: a node that somebody took away comes back when its mounts are asked for.
func TestTakenAway(t *testing.T) { eachFS(t, testTakenAway) }

func testTakenAway(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "p", "", map[string]string{"a": "text"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	v := must[[]mount.Mount](t)(s.View(ctx, "v", "p"))
	for _, x := range [][]mount.Mount{m, v} {
		dir := filepath.Join(r.o.Run, "fuse", filepath.Base(x[0].Source))
		unix.Unmount(dir, unix.MNT_FORCE)
		unix.Unmount(dir, unix.MNT_DETACH)
	}
	waitFor(t, "notice", func() bool { return len(r.store.SnapNodes()) == 0 })
	for key, old := range map[string][]mount.Mount{"k": m, "v": v} {
		got := must[[]mount.Mount](t)(s.Mounts(ctx, key))
		if got[0].Source != old[0].Source {
			t.Errorf("%s: source %s, before %s", key, got[0].Source, old[0].Source)
		}
		if text := r.read(got, "a"); text != "text" {
			t.Errorf("%s shows %q", key, text)
		}
	}
	ok(t, s.Commit(ctx, "c", "k"))
}

// TestLostWrites: a snapshot some of whose writes found no room is never committed; removed, it gives
// its space back. With too little room, none is prepared.
func TestLostWrites(t *testing.T) { eachFS(t, testLostWrites) }

func testLostWrites(t *testing.T, fs string) {
	r := newRig(t, 24<<20)
	r.o.FSType = fs
	r.poolO.ErrorIfNoSpace = true
	r.open()
	s := r.snapshotter("mica")
	ctx := tctx(t)
	r.layer(s, "p", "", map[string]string{"a": "text"})
	before := r.used()
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	dir, _ := r.mountOn(m)
	err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, 40<<20), 0o644)
	for i := range 40 << 4 { // not zeros, which need no room
		if err != nil {
			break
		}
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), []byte(strings.Repeat(fmt.Sprint(i), 64<<10)), 0o644)
	}
	ok(t, unix.Unmount(dir, 0))
	empty := r.fillPool()
	_, perr := s.Prepare(ctx, "other", "p")
	wantClass(t, perr, errdefs.IsResourceExhausted, `"other"`, "data blocks")
	must[[]mount.Mount](t)(s.View(ctx, "look", "p")) // needs no room
	ok(t, s.Remove(ctx, "look"))
	empty()
	wantClass(t, s.Commit(ctx, "c", "k"), errdefs.IsResourceExhausted, `"k"`, "not complete")
	// Not after a restart either.
	r.close()
	r.open()
	s = r.snapshotter("mica")
	wantClass(t, s.Commit(ctx, "c", "k"), errdefs.IsResourceExhausted, `"k"`, "not complete")
	ok(t, s.Remove(ctx, "k"))
	if n := r.used(); n != before {
		t.Errorf("pool holds %d blocks, %d before", n, before)
	}
	r.layer(s, "works", "p", map[string]string{"b": "b"})
}

// fillPool takes all free blocks of the pool with a device of its own, until empty is called.
func (r *rig) fillPool() (empty func()) {
	r.t.Helper()
	ctx := tctx(r.t)
	ok(r.t, r.pool.CreateThin(ctx, 7))
	d, err := r.pool.Open(ctx, 7, engine.OpenOptions{SizeBytes: 1 << 30})
	ok(r.t, err)
	block := bytes.Repeat([]byte("x"), 64<<10)
	for off := int64(0); ; off += int64(len(block)) {
		if _, err := d.WriteAt(block, off); errors.Is(err, layer.ErrNoSpace) {
			break
		} else if err != nil {
			r.t.Fatal(err)
		}
	}
	return func() {
		ok(r.t, d.Close())
		ok(r.t, r.pool.Delete(ctx, 7))
	}
}

// TestCrashed: a file system that was not unmounted in order (the host died) is replayed at commit.
func TestCrashed(t *testing.T) { eachFS(t, testCrashed) }

func testCrashed(t *testing.T, fs string) {
	r, s, ctx := openRig(t, fs)
	r.layer(s, "p", "", map[string]string{"a": "text"})
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p"))
	dir, _ := r.mountOn(m)
	f, err := os.Create(filepath.Join(dir, "x"))
	ok(t, err)
	_, err = f.WriteString("synced")
	ok(t, err)
	ok(t, f.Sync())
	ok(t, f.Close())
	// The node goes away under the mount, as in a power cut.
	fuse := filepath.Join(r.o.Run, "fuse", filepath.Base(m[0].Source))
	unix.Unmount(fuse, unix.MNT_FORCE)
	unix.Unmount(fuse, unix.MNT_DETACH)
	unix.Unmount(dir, unix.MNT_DETACH)
	waitFor(t, "notice", func() bool { return len(r.store.SnapNodes()) == 0 })
	helpers := countHelpers(t)
	ok(t, s.Commit(ctx, "c", "k"))
	if countHelpers(t) == helpers {
		t.Error("nothing was replayed")
	}
	v := must[[]mount.Mount](t)(s.View(ctx, "v", "c"))
	if got := r.read(v, "x"); got != "synced" {
		t.Errorf("the commit holds %q", got)
	}
}

// stuckPool is a pool whose steps hang for a while.
type stuckPool struct {
	engine.Pool
	gate chan struct{} // closed: go on; nil: never hang
}

func (p *stuckPool) SetTransactionID(ctx context.Context, old, next uint64) error {
	if p.gate != nil {
		<-p.gate
	}
	return p.Pool.SetTransactionID(ctx, old, next)
}

// TestBounded: with a pool that does not get on, Commit, Remove and Cleanup are answered in time, and
// many Removes do not take many times that. What was answered with an error has not been done, or is
// done once.
func TestBounded(t *testing.T) {
	r := newRig(t, 1<<30)
	p := &stuckPool{}
	r.wrapPool = func(e engine.Pool) engine.Pool { p.Pool = e; return p }
	r.open()
	limit := 300 * time.Millisecond
	s := r.snapshotter("mica", func(o *Options) { o.Timeout = limit })
	ctx := tctx(t)
	r.layer(s, "p", "", map[string]string{"a": "a"})
	for i := range 20 {
		r.fill(s, fmt.Sprint("k", i), "p", map[string]string{"x": "x"})
	}
	p.gate = make(chan struct{})
	timed := func(what string, most time.Duration, fn func() error) error {
		t.Helper()
		begin := time.Now()
		err := fn()
		if d := time.Since(begin); d > most {
			t.Errorf("%s took %v, at most %v is wanted", what, d, most)
		}
		return err
	}
	slack := 2 * time.Second
	err := timed("20 removes", limit+20*2*grace+slack, func() error {
		var errs []error
		for i := range 10 {
			errs = append(errs, s.Remove(ctx, fmt.Sprint("k", i)))
		}
		return errors.Join(errs...)
	})
	wantClass(t, err, errdefs.IsFailedPrecondition, `"k0"`, `"k9"`)
	wantClass(t, timed("commit", limit+grace+slack, func() error { return s.Commit(ctx, "c", "k10") }), errdefs.IsDeadlineExceeded, `"k10"`)
	ok(t, timed("cleanup", slack, func() error { return s.Cleanup(ctx) }))
	ok(t, timed("stat", slack, func() error { _, err := s.Stat(ctx, "p"); return err }))
	close(p.gate)
	waitFor(t, "the calls that were given up", func() bool { return s.stuck.Load() == 0 })
	for i := range 10 {
		if err := s.Remove(ctx, fmt.Sprint("k", i)); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	ok(t, s.Commit(ctx, "c", "k10"))
	ok(t, s.Commit(ctx, "d", "k11"))
}

// TestGuestOwned: with devices that guests write to, the host looks into none but those that it
// unpacks layers to.
func TestGuestOwned(t *testing.T) {
	r := newRig(t, 1<<30).open()
	s := r.snapshotter("kata", func(o *Options) { o.GuestOwned = true })
	ctx := tctx(t)
	r.layer(s, "p", "", map[string]string{"a": "text"}) // an unpack: its key begins with extract-
	if v := must[layer.Snap](t)(s.snaps.Stat(ctx, "p")); v.GuestOwned {
		t.Error("an unpacked layer belongs to a guest")
	}
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "ns/1/vm", "p"))
	dir, unmount := r.mountOn(m) // plays the guest
	writeFile(t, filepath.Join(dir, "b"), "guest")
	helpers := countHelpers(t)
	unmount()
	ok(t, s.Commit(ctx, "c", "ns/1/vm"))
	if n := countHelpers(t) - helpers; n != 0 {
		t.Errorf("%d helpers looked into a guest's device", n)
	}
	if v := must[layer.Snap](t)(s.snaps.Stat(ctx, "c")); !v.GuestOwned {
		t.Error("what a guest wrote is not known as such")
	}
	child := must[[]mount.Mount](t)(s.Prepare(ctx, "ns/2/vm", "c"))
	if got := r.read(child, "b"); got != "guest" {
		t.Errorf("the child holds %q", got)
	}
	_, err := r.store.DiffMounts(ctx, "", child[0].Source, &strings.Builder{})
	wantClass(t, class(err), errdefs.IsFailedPrecondition, "guest")
}

// TestIDMap: the labels of a user namespace become mount options, and nothing is copied.
func TestIDMap(t *testing.T) { eachFS(t, testIDMap) }

func testIDMap(t *testing.T, fs string) {
	r := newRig(t, 1<<30)
	r.o.FSType = fs
	r.open()
	s := r.snapshotter("mica", func(o *Options) { o.MountOptions = []string{"nosuid"} })
	ctx := tctx(t)
	r.layer(s, "p", "", map[string]string{"a": "text"})
	before := r.used()
	opt := withLabels(snapshots.LabelSnapshotUIDMapping, "0:100000:65536", snapshots.LabelSnapshotGIDMapping, "0:200000:65536")
	m := must[[]mount.Mount](t)(s.Prepare(ctx, "k", "p", opt))
	again := must[[]mount.Mount](t)(s.Mounts(ctx, "k"))
	for _, got := range [][]mount.Mount{m, again} {
		all := strings.Join(got[0].Options, " ")
		if !strings.Contains(all, "uidmap=0:100000:65536 gidmap=0:200000:65536") || !strings.Contains(all, "nosuid") {
			t.Errorf("options %q", all)
		}
	}
	if n := r.used(); n != before {
		t.Errorf("preparing for a user namespace took %d blocks", n-before)
	}
	dir, err := os.MkdirTemp(r.dir, "m-")
	ok(t, err)
	if err := mount.All(m, dir); err != nil {
		t.Skipf("SKIPPED: this kernel or machine mounts no idmapped %s: %v", fs, err)
	}
	defer unix.Unmount(dir, 0)
	var st unix.Stat_t
	ok(t, unix.Stat(filepath.Join(dir, "a"), &st))
	if st.Uid != 100000 || st.Gid != 200000 {
		t.Errorf("owner %d:%d, want 100000:200000", st.Uid, st.Gid)
	}
}
