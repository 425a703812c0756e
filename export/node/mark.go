package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Marks tell udev's rules which nodes are ours: a file DIR/.nodes/KERNELNAME is there before the
// kernel announces the node of that name, and until it is gone. Loop devices and those of
// device-mapper need none: rules can see what they are by themselves. The rules that are shipped look
// in DefaultDir.
const marksDir = ".nodes"

func (d Dir) mark(kernelName string) string { return filepath.Join(d.path, marksDir, kernelName) }

// Mark marks a node, such as "ublkb3", as owner's, which is the run directory of a daemon: several
// can have links in one directory.
func (d Dir) Mark(kernelName, owner string) error {
	if d.path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Join(d.path, marksDir), 0o755); err != nil {
		return fmt.Errorf("mark %s: %w", kernelName, err)
	}
	return os.WriteFile(d.mark(kernelName), []byte(owner+"\n"), 0o644)
}

// Unmark takes a mark away. It is fine if there is none.
func (d Dir) Unmark(kernelName string) error {
	if d.path == "" {
		return nil
	}
	if err := os.Remove(d.mark(kernelName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// UnmarkIf takes away the marks of owner for which stale says yes.
func (d Dir) UnmarkIf(owner string, stale func(kernelName string) bool) error {
	if d.path == "" {
		return nil
	}
	list, err := os.ReadDir(filepath.Join(d.path, marksDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, f := range list {
		b, err := os.ReadFile(d.mark(f.Name()))
		if err == nil && strings.TrimSpace(string(b)) == owner && stale(f.Name()) {
			if err := d.Unmark(f.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}
