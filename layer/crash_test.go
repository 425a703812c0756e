package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/layer/archive"
	"mica/layer/helper"
	"mica/layer/internal/fake"
)

// fakeFiles does the helper's work on fake nodes: a superblock at its place, the digest of what
// was applied behind it.
type fakeFiles struct{ e *fake.Exporter }

func (f fakeFiles) with(node string, fn func(dev.Device) error) error {
	d := f.e.Device(node)
	if d == nil {
		return fmt.Errorf("%s: no such node", node)
	}
	return fn(d)
}

func (f fakeFiles) Mkfs(_ context.Context, node, _, _ string) error {
	return f.with(node, func(d dev.Device) error {
		sb := make([]byte, 1024)
		binary.LittleEndian.PutUint16(sb[0x38:], 0xef53)
		binary.LittleEndian.PutUint16(sb[0x3a:], 1) // unmounted in order
		_, err := d.WriteAt(sb, 1024)
		return err
	})
}

func (f fakeFiles) Apply(_ context.Context, node, _ string, _ bool, r io.Reader) (helper.Stats, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return helper.Stats{}, err
	}
	return helper.Stats{Entries: 1, Bytes: int64(len(b))}, f.with(node, func(d dev.Device) error {
		_, err := d.WriteAt(append(b, make([]byte, 64)...)[:64], 1<<20)
		return err
	})
}

func (f fakeFiles) Diff(_ context.Context, lower, upper, _ string, _ []archive.InodeRange, w io.Writer) (helper.Stats, error) {
	return helper.Stats{}, f.with(upper, func(d dev.Device) error {
		b := make([]byte, 64)
		if _, err := d.ReadAt(b, 1<<20); err != nil {
			return err
		}
		_, err := w.Write(b)
		return err
	})
}

func (f fakeFiles) Replay(_ context.Context, node, _ string) error {
	return f.with(node, func(dev.Device) error { return nil })
}
func (f fakeFiles) Grow(ctx context.Context, node, fs string) error { return f.Replay(ctx, node, fs) }
func (f fakeFiles) Trim(ctx context.Context, node, fs string) (int64, error) {
	return 0, f.Replay(ctx, node, fs)
}
func (f fakeFiles) Thaw(context.Context, string, string) (helper.State, error) {
	return helper.StateIdle, nil
}
func (f fakeFiles) FreezeNode(context.Context, string, string, string) (*helper.Frozen, error) {
	return &helper.Frozen{State: helper.StateIdle}, nil
}

// fakeRig is a store on a fake pool.
type fakeRig struct {
	t     testing.TB
	dir   string
	pool  *fake.Pool
	e     *fake.Exporter
	s     *Store
	left  []string // attachments of a dead predecessor
	fault func(string) error
	force bool
}

func newFakeRig(t testing.TB) *fakeRig { return &fakeRig{t: t, dir: t.TempDir(), pool: fake.New()} }

func (r *fakeRig) open() (*Store, error) {
	r.e = fake.NewExporter(r.left...)
	o := Options{Root: filepath.Join(r.dir, "root"), Run: filepath.Join(r.dir, "run"), Pool: r.pool, Exporter: r.e,
		BaseSize: 64 << 20, Logger: quietLogger(), AcceptPool: r.force}
	s, err := open(context.Background(), o, fakeFiles{r.e}, r.fault)
	if err == nil {
		r.s = s
	}
	return s, err
}

func (r *fakeRig) mustOpen() *Store {
	r.t.Helper()
	s, err := r.open()
	ok(r.t, err)
	r.t.Cleanup(func() { s.Close() })
	return s
}

// die ends the store as a kill would: nothing more is written, nodes stay.
func (r *fakeRig) die() {
	r.left = nil
	for _, n := range r.e.Names() {
		r.left = append(r.left, n)
	}
	r.s.Close()
}

// TestCrashModel runs random operations on a store and crashes it at random points of the
// catalog's steps; after each restart the store is as the model says, and the pool holds nothing
// else.
func TestCrashModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("LAYER_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("seed %d (LAYER_SEED)", seed)
	rng := rand.New(rand.NewPCG(seed, 7))
	r := newFakeRig(t)
	ctx := context.Background()
	crash := errors.New("crash")
	var mu sync.Mutex
	countdown := -1
	r.fault = func(p string) error {
		mu.Lock()
		defer mu.Unlock()
		if countdown < 0 || strings.HasPrefix(p, "open:") {
			return nil
		}
		if countdown--; countdown >= 0 {
			return nil
		}
		countdown = 0 // everything after it fails too
		return fmt.Errorf("%w at %s", crash, p)
	}
	s := r.mustOpen()
	tarball := []byte("layer one")
	im := must[Import](t)(s.BeginImport(ctx))
	chain := "sha256:" + strings.Repeat("1", 64)
	_, err := im.ApplyLayer(ctx, LayerSpec{ChainID: chain}, bytes.NewReader(tarball))
	ok(t, err)
	_, err = im.Commit(ctx, ImageSpec{Name: "img", ChainID: chain, Config: []byte("{}")})
	ok(t, err)

	type state struct {
		snaps    map[string]bool
		attached bool
	}
	model := map[string]*state{}
	images := map[string]bool{"img": true}
	crashes, restarts := 0, 0
	const operations = 1500
	for i := range operations {
		mu.Lock()
		if countdown < 0 && rng.IntN(6) == 0 {
			countdown = rng.IntN(8)
		}
		mu.Unlock()
		names := slices.Sorted(maps.Keys(model))
		pick := func() string {
			if len(names) == 0 || rng.IntN(10) == 0 {
				return fmt.Sprintf("c%d", rng.IntN(20))
			}
			return names[rng.IntN(len(names))]
		}
		n := pick()
		c := model[n]
		var err error
		var undo func() // the other state that a crash may leave
		switch rng.IntN(12) {
		case 0, 1, 2:
			_, _, err = s.Create(ctx, CreateOptions{Name: n, Image: "img"})
			if c == nil {
				model[n] = &state{snaps: map[string]bool{}}
				undo = func() { delete(model, n) }
			}
		case 3:
			if c == nil {
				continue
			}
			err = s.Remove(ctx, n, RemoveOptions{Snapshots: true})
			delete(model, n)
			undo = func() { model[n] = c }
		case 4:
			if c == nil {
				continue
			}
			_, err = s.Attach(ctx, n, AttachOptions{})
			was := c.attached
			c.attached = true
			undo = func() { c.attached = was }
		case 5:
			if c == nil {
				continue
			}
			err = s.Detach(ctx, n, DetachOptions{})
			was := c.attached
			c.attached = false
			undo = func() { c.attached = was }
		case 6, 7:
			sn := fmt.Sprintf("s%d", rng.IntN(4))
			if c == nil || c.snaps[sn] {
				continue
			}
			_, err = s.Snapshot(ctx, n, SnapshotOptions{Name: sn})
			c.snaps[sn] = true
			undo = func() { delete(c.snaps, sn) }
		case 8:
			if c == nil || len(c.snaps) == 0 {
				continue
			}
			sn := slices.Sorted(maps.Keys(c.snaps))[0]
			err = s.RemoveSnapshot(ctx, n, sn)
			delete(c.snaps, sn)
			undo = func() { c.snaps[sn] = true }
		case 9:
			if c == nil || len(c.snaps) == 0 || c.attached {
				continue
			}
			_, err = s.Rollback(ctx, n, slices.Sorted(maps.Keys(c.snaps))[0])
			undo = func() {}
		case 10:
			if c == nil {
				continue
			}
			var fresh []string
			for range 1 + rng.IntN(3) {
				f := fmt.Sprintf("f%d", rng.IntN(1000))
				if model[f] == nil && !slices.Contains(fresh, f) {
					fresh = append(fresh, f)
				}
			}
			if len(fresh) == 0 || len(model) > 40 {
				continue
			}
			_, err = s.Fork(ctx, n, ForkOptions{Names: fresh})
			for _, f := range fresh {
				model[f] = &state{snaps: map[string]bool{}}
			}
			undo = func() {
				for _, f := range fresh {
					delete(model, f)
				}
			}
		case 11:
			if c == nil {
				continue
			}
			img := fmt.Sprintf("i%d", rng.IntN(5))
			if images[img] {
				err = s.RemoveImage(ctx, img)
				delete(images, img)
				undo = func() { images[img] = true }
			} else {
				_, err = s.Commit(ctx, n, CommitOptions{Image: img})
				images[img] = true
				undo = func() { delete(images, img) }
			}
		}
		if ro := s.cat.ReadOnly(); ro != nil || rng.IntN(60) == 0 {
			if ro != nil {
				crashes++
			} else {
				restarts++
				mu.Lock()
				countdown = -1
				mu.Unlock()
			}
			if ro != nil && !errors.Is(ro, crash) {
				t.Fatalf("operation %d: %v", i, ro)
			}
			r.die()
			mu.Lock()
			countdown = -1
			mu.Unlock()
			if s, err = r.open(); err != nil {
				t.Fatal(err)
			}
			got := map[string]*state{}
			for _, c := range must[[]Container](t)(s.Containers(ctx, Filter{})) {
				got[c.Name] = &state{snaps: map[string]bool{}, attached: c.Attachment != nil}
				if c.Attachment != nil && c.Attachment.Node == "" {
					t.Fatalf("container %s: attachment did not come back", c.Name)
				}
				for _, sn := range must[[]Snapshot](t)(s.Snapshots(ctx, c.Name)) {
					got[c.Name].snaps[sn.Name] = true
				}
			}
			gotImages := map[string]bool{}
			for _, im := range must[[]Image](t)(s.Images(ctx, Filter{})) {
				gotImages[im.Name] = true
			}
			describe := func(m map[string]*state, im map[string]bool) string {
				out := fmt.Sprint(im)
				for _, n := range slices.Sorted(maps.Keys(m)) {
					out += fmt.Sprintf(" %s:%v%v", n, m[n].attached, m[n].snaps)
				}
				return out
			}
			want := describe(model, images)
			if have := describe(got, gotImages); have != want {
				other := "none"
				if undo != nil && ro != nil {
					undo()
					other = describe(model, images)
				}
				if have != other {
					t.Fatalf("operation %d:\n got %s\nwant %s\n  or %s", i, have, want, other)
				}
			}
			ok(t, s.WaitQueue(ctx))
			devices := 1 + len(model)
			for _, c := range model {
				devices += len(c.snaps)
			}
			devices += len(must[[]Layer](t)(s.Layers(ctx)))
			list, _ := r.pool.Devices(ctx)
			if len(list) != devices {
				t.Fatalf("operation %d: pool has %d devices, want %d: %+v", i, len(list), devices, s.Queue())
			}
			if left, _ := r.e.Survivors(ctx); len(left) != 0 {
				t.Fatalf("operation %d: nodes of a predecessor are left: %v", i, left)
			}
			if st := must[Status](t)(s.Status(ctx)); len(st.Foreign)+len(st.Broken) != 0 || st.ReadOnly != "" {
				t.Fatalf("operation %d: status %+v", i, st)
			}
		} else if err != nil {
			t.Fatalf("operation %d on %s: %v", i, n, err)
		}
	}
	t.Logf("%d operations, %d crashes, %d restarts; %d containers at the end", operations, crashes, restarts, len(model))
	if crashes < 20 {
		t.Errorf("%d crashes only", crashes)
	}
	s.Close()
}

// Copies of catalog or pool from another moment: the store reads, and refuses to change anything.
func TestRestoredStore(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	ok(t, second(s.Create(ctx, CreateOptions{Name: "a", Image: "img"})))
	ok(t, s.Close())
	old, err := os.ReadFile(filepath.Join(r.dir, "root/catalog.db"))
	ok(t, err)
	s = r.mustOpen()
	ok(t, second(s.Create(ctx, CreateOptions{Name: "b", Image: "img"})))
	ok(t, s.Remove(ctx, "a", RemoveOptions{}))
	ok(t, s.WaitQueue(ctx))
	ok(t, s.Close())
	ok(t, os.WriteFile(filepath.Join(r.dir, "root/catalog.db"), old, 0o600))
	s = r.mustOpen()
	st := must[Status](t)(s.Status(ctx))
	if !strings.Contains(st.ReadOnly, "the catalog is older than the pool") {
		t.Errorf("read-only: %q", st.ReadOnly)
	}
	c := must[Container](t)(s.Container(ctx, "a"))
	if c.Broken == "" || len(st.Broken) != 1 || len(st.Foreign) != 1 {
		t.Errorf("container %+v, status %+v", c, st)
	}
	for name, err := range map[string]error{
		"create": second(s.Create(ctx, CreateOptions{Name: "c", Image: "img"})), "remove": s.Remove(ctx, "a", RemoveOptions{}),
		"attach": first(s.Attach(ctx, "a", AttachOptions{})), "import": first(s.BeginImport(ctx)),
		"snapshot": first(s.Snapshot(ctx, "a", SnapshotOptions{})), "image": s.RemoveImage(ctx, "img"),
	} {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("%s: %v, want ErrReadOnly", name, err)
		}
	}
	ok(t, s.Close())
	r.force = true
	s = r.mustOpen()
	ok(t, second(s.Create(ctx, CreateOptions{Name: "c", Image: "img"})))
	_, err = s.Attach(ctx, "a", AttachOptions{})
	wantErr(t, err, ErrBroken, "a")
	_, err = s.Snapshot(ctx, "a", SnapshotOptions{})
	wantErr(t, err, ErrBroken)
	ok(t, s.Remove(ctx, "a", RemoveOptions{}))
	if st := must[Status](t)(s.Status(ctx)); len(st.Foreign) != 1 || st.ReadOnly != "" {
		t.Errorf("status %+v", st)
	}
}

func importFake(t testing.TB, s *Store) {
	t.Helper()
	ctx := context.Background()
	im := must[Import](t)(s.BeginImport(ctx))
	chain := "sha256:" + strings.Repeat("1", 64)
	_, err := im.ApplyLayer(ctx, LayerSpec{ChainID: chain}, strings.NewReader("x"))
	ok(t, err)
	_, err = im.Commit(ctx, ImageSpec{Name: "img", ChainID: chain, Config: []byte("{}")})
	ok(t, err)
}

// A missing device breaks what was made from it, not the store.
func TestBrokenLayer(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	ok(t, second(s.Create(ctx, CreateOptions{Name: "a", Image: "img"})))
	l := must[[]Layer](t)(s.Layers(ctx))[0]
	ok(t, s.Close())
	ok(t, r.pool.Delete(ctx, l.Device))
	s = r.mustOpen()
	img := must[Image](t)(s.Image(ctx, "img"))
	c := must[Container](t)(s.Container(ctx, "a"))
	if img.Broken == "" || !strings.Contains(c.Broken, "missing") {
		t.Errorf("image %q, container %q", img.Broken, c.Broken)
	}
	wantErr(t, second(s.Create(ctx, CreateOptions{Name: "b", Image: "img"})), ErrBroken, "device")
	ok(t, s.Remove(ctx, "a", RemoveOptions{}))
	ok(t, s.RemoveImage(ctx, "img"))
	ok(t, s.WaitQueue(ctx))
	importFake(t, s)
	ok(t, second(s.Create(ctx, CreateOptions{Name: "a", Image: "img"})))
}

// Many at once: different objects do not disturb each other, one object is changed by one at a
// time, and the steps share transaction ids.
func TestConcurrent(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	before := s.cat.TransactionID()
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 20 {
				n := fmt.Sprintf("g%d-%d", g, i)
				check := func(err error) {
					if err != nil {
						t.Errorf("%s: %v", n, err)
					}
				}
				check(second(s.Create(ctx, CreateOptions{Name: n, Image: "img"})))
				check(first(s.Attach(ctx, n, AttachOptions{})))
				check(first(s.Snapshot(ctx, n, SnapshotOptions{Name: "s"})))
				check(first(s.Fork(ctx, n, ForkOptions{Names: []string{n + "f"}})))
				_, _, err := s.Create(ctx, CreateOptions{Name: "shared", Image: "img"})
				check(err)
				if err := s.Remove(ctx, "shared", RemoveOptions{Snapshots: true}); err != nil && !errors.Is(err, ErrNotFound) {
					t.Errorf("shared: %v", err)
				}
				check(s.Detach(ctx, n, DetachOptions{}))
				check(first(s.Rollback(ctx, n, "s")))
				check(s.Remove(ctx, n, RemoveOptions{Snapshots: true}))
				check(s.Remove(ctx, n+"f", RemoveOptions{}))
			}
		}()
	}
	wg.Wait()
	ok(t, s.WaitQueue(ctx))
	list, _ := r.pool.Devices(ctx)
	if len(list) != 2 {
		t.Errorf("pool has %d devices, want base and layer", len(list))
	}
	steps := uint64(16 * 20 * 7)
	if n := s.cat.TransactionID() - before; n >= steps {
		t.Errorf("%d transaction ids for %d steps: nothing was shared", n, steps)
	}
	s.mu.Lock()
	if len(s.refs) != 2 || len(s.leases) != 0 || len(s.children) != 0 || len(s.live) != 0 || len(s.locks.m) != 0 {
		t.Errorf("left in memory: refs %v leases %v children %v live %d locks %d", s.refs, s.leases, s.children, len(s.live), len(s.locks.m))
	}
	s.mu.Unlock()
}

// Lists select, page and hide what is not ours.
func TestFilters(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	must[Image](t)(s.TagImage(ctx, "img", "other"))
	for i := range 10 {
		o := CreateOptions{Name: fmt.Sprintf("c%d", i), Image: "img", Labels: map[string]string{"n": fmt.Sprint(i % 2)}}
		if i == 9 {
			o.Owner, o.Image = "containerd/mica", "other"
		}
		ok(t, second(s.Create(ctx, o)))
	}
	for _, tc := range []struct {
		f    Filter
		want string
	}{
		{Filter{}, "c0 c1 c2 c3 c4 c5 c6 c7 c8"},
		{Filter{Owner: "*"}, "c0 c1 c2 c3 c4 c5 c6 c7 c8 c9"},
		{Filter{Owner: "containerd/mica"}, "c9"},
		{Filter{Labels: map[string]string{"n": "1"}}, "c1 c3 c5 c7"},
		{Filter{Labels: map[string]string{"n": ""}, Limit: 2}, "c0 c1"},
		{Filter{Labels: map[string]string{"m": ""}}, ""},
		{Filter{Limit: 3, Cursor: "c2"}, "c3 c4 c5"},
		{Filter{Prefix: "c1"}, "c1"},
		{Filter{Owner: "*", Image: "other"}, "c9"},
	} {
		var got []string
		for _, c := range must[[]Container](t)(s.Containers(ctx, tc.f)) {
			got = append(got, c.Name)
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%+v: %v, want %s", tc.f, got, tc.want)
		}
	}
}

// Events rise, resume, and are not lost by a reader that keeps up.
func TestEvents(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	ch, cancel := s.Events(1)
	defer cancel()
	ok(t, second(s.Create(ctx, CreateOptions{Name: "a", Image: "img"})))
	must[Snapshot](t)(s.Snapshot(ctx, "a", SnapshotOptions{Name: "s"}))
	ok(t, s.Remove(ctx, "a", RemoveOptions{Snapshots: true}))
	last := uint64(0)
	seen := ""
	for e := range ch {
		if e.ID <= last {
			t.Fatalf("event %d after %d", e.ID, last)
		}
		last = e.ID
		seen += e.Kind + " " + e.Object + "\n"
		if e.Kind == EventRemove {
			break
		}
	}
	for _, w := range []string{"base base/ext4", "create layer/sha256:1", "import image/img", "create container/a", "snapshot snapshot/a/s", "remove container/a"} {
		if !strings.Contains(seen, w) {
			t.Errorf("no event %q in\n%s", w, seen)
		}
	}
	cancel()
	again, cancel2 := s.Events(last)
	cancel2()
	for e := range again {
		if e.ID <= last {
			t.Errorf("event %d again", e.ID)
		}
	}
}
