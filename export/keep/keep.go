// Package keep is what exporters have in common whose nodes outlive their server: one exporter at a
// time in a run directory, the names that are in use, and records in files of what a successor must
// know.
package keep

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// lockWait is how long a start waits for a predecessor that is dying.
const lockWait = 10 * time.Second

// Lock makes a directory and takes it for this process. Closing the file gives it back.
func Lock(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockWait); ; <-time.After(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("%s is used by another exporter: %w", dir, err)
		}
	}
}

// Records are JSON files of one directory, by name. A process that is killed in the middle of a
// change leaves the old record, or none; Tidy clears away what else it leaves. R is versioned by the
// directory: records of another version are listed as nil.
type Records[R any] struct {
	Dir     string
	Version int
}

const suffix = ".json"

type envelope[R any] struct {
	Version int `json:"version"`
	Record  *R  `json:"record"`
}

func (r Records[R]) path(name string) string { return filepath.Join(r.Dir, name+suffix) }

// Tidy removes changes that were never finished: a directory without records is empty. Before the
// first Put.
func (r Records[R]) Tidy() error {
	list, err := filepath.Glob(filepath.Join(r.Dir, ".*"))
	for _, f := range list {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

// Put makes or changes a record.
func (r Records[R]) Put(name string, rec R) error {
	b, err := json.Marshal(envelope[R]{r.Version, &rec})
	if err != nil {
		return err
	}
	tmp := filepath.Join(r.Dir, "."+name)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return os.Rename(tmp, r.path(name))
}

// Drop removes a record. It is fine if there is none.
func (r Records[R]) Drop(name string) error {
	if err := os.Remove(r.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Get returns a record, nil if there is none that can be read.
func (r Records[R]) Get(name string) (*R, error) {
	b, err := os.ReadFile(r.path(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	var e envelope[R]
	if json.Unmarshal(b, &e) != nil || e.Version != r.Version {
		return nil, nil
	}
	return e.Record, nil
}

// List returns all records by name. Those that cannot be read are nil.
func (r Records[R]) List() (map[string]*R, error) {
	files, err := os.ReadDir(r.Dir)
	if err != nil {
		return nil, err
	}
	all := make(map[string]*R)
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), suffix)
		if !ok || node.CheckID(name) != nil {
			continue
		}
		if all[name], err = r.Get(name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Names are the attachments of an exporter. The zero Names is ready; safe for concurrent use.
type Names[A any] struct {
	mu     sync.Mutex
	atts   map[string]*A // guarded by mu; nil value: claimed
	closed bool          // guarded by mu
}

// Claim takes a name for an attach, adopt or drop under way, which Settle ends. Returns
// export.ErrExists, dev.ErrClosed, or what is wrong with the name.
func (n *Names[A]) Claim(name string) error {
	if err := node.CheckID(name); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return dev.ErrClosed
	}
	if _, ok := n.atts[name]; ok {
		return export.ErrExists
	}
	if n.atts == nil {
		n.atts = make(map[string]*A)
	}
	n.atts[name] = nil
	return nil
}

// Settle ends a claim, or an attachment: a is what has the name from now on, nil for nothing.
func (n *Names[A]) Settle(name string, a *A) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a == nil {
		delete(n.atts, name)
	} else {
		n.atts[name] = a
	}
}

// Has reports whether a name is claimed or in use.
func (n *Names[A]) Has(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.atts[name]
	return ok
}

// List returns the attachments, sorted by name.
func (n *Names[A]) List() []*A {
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []*A
	for _, name := range slices.Sorted(maps.Keys(n.atts)) {
		if a := n.atts[name]; a != nil {
			list = append(list, a)
		}
	}
	return list
}

// Close makes every later Claim fail. False if it was closed before.
func (n *Names[A]) Close() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.closed
	n.closed = true
	return !was
}

// Closed reports whether Close was called.
func (n *Names[A]) Closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}
