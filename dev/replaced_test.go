package dev

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestLockOfReplacedFile: the lock of a file that was opened and then replaced is none of the path.
func TestLockOfReplacedFile(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, p := range []string{path, other} {
		if err := os.WriteFile(p, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := openFd(path, OpenOptions{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
	if f, err := newFile(path, fd, OpenOptions{Lock: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("%v", err)
		if err == nil {
			f.Close()
		}
	}
	f, err := Open(path, OpenOptions{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}
