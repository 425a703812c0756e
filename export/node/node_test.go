package node

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func open(t *testing.T) Dir {
	t.Helper()
	d, err := Open(filepath.Join(t.TempDir(), "a", "links"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestMakeRemove(t *testing.T) {
	d := open(t)
	if err := d.Make("c1", "/dev/loop3"); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(d.Path("c1")); err != nil || to != "/dev/loop3" {
		t.Fatalf("%q, %v", to, err)
	}
	if err := d.Make("c1", "/dev/loop3"); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := d.Make("c1", "/dev/loop4"); !errors.Is(err, ErrExists) {
		t.Errorf("another device: %v, want ErrExists", err)
	}
	if to, _ := os.Readlink(d.Path("c1")); to != "/dev/loop3" {
		t.Errorf("link was changed to %q", to)
	}
	for range 2 {
		if err := d.Remove("c1"); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Make("c1", "/dev/loop4"); err != nil {
		t.Errorf("after remove: %v", err)
	}
}

// TestForeignFiles: what is not a link is neither replaced nor removed.
func TestForeignFiles(t *testing.T) {
	d := open(t)
	path := d.Path("file")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Make("file", "/dev/loop0"); !errors.Is(err, ErrExists) {
		t.Errorf("make: %v", err)
	}
	if err := d.Remove("file"); err == nil {
		t.Error("removed")
	}
	if removed, err := d.RemoveIf(func(string, string) bool { return true }); err != nil || len(removed) != 0 {
		t.Errorf("removed %v, %v", removed, err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "x" {
		t.Errorf("file: %q, %v", b, err)
	}
}

func TestRemoveIf(t *testing.T) {
	d := open(t)
	all := map[string]string{"a": "/dev/loop1", "b": "/dev/loop2", "c": "/dev/loop3"}
	for id, to := range all {
		if err := d.Make(id, to); err != nil {
			t.Fatal(err)
		}
	}
	got := make(map[string]string)
	removed, err := d.RemoveIf(func(id, target string) bool {
		got[id] = target
		return id != "b"
	})
	slices.Sort(removed)
	if err != nil || !slices.Equal(removed, []string{"a", "c"}) || !maps.Equal(got, all) {
		t.Fatalf("removed %v, %v; asked about %v", removed, err, got)
	}
	left, err := d.Links()
	if err != nil || !maps.Equal(left, map[string]string{"b": "/dev/loop2"}) {
		t.Fatalf("left %v, %v", left, err)
	}
}

func TestCheckID(t *testing.T) {
	for _, id := range []string{"a", "C1", "mica_1.2-3+x:y@z", strings.Repeat("x", 200)} {
		if err := CheckID(id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	d := open(t)
	for _, id := range []string{"", ".", "..", ".x", "-x", "a/b", "../x", "a b", "a\n", "a\x00", "ä", strings.Repeat("x", 201)} {
		if CheckID(id) == nil {
			t.Errorf("%q: accepted", id)
		}
		if d.Make(id, "/dev/loop0") == nil || d.Remove(id) == nil {
			t.Errorf("%q: accepted by the directory", id)
		}
	}
}

func TestNoDirectory(t *testing.T) {
	d, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Make("a", "/dev/loop0"); err != nil || d.Remove("a") != nil || d.Path("a") != "" {
		t.Error("the zero directory does something")
	}
	if l, err := d.Links(); err != nil || len(l) != 0 {
		t.Errorf("%v, %v", l, err)
	}
}

func TestMarks(t *testing.T) {
	d := open(t)
	marks := func() []string {
		list, err := os.ReadDir(filepath.Join(d.Path(".nodes")))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range list {
			names = append(names, f.Name())
		}
		return names
	}
	for name, owner := range map[string]string{"ublkb1": "/run/a", "ublkb2": "/run/b", "nbd1": "/run/a", "nbd7": "/run/a"} {
		if err := d.Mark(name, owner); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Unmark("nbd7"); err != nil {
		t.Fatal(err)
	}
	if err := d.Unmark("nbd7"); err != nil {
		t.Errorf("unmark twice: %v", err)
	}
	if err := d.UnmarkIf("/run/a", func(name string) bool { return strings.HasPrefix(name, "ublkb") }); err != nil {
		t.Fatal(err)
	}
	if got := marks(); !slices.Equal(got, []string{"nbd1", "ublkb2"}) {
		t.Errorf("marks %q", got)
	}
	if links, err := d.Links(); err != nil || len(links) > 0 {
		t.Errorf("marks count as links: %v, %v", links, err)
	}
	var none Dir
	if err := errors.Join(none.Mark("x", "y"), none.Unmark("x"), none.UnmarkIf("y", func(string) bool { return true })); err != nil {
		t.Error(err)
	}
}
