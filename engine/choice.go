package engine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"mica/dev"
)

// Names of the engines, as Status, configuration and commands spell them.
const (
	User   = "user"   // the data path in this process
	Kernel = "kernel" // the kernel's dm-thin
	Auto   = "auto"   // what was noted in the pool's directory
)

// choiceFile is the file beside a pool's data and metadata that notes which engine opens it.
const choiceFile = "engine"

// Noted returns the engine that is noted for the pool in a directory; User if none is.
func Noted(dir string) (string, error) {
	path := filepath.Join(dir, choiceFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return User, nil
	}
	if err != nil {
		return "", err
	}
	switch name := strings.TrimSpace(string(b)); name {
	case User, Kernel:
		return name, nil
	default:
		return "", fmt.Errorf("%s names the engine %.40q, want %s or %s", path, name, User, Kernel)
	}
}

// Note notes which engine opens the pool in a directory from now on; durable when it returns.
func Note(dir, name string) error {
	path := filepath.Join(dir, choiceFile)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(name+"\n"), 0o644); err != nil {
		return err
	}
	f, err := os.Open(tmp)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("note the engine of %s: %w", dir, err)
	}
	return dev.SyncDir(dir)
}
