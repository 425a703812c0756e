// Package node keeps the links under which callers find exported devices: /dev/mica/<id> points
// at /dev/loop7.
//
// The minor of a block device is reused as soon as it is free, and callers keep paths for a long
// time. So a link is made only for a live device, is never made to point somewhere else, and is
// removed before its minor is given back: a stale path gives ENOENT, never another's data.
package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// DefaultDir is where links are on a host.
const DefaultDir = "/dev/mica"

// ErrExists: there is a link of this name, for another device.
var ErrExists = errors.New("link exists")

// A Dir is a directory of links. Its methods are safe for concurrent use as far as they concern
// different ids. The zero Dir has no directory: its methods do nothing and Path returns "".
type Dir struct{ path string }

// Open makes the directory if it is missing. An empty path gives the zero Dir.
func Open(path string) (Dir, error) {
	if path == "" {
		return Dir{}, nil
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return Dir{}, err
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return Dir{}, fmt.Errorf("links: %w", err)
	}
	return Dir{path: path}, nil
}

// CheckID says whether id can be the name of a link: 1 to 200 bytes of letters, digits and
// ". _ - + : @", not beginning with a dot or a minus.
func CheckID(id string) error {
	if id == "" || len(id) > 200 || id[0] == '.' || id[0] == '-' {
		return fmt.Errorf("name %q: want 1 to 200 characters, not beginning with '.' or '-'", id)
	}
	for _, c := range []byte(id) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._-+:@", c) >= 0) {
			return fmt.Errorf("name %q: character %q is not allowed", id, c)
		}
	}
	return nil
}

// Path is the path of id's link, whether it is there or not.
func (d Dir) Path(id string) string {
	if d.path == "" {
		return ""
	}
	return filepath.Join(d.path, id)
}

// Make links id to target, the path of a block device that is live and ours. A link that
// already points there is fine; one that points elsewhere gives ErrExists: remove it when
// it is known to be stale, before its minor can have been given to another.
func (d Dir) Make(id, target string) error {
	if d.path == "" {
		return nil
	}
	if err := CheckID(id); err != nil {
		return err
	}
	path := d.Path(id)
	err := os.Symlink(target, path)
	if errors.Is(err, os.ErrExist) {
		old, rerr := os.Readlink(path)
		if rerr == nil && old == target {
			return nil
		}
		return fmt.Errorf("link %s to %s: %w and points to %q", path, target, ErrExists, old)
	}
	return err
}

// Remove takes id's link away. It is fine if there is none. Only links are removed, never files.
func (d Dir) Remove(id string) error {
	if d.path == "" {
		return nil
	}
	if err := CheckID(id); err != nil {
		return err
	}
	path := d.Path(id)
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSymlink == 0 {
		return fmt.Errorf("%s is not a link: left alone", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Links returns all links: id to target.
func (d Dir) Links() (map[string]string, error) {
	links := make(map[string]string)
	if d.path == "" {
		return links, nil
	}
	list, err := os.ReadDir(d.path)
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		if e.Type()&os.ModeSymlink == 0 || CheckID(e.Name()) != nil {
			continue
		}
		if to, err := os.Readlink(filepath.Join(d.path, e.Name())); err == nil {
			links[e.Name()] = to
		}
	}
	return links, nil
}

// RemoveIf removes the links for which stale says yes, and returns their ids. Call it at start,
// before any minor is taken: a link of a dead predecessor must not meet a new device.
func (d Dir) RemoveIf(stale func(id, target string) bool) ([]string, error) {
	links, err := d.Links()
	if err != nil {
		return nil, err
	}
	var removed []string
	for id, target := range links {
		if stale(id, target) {
			if err := d.Remove(id); err != nil {
				return removed, err
			}
			removed = append(removed, id)
		}
	}
	return removed, nil
}
