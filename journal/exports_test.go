package journal

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExports: devices that are given out are in everybody's way but their own daemon's, for as long
// as there are any, and only of this pool and this boot.
func TestExports(t *testing.T) {
	f := newFixture(t, small)
	run := filepath.Join(f.dir, "run")
	e := Exports{Run: run, Dirs: []string{filepath.Join(run, "ublk"), filepath.Join(run, "fuse")}}
	refused := func(run string, want bool) {
		t.Helper()
		err := RefuseExported(f.id, f.o, run)
		if errors.Is(err, ErrExported) != want || !want && err != nil {
			t.Errorf("run %q: %v, want refused: %v", run, err, want)
		}
		if want && (err == nil || !strings.Contains(err.Error(), "--run "+e.Run)) {
			t.Errorf("%v does not say which daemon", err)
		}
	}
	refused("", false)
	must(t, ForgetExports(f.id, f.o)) // there is none
	must(t, NoteExports(f.id, f.o, e))
	refused("", false) // nothing is given out
	att := filepath.Join(run, "fuse", "web")
	must(t, os.MkdirAll(att, 0o700))
	refused("", true)
	refused(filepath.Join(f.dir, "other"), true)
	refused(run, false)
	refused(run+"/../run", false)
	link := filepath.Join(f.dir, "link")
	must(t, os.Symlink(run, link))
	refused(link, false)

	// Another pool in the same place, another boot.
	other := f.id
	other.Born++
	if err := RefuseExported(other, f.o, ""); err != nil {
		t.Errorf("another pool: %v", err)
	}
	path := filepath.Join(f.o.Dirs[0], f.id.name()+exportsSuffix)
	whole, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, []byte(strings.Replace(string(whole), `"boot":[`, `"boot":[1,`, 1)), 0o600))
	refused("", false)
	// What cannot be read may be in the way.
	for name, text := range map[string]string{"cut": string(whole[:20]), "of another version": strings.Replace(string(whole), `"version":1`, `"version":9`, 1)} {
		must(t, os.WriteFile(path, []byte(text), 0o600))
		if err := RefuseExported(f.id, f.o, ""); err == nil {
			t.Errorf("a note that is %s was overlooked", name)
		}
	}
	must(t, os.WriteFile(path, whole, 0o600))
	refused("", true)

	// The last one is detached; the note goes with the pool.
	must(t, os.Remove(att))
	refused("", false)
	must(t, NoteExports(f.id, f.o, e))
	must(t, ForgetExports(f.id, f.o))
	if left, err := os.ReadDir(f.o.Dirs[0]); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestExportsSwept: a note goes with its pool, and is no journal.
func TestExportsSwept(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, to open files by their handles")
	}
	f := newFixture(t, small)
	if len(handleOf(f.id).data) == 0 {
		t.Skip("SKIPPED: this kernel's tmpfs has no file handles")
	}
	gone := filepath.Join(f.dir, "gone")
	must(t, os.WriteFile(gone, nil, 0o600))
	id, err := Identify(gone)
	must(t, err)
	for _, id := range []Identity{id, f.id} {
		must(t, NoteExports(id, f.o, Exports{Run: f.dir}))
	}
	must(t, os.Remove(gone))
	if left, err := Find(f.id, f.o, false); err != nil || len(left) > 0 {
		t.Errorf("journals: %v, %v", left, err)
	}
	f.create(t, state(0))
	for id, want := range map[Identity]bool{id: false, f.id: true} {
		_, err := os.Stat(filepath.Join(f.o.Dirs[0], id.name()+exportsSuffix))
		if (err == nil) != want {
			t.Errorf("note of %s: %v, want it there: %v", id.Path, err, want)
		}
	}
}
