package engine

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNote(t *testing.T) {
	dir := t.TempDir()
	want := func(name string) {
		t.Helper()
		if got, err := Noted(dir); err != nil || got != name {
			t.Errorf("noted: got %q (%v), want %q", got, err, name)
		}
	}
	want(User)
	for _, name := range []string{Kernel, User, Kernel} {
		if err := Note(dir, name); err != nil {
			t.Fatal(err)
		}
		want(name)
	}
	if err := os.WriteFile(filepath.Join(dir, "engine"), []byte("warp drive\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Noted(dir); err == nil {
		t.Errorf("an unknown engine was read as %q", got)
	}
	if list, _ := filepath.Glob(filepath.Join(dir, "*")); len(list) != 1 {
		t.Errorf("left in the directory: %v", list)
	}
}
