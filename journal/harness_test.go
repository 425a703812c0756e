package journal

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"mica/thin"
)

// shm returns a directory on tmpfs that lasts as long as the test.
func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "mica-journal-test-")
	if err != nil {
		t.Skipf("SKIPPED: needs a tmpfs on /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A fixture is a file that stands for a pool's metadata, and a place for its journal.
type fixture struct {
	dir string
	id  Identity
	o   Options
}

func newFixture(t testing.TB, size int64) *fixture {
	t.Helper()
	f := &fixture{dir: shm(t)}
	meta := filepath.Join(f.dir, "metadata")
	must(t, os.WriteFile(meta, nil, 0o600))
	var err error
	f.id, err = Identify(meta)
	must(t, err)
	f.o = Options{Bytes: size, Dirs: []string{filepath.Join(f.dir, "j")}}
	return f
}

func (f *fixture) path() string { return filepath.Join(f.dir, "j", f.id.name()) }

func (f *fixture) create(t testing.TB, follows State) *Journal {
	t.Helper()
	j, err := Create(f.id, f.o, follows, nil)
	must(t, err)
	t.Cleanup(func() {
		if j.m.mem != nil {
			j.Close()
		}
	})
	return j
}

// left opens what is there, which is one journal.
func (f *fixture) left(t testing.TB) *Left {
	t.Helper()
	l, err := Find(f.id, f.o, true)
	must(t, err)
	if len(l) != 1 {
		t.Fatalf("found %d journals, want 1", len(l))
	}
	t.Cleanup(func() { l[0].Close() })
	return l[0]
}

// state is the n-th superblock of a pool.
func state(n uint64) State {
	return State{Time: uint32(n / 3), TransactionID: n / 2, HeldRoot: n % 2, DataMap: [4]uint64{100, n, 2 * n, 7},
		MetaMap: [4]uint64{50, n % 40, 3 * n, 8}, MappingRoot: n % 5, DetailsRoot: n % 7}
}

// entry is the n-th of many different ones.
func entry(n uint64) Entry {
	rng := rand.New(rand.NewSource(int64(n)))
	e := Entry{ID: thin.DevID(n % 5), VBlock: thin.VBlock(rng.Int63n(1 << 40)), Block: thin.DataBlock(rng.Int63n(1 << 47)), Removed: n%4 == 3}
	e.Len = 1 + uint64(rng.Int63n(int64(GroupBlocks-uint64(e.VBlock)%GroupBlocks)))
	if e.Removed {
		e.Block = 0
	}
	return e
}

func entries(from, to uint64) (list []Entry) {
	for n := from; n < to; n++ {
		list = append(list, entry(n))
	}
	return list
}

func appendAll(t testing.TB, j *Journal, list []Entry) {
	t.Helper()
	for _, e := range list {
		must(t, j.Append(e))
	}
}

// want compares what a pool gets that is as s says.
func (f *fixture) want(t testing.TB, s State, want []Entry) {
	t.Helper()
	got, why := f.left(t).Entries(s)
	if why != "" || !slices.Equal(got, want) {
		t.Errorf("%v: got %s (%s), want %s", s, brief(got), why, brief(want))
	}
}

// wantLost wants nothing but a reason.
func (f *fixture) wantLost(t testing.TB, s State) {
	t.Helper()
	if got, why := f.left(t).Entries(s); why == "" || len(got) > 0 {
		t.Errorf("%v: got %s (%q), want nothing and a reason", s, brief(got), why)
	}
}

func brief(list []Entry) string {
	if len(list) < 4 {
		return fmt.Sprint(list)
	}
	return fmt.Sprintf("%d entries from %v to %v", len(list), list[0], list[len(list)-1])
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}
