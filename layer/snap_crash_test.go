package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"mica/engine"
)

// A snapModel is what a snapshot must be like.
type snapModel struct {
	kind    SnapKind
	parent  string
	content uint64 // what is at contentAt
	alias   bool
}

// contentAt is where the model's tests write, in bytes.
const contentAt = 3 << 20

// snapCrash is a run of the model.
type snapCrash struct {
	*fakeRig
	rng   *rand.Rand
	model map[string]snapModel
	held  map[string]bool // attachments that somebody has mounted
	n     *SnapStore
	chain string
	// of another snapshotter: names of what it shares, with the chain id; and what a chain id holds
	other  map[string]string
	shared map[string]uint64
}

// reopened takes the snapshots of a store that was opened.
func (r *snapCrash) reopened(s *Store) { r.n = must[*SnapStore](r.t)(s.Snaps("mica", SnapOptions{})) }

// second is the other snapshotter.
func (r *snapCrash) second() *SnapStore {
	return must[*SnapStore](r.t)(r.s.Snaps("other", SnapOptions{}))
}

// TestSnapCrashModel runs random operations on snapshots, some of them mounted, and crashes the store
// at random points of the catalog's steps; after each restart every snapshot is as the model says,
// also in contents, and the pool holds nothing else.
func TestSnapCrashModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("LAYER_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("seed %d (LAYER_SEED)", seed)
	r := &snapCrash{fakeRig: newFakeRig(t), rng: rand.New(rand.NewPCG(seed, 8)), model: map[string]snapModel{}, held: map[string]bool{},
		other: map[string]string{}, shared: map[string]uint64{}}
	crash := errors.New("crash")
	var countdown safeCounter
	r.fault = func(p string) error {
		if strings.HasPrefix(p, "open:") || !countdown.hit() {
			return nil
		}
		return fmt.Errorf("%w at %s", crash, p)
	}
	ctx := context.Background()
	s := r.mustOpen()
	importFake(t, s)
	r.chain = "sha256:" + strings.Repeat("1", 64)
	r.reopened(s)
	crashes, restarts := 0, 0
	for i := range 2000 {
		if r.rng.IntN(6) == 0 {
			countdown.arm(r.rng.IntN(8))
		}
		undo, err := r.operation(ctx)
		ro := s.cat.ReadOnly()
		if ro == nil && r.rng.IntN(60) != 0 {
			if err != nil {
				t.Fatalf("operation %d: %v", i, err)
			}
			continue
		}
		if ro == nil {
			restarts++
			if err != nil {
				t.Fatalf("operation %d: %v", i, err)
			}
		} else if crashes++; !errors.Is(ro, crash) {
			t.Fatalf("operation %d: %v", i, ro)
		}
		countdown.arm(-1)
		r.die()
		clear(r.held)
		if s, err = r.open(); err != nil {
			t.Fatal(err)
		}
		r.reopened(s)
		r.check(ctx, i, ro != nil, undo)
	}
	t.Logf("%d crashes, %d restarts; %d snapshots at the end", crashes, restarts, len(r.model))
	if crashes < 20 {
		t.Errorf("%d crashes only", crashes)
	}
	s.Close()
}

// operation does something and changes the model; undo takes that back, for a crash in it.
func (r *snapCrash) operation(ctx context.Context) (undo func(), err error) {
	old := maps.Clone(r.model)
	undo = func() { r.model = old }
	names := slices.Sorted(maps.Keys(r.model))
	of := func(kind SnapKind) string {
		var some []string
		for _, n := range names {
			if r.model[n].kind == kind {
				some = append(some, n)
			}
		}
		if len(some) == 0 {
			return ""
		}
		return some[r.rng.IntN(len(some))]
	}
	fresh := fmt.Sprintf("s%d", r.rng.IntN(100_000))
	for _, taken := r.model[fresh]; taken; _, taken = r.model[fresh] {
		fresh = fmt.Sprintf("s%d", r.rng.IntN(100_000))
	}
	parent := of(SnapCommitted)
	if r.rng.IntN(4) == 0 {
		parent = ""
	}
	switch r.rng.IntN(13) {
	case 0, 1, 2:
		if len(r.model) > 40 {
			return undo, nil
		}
		r.model[fresh] = snapModel{kind: SnapActive, parent: parent, content: r.model[parent].content}
		_, err = r.n.Prepare(ctx, SnapSpec{Name: fresh, Parent: parent})
	case 3:
		r.model[fresh] = snapModel{kind: SnapView, parent: parent, content: r.model[parent].content}
		_, err = r.n.View(ctx, SnapSpec{Name: fresh, Parent: parent})
	case 4, 5:
		key := of(SnapActive)
		if key == "" {
			return undo, nil
		}
		m := r.model[key]
		delete(r.model, key)
		m.kind = SnapCommitted
		r.model[fresh] = m
		var labels map[string]string
		if m.parent == "" {
			ref := fmt.Sprintf("sha256:%064x", r.rng.Uint64())
			labels, r.shared[ref] = map[string]string{LabelSnapRef: ref}, m.content
		}
		err = r.n.Commit(ctx, fresh, key, "", labels)
	case 6:
		key := of(SnapActive)
		if key == "" {
			return undo, nil
		}
		m := r.model[key]
		m.content = r.rng.Uint64()
		if err := r.write(ctx, key, m.content); err != nil {
			return undo, err
		}
		r.model[key] = m
		undo = func() {} // written is written
	case 7:
		key := of([]SnapKind{SnapActive, SnapView}[r.rng.IntN(2)])
		if key == "" {
			return undo, nil
		}
		rec, err := r.n.record(key)
		if err != nil {
			return undo, err
		}
		id := rec.body.ID
		if r.held[id] {
			delete(r.held, id)
			r.e.Hold(id, "")
			r.n.Nudge()
		} else {
			r.held[id] = true
			r.e.Hold(id, "/mnt")
		}
	case 8:
		if len(names) == 0 {
			return undo, nil
		}
		name := names[r.rng.IntN(len(names))]
		for _, m := range r.model {
			if m.parent == name {
				err := r.n.Remove(ctx, name)
				if !errors.Is(err, ErrInUse) && r.s.cat.ReadOnly() == nil {
					return undo, fmt.Errorf("remove of a parent: %w", err)
				}
				return undo, nil
			}
		}
		delete(r.model, name)
		err = r.n.Remove(ctx, name)
	case 9:
		found, err := r.n.Shared(ctx, r.chain, "", nil)
		if err != nil {
			return undo, err
		}
		if _, ok := r.model[found.Name]; !ok {
			r.model[found.Name] = snapModel{kind: SnapCommitted, alias: true, content: 0}
		}
	case 10, 11:
		for _, v := range must[[]Snap](r.t)(r.n.List(ctx)) {
			if ref := v.Labels[LabelSnapRef]; v.Kind == SnapCommitted && ref != "" && ref != r.chain && r.rng.IntN(4) == 0 {
				found, err := r.second().Shared(ctx, ref, "", nil)
				if err != nil {
					return undo, err
				}
				r.other[found.Name] = ref
				return undo, nil
			}
		}
	case 12:
		for name := range r.other {
			delete(r.other, name)
			return undo, r.second().Remove(ctx, name)
		}
	}
	return undo, err
}

// write writes through a snapshot's node, as who has it mounted does.
func (r *snapCrash) write(ctx context.Context, key string, v uint64) error {
	rec, err := r.n.record(key)
	if err != nil {
		return err
	}
	l := r.s.liveOf(rec.body.ID)
	if l == nil {
		return fmt.Errorf("snapshot %q has no node", key)
	}
	_, err = l.t.WriteAt(binary.LittleEndian.AppendUint64(nil, v), contentAt)
	return err
}

// check compares store and pool with the model after a restart.
func (r *snapCrash) check(ctx context.Context, i int, crashed bool, undo func()) {
	t := r.t
	t.Helper()
	got := map[string]snapModel{}
	for _, v := range must[[]Snap](t)(r.n.List(ctx)) {
		m := snapModel{kind: v.Kind, parent: v.Parent, alias: strings.HasPrefix(v.Name, "@mica/")}
		m.content = r.content(ctx, v)
		got[v.Name] = m
	}
	// A name of a layer comes with a name that the model does not know before.
	adopt := func() {
		for n, m := range got {
			if _, ok := r.model[n]; m.alias && !ok {
				r.model[n] = m
			}
		}
	}
	adopt()
	if !maps.Equal(got, r.model) {
		want := fmt.Sprint(r.model)
		if crashed {
			undo()
			adopt()
		}
		if !maps.Equal(got, r.model) {
			t.Fatalf("operation %d:\n got %v\nwant %v\n  or %v", i, got, want, r.model)
		}
	}
	ok(t, r.s.WaitQueue(ctx))
	waitFor(t, "an empty queue", func() bool { r.n.Nudge(); return len(r.s.Queue()) == 0 })
	devices, nodes, exports := 1, 0, map[string]bool{} // the base
	devices += r.checkShared(ctx, i, crashed)
	for n, m := range r.model {
		switch {
		case m.kind == SnapView:
			exports[m.parent] = true
		case m.kind == SnapActive:
			nodes++
		}
		if must[Snap](t)(r.n.Stat(ctx, n)).Device != 0 {
			devices++
		}
		if m.kind != SnapCommitted {
			if _, _, err := r.n.Mount(ctx, n); err != nil {
				t.Fatalf("operation %d: %v", i, err)
			}
		}
	}
	// Two names of one device, the layer and its alias, have no export in common here.
	list, _ := r.pool.Devices(ctx)
	if len(list) != devices {
		t.Fatalf("operation %d: pool has %d devices, want %d: %+v", i, len(list), devices, r.s.Queue())
	}
	if names := r.e.Names(); len(names) != nodes+len(exports) {
		t.Fatalf("operation %d: %d nodes, want %d and %d for views: %v", i, len(names), nodes, len(exports), names)
	}
	if left, _ := r.e.Survivors(ctx); len(left) != 0 {
		t.Fatalf("operation %d: nodes of a predecessor are left: %v", i, left)
	}
	if st := must[Status](t)(r.s.Status(ctx)); len(st.Foreign)+len(st.Broken) != 0 || st.ReadOnly != "" {
		t.Fatalf("operation %d: status %+v", i, st)
	}
}

// checkShared looks at what the other snapshotter has, and returns how many layers there are: the image's,
// and those that have a name in either.
func (r *snapCrash) checkShared(ctx context.Context, i int, crashed bool) int {
	r.t.Helper()
	named, names := map[string]bool{r.chain: true}, map[string]string{}
	for _, v := range must[[]Snap](r.t)(r.second().List(ctx)) {
		ref := v.Labels[LabelSnapRef]
		names[v.Name], named[v.ChainID] = ref, true
		if got := r.contentOf(ctx, r.second(), v); got != r.shared[ref] {
			r.t.Fatalf("operation %d: %s holds %d, want %d", i, v.Name, got, r.shared[ref])
		}
	}
	if !crashed && !maps.Equal(names, r.other) {
		r.t.Fatalf("operation %d: the other snapshotter has %v, want %v", i, names, r.other)
	}
	r.other = names
	for _, v := range must[[]Snap](r.t)(r.n.List(ctx)) {
		named[v.ChainID] = true
	}
	layers := must[[]Layer](r.t)(r.s.Layers(ctx))
	for _, l := range layers {
		if !named[l.ChainID] {
			r.t.Fatalf("operation %d: layer %s has no name", i, l.ChainID)
		}
	}
	return len(layers)
}

// content reads what a snapshot holds.
func (r *snapCrash) content(ctx context.Context, v Snap) uint64 {
	r.t.Helper()
	return r.contentOf(ctx, r.n, v)
}

func (r *snapCrash) contentOf(ctx context.Context, n *SnapStore, v Snap) uint64 {
	r.t.Helper()
	b := make([]byte, 8)
	rec := must[record[snapBody]](r.t)(n.record(v.Name))
	if l := r.s.liveOf(rec.body.ID); l != nil {
		_, err := l.t.ReadAt(b, contentAt)
		ok(r.t, err)
	} else {
		src, release, err := n.holdParent(ctx, map[bool]string{true: v.Parent, false: v.Name}[v.Kind == SnapView])
		ok(r.t, err)
		defer release()
		d, err := r.pool.Open(ctx, src.dev, engine.OpenOptions{SizeBytes: v.SizeBytes, ReadOnly: true})
		ok(r.t, err)
		_, err = d.ReadAt(b, contentAt)
		ok(r.t, errors.Join(err, d.Close()))
	}
	return binary.LittleEndian.Uint64(b)
}

// TestSnapOldBoot: after a reboot nodes come back when their mounts are asked for, not before, and
// what was removed while mounted is deleted.
func TestSnapOldBoot(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	n := must[*SnapStore](t)(s.Snaps("mica", SnapOptions{}))
	must[SnapMount](t)(n.Prepare(ctx, SnapSpec{Name: "p0"}))
	ok(t, n.Commit(ctx, "p", "p0", "", nil))
	m := must[SnapMount](t)(n.Prepare(ctx, SnapSpec{Name: "k", Parent: "p"}))
	v := must[SnapMount](t)(n.View(ctx, SnapSpec{Name: "v", Parent: "p"}))
	must[SnapMount](t)(n.Prepare(ctx, SnapSpec{Name: "gone", Parent: "p"}))
	rec := must[record[snapBody]](t)(n.record("gone"))
	r.e.Hold(rec.body.ID, "/mnt")
	ok(t, n.Remove(ctx, "gone"))
	s.Close()
	r.left = nil // the kernel of before is gone
	text, err := os.ReadFile(filepath.Join(r.dir, "root/catalog.db"))
	ok(t, err)
	boot := []byte(`"boot":"` + bootID() + `"`)
	if !bytes.Contains(text, boot) {
		t.Fatal("no boot id in the catalog")
	}
	other := bytes.ReplaceAll(text, boot, []byte(`"boot":"`+strings.Repeat("0", len(bootID()))+`"`))
	ok(t, os.WriteFile(filepath.Join(r.dir, "root/catalog.db"), other, 0o600))
	s = r.mustOpen()
	n = must[*SnapStore](t)(s.Snaps("mica", SnapOptions{}))
	if names := r.e.Names(); len(names) != 0 {
		t.Errorf("nodes came back unasked: %v", names)
	}
	for name, old := range map[string]SnapMount{"k": m, "v": v} {
		got, _, err := n.Mount(ctx, name)
		ok(t, err)
		if got.Source != old.Source {
			t.Errorf("%s: source %s, before %s", name, got.Source, old.Source)
		}
	}
	ok(t, s.WaitQueue(ctx))
	if list, _ := r.pool.Devices(ctx); len(list) != 3 {
		t.Errorf("%d devices, want the base, p and k", len(list))
	}
	ok(t, n.Commit(ctx, "c", "k", "p", nil))
}

// TestSnapListing: active snapshots are listed with containers for those who ask for all owners, in
// pages too; the devices of all are in the figures of usage.
func TestSnapListing(t *testing.T) {
	r := newFakeRig(t)
	s := r.mustOpen()
	ctx := context.Background()
	importFake(t, s)
	for _, n := range []string{"a", "z"} {
		ok(t, second(s.Create(ctx, CreateOptions{Name: n, Image: "img"})))
	}
	n := must[*SnapStore](t)(s.Snaps("mica", SnapOptions{}))
	must[SnapMount](t)(n.Prepare(ctx, SnapSpec{Name: "ns/1/p", Labels: map[string]string{"x": "1"}}))
	ok(t, n.Commit(ctx, "ns/2/p", "ns/1/p", "", nil))
	must[SnapMount](t)(n.Prepare(ctx, SnapSpec{Name: "ns/3/web", Parent: "ns/2/p", Labels: map[string]string{"x": "1"}}))
	must[SnapMount](t)(n.View(ctx, SnapSpec{Name: "ns/4/view", Parent: "ns/2/p"}))
	names := func(f Filter) (out []string) {
		for _, c := range must[[]Container](t)(s.Containers(ctx, f)) {
			out = append(out, c.Name)
		}
		return out
	}
	for _, c := range []struct {
		f    Filter
		want string
	}{
		{Filter{}, "[a z]"},
		{Filter{Owner: "*"}, "[a containerd/mica/ns/3/web z]"},
		{Filter{Owner: "containerd/mica"}, "[containerd/mica/ns/3/web]"},
		{Filter{Owner: "containerd/other"}, "[]"},
		{Filter{Owner: "*", Labels: map[string]string{"x": ""}}, "[containerd/mica/ns/3/web]"},
		{Filter{Owner: "*", Prefix: "c"}, "[containerd/mica/ns/3/web]"},
		{Filter{Owner: "*", Limit: 2}, "[a containerd/mica/ns/3/web]"},
		{Filter{Owner: "*", Cursor: "containerd/mica/ns/3/web"}, "[z]"},
		{Filter{Owner: "*", Image: "img"}, "[a z]"},
	} {
		if got := fmt.Sprint(names(c.f)); got != c.want {
			t.Errorf("%+v: %s, want %s", c.f, got, c.want)
		}
	}
	all := must[[]Container](t)(s.Containers(ctx, Filter{Owner: "containerd/mica"}))
	if a := all[0].Attachment; a == nil || a.Node == "" {
		t.Errorf("no node: %+v", all[0])
	}
	if st := must[Status](t)(s.Status(ctx)); st.Snaps != 3 {
		t.Errorf("%d snapshots, want 3", st.Snaps)
	}
	kinds := map[string]int{}
	for _, e := range must[DF](t)(s.DF(ctx)).Entries {
		kinds[e.Kind]++
	}
	if kinds["snap"] != 2 {
		t.Errorf("usage by kinds %v, want 2 snaps", kinds)
	}
}
