package catalog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"

	"mica/dev"
)

// makeFile makes an empty catalog file at path if there is none. It appears whole or not at all:
// bbolt begins a file in place, and a power cut in that would leave one that nobody can open.
// Several may do so at once; one file stays.
func makeFile(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newSuffix+"*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if err := tmp.Close(); err != nil {
		return err
	}
	db, err := bbolt.Open(tmp.Name(), 0o600, nil)
	if err != nil {
		return fmt.Errorf("new file: %w", err)
	}
	if err := db.Close(); err != nil {
		return fmt.Errorf("new file: %w", err)
	}
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return dev.SyncDir(filepath.Dir(path))
}

const newSuffix = ".new-"

// dropUnfinished removes what a makeFile that died has left. The caller has the catalog locked.
func dropUnfinished(path string) {
	dir, base := filepath.Split(path)
	left, _ := os.ReadDir(filepath.Clean(dir + "."))
	for _, e := range left {
		if strings.HasPrefix(e.Name(), base+newSuffix) {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
