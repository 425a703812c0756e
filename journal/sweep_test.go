package journal

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSweep: the next journal in a place takes those away whose pools are gone, and no other.
func TestSweep(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, to open files by their handles")
	}
	f := newFixture(t, small)
	if len(handleOf(f.id).data) == 0 {
		t.Skip("SKIPPED: this kernel's tmpfs has no file handles")
	}
	pool := func(name string) (string, string) {
		t.Helper()
		meta := filepath.Join(f.dir, name, "metadata")
		must(t, os.Mkdir(filepath.Dir(meta), 0o700))
		must(t, os.WriteFile(meta, nil, 0o600))
		id, err := Identify(meta)
		must(t, err)
		j, err := Create(id, f.o, state(1), nil)
		must(t, err)
		appendAll(t, j, entries(0, 3))
		must(t, j.Close())
		return meta, j.Path()
	}
	there := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}
	removed, removedJ := pool("removed")
	renamed, renamedJ := pool("renamed")
	linked, linkedJ := pool("linked")
	_, keptJ := pool("kept")
	old, oldJ := pool("old")
	b, err := os.ReadFile(oldJ)
	must(t, err)
	b[8] = version + 1 // whatever it means
	must(t, os.WriteFile(oldJ, b, 0o600))
	odd := filepath.Join(f.o.Dirs[0], "odd")
	must(t, os.WriteFile(odd, []byte("something else"), 0o600))
	must(t, unix.Mkfifo(odd+"2", 0o600))

	must(t, os.RemoveAll(filepath.Dir(removed)))
	must(t, os.Remove(old))
	must(t, os.Rename(filepath.Dir(renamed), filepath.Join(f.dir, "elsewhere")))
	must(t, os.Link(linked, filepath.Join(f.dir, "another name")))
	must(t, os.Remove(linked))
	j := f.create(t, state(0))
	for path, want := range map[string]bool{removedJ: false, renamedJ: true, linkedJ: true, keptJ: true, oldJ: true, odd: true, odd + "2": true, j.Path(): true} {
		if there(path) != want {
			t.Errorf("%s is there: %v, want %v", path, there(path), want)
		}
	}
	// What is in doubt stays: a handle for a file system that cannot be reached, or none.
	h := header{id: Identity{Dev: 4711, Path: removed}, handle: handle{1, []byte{1, 2, 3, 4}}}
	if h.gone() {
		t.Error("a file of an unknown file system is taken to be gone")
	}
	h = header{id: f.id}
	h.id.Path = removed
	if h.gone() {
		t.Error("a file without a handle is taken to be gone")
	}
}
