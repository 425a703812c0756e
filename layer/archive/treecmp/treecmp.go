// Package treecmp compares file trees for tests: names, types, contents, modes, owners,
// modification times, symbolic link targets, device numbers, hard links and extended
// attributes. It shares no code with what it tests.
package treecmp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options leave things out of a comparison.
type Options struct {
	IgnoreTimes    bool
	IgnoreDirTimes bool
	IgnoreRoot     bool                   // attributes of the root directory itself
	Skip           func(path string) bool // leaves out a path, for directories with all below
	SkipXattr      func(name string) bool
}

// A Node is one file of a tree.
type Node struct {
	Mode   uint32 // type and permission bits, as in stat
	UID    uint32
	GID    uint32
	MTime  time.Time
	Size   int64
	Rdev   uint64
	Target string // of a symbolic link
	Sum    string // SHA-256 of a regular file's content, hex
	Xattrs map[string]string
	Links  string // all names of the inode inside the tree if there are several, "a = b"
	Nlink  uint64
	Blocks int64 // units of 512 bytes; not compared
}

// A Tree maps paths relative to the root ("." is the root) to nodes.
type Tree map[string]Node

// Read reads a tree. It does not follow symbolic links.
func Read(root string, o Options) (Tree, error) {
	t := Tree{}
	inodes := map[uint64][]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if o.Skip != nil && o.Skip(rel) {
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		n, ino, err := readNode(path, o)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if n.Mode&unix.S_IFMT != unix.S_IFDIR && n.Nlink > 1 {
			inodes[ino] = append(inodes[ino], rel)
		}
		t[rel] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, paths := range inodes {
		if len(paths) < 2 {
			continue
		}
		sort.Strings(paths)
		for _, p := range paths {
			n := t[p]
			n.Links = strings.Join(paths, " = ")
			t[p] = n
		}
	}
	return t, nil
}

func readNode(path string, o Options) (Node, uint64, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		return Node{}, 0, err
	}
	n := Node{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Size: st.Size, Nlink: uint64(st.Nlink), Blocks: st.Blocks,
		MTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec).UTC(),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f, err := os.Open(path)
		if err != nil {
			return n, 0, err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return n, 0, err
		}
		n.Sum = fmt.Sprintf("%x", h.Sum(nil))
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return n, 0, err
		}
		n.Target = target
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = st.Rdev
	case unix.S_IFDIR:
		n.Size = 0
	}
	buf := make([]byte, 1<<16)
	size, err := unix.Llistxattr(path, buf)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return n, 0, fmt.Errorf("list attributes: %w", err)
	}
	for name := range strings.SplitSeq(string(buf[:max(size, 0)]), "\x00") {
		if name == "" || (o.SkipXattr != nil && o.SkipXattr(name)) {
			continue
		}
		val := make([]byte, 1<<16)
		size, err := unix.Lgetxattr(path, name, val)
		if err != nil {
			return n, 0, fmt.Errorf("attribute %s: %w", name, err)
		}
		if n.Xattrs == nil {
			n.Xattrs = map[string]string{}
		}
		n.Xattrs[name] = string(val[:size])
	}
	return n, st.Ino, nil
}

// Diff reads two trees and returns one line for each difference, sorted; none if they agree.
func Diff(got, want string, o Options) ([]string, error) {
	g, err := Read(got, o)
	if err != nil {
		return nil, err
	}
	w, err := Read(want, o)
	if err != nil {
		return nil, err
	}
	return Compare(g, w, o), nil
}

// Compare returns one line for each difference between two trees, sorted by path.
func Compare(got, want Tree, o Options) []string {
	var paths []string
	for p := range got {
		paths = append(paths, p)
	}
	for p := range want {
		if _, ok := got[p]; !ok {
			paths = append(paths, p)
		}
	}
	sort.Strings(paths)
	var out []string
	for _, p := range paths {
		g, inGot := got[p]
		w, inWant := want[p]
		switch {
		case !inGot:
			out = append(out, fmt.Sprintf("%q: missing, want mode %o", p, w.Mode))
		case !inWant:
			out = append(out, fmt.Sprintf("%q: mode %o, want no such name", p, g.Mode))
		default:
			if p == "." && o.IgnoreRoot {
				continue
			}
			for _, d := range compareNodes(g, w, o) {
				out = append(out, fmt.Sprintf("%q: %s", p, d))
			}
		}
	}
	return out
}

func compareNodes(g, w Node, o Options) []string {
	var out []string
	add := func(what string, got, want any) {
		out = append(out, fmt.Sprintf("%s %v, want %v", what, got, want))
	}
	if g.Mode != w.Mode {
		add("mode", fmt.Sprintf("%o", g.Mode), fmt.Sprintf("%o", w.Mode))
	}
	if g.UID != w.UID || g.GID != w.GID {
		add("owner", fmt.Sprintf("%d:%d", g.UID, g.GID), fmt.Sprintf("%d:%d", w.UID, w.GID))
	}
	if g.Size != w.Size {
		add("size", g.Size, w.Size)
	}
	if g.Sum != w.Sum {
		add("content sha256", g.Sum, w.Sum)
	}
	if g.Target != w.Target {
		add("link target", fmt.Sprintf("%q", g.Target), fmt.Sprintf("%q", w.Target))
	}
	if g.Rdev != w.Rdev {
		add("device", fmt.Sprintf("%d:%d", unix.Major(g.Rdev), unix.Minor(g.Rdev)),
			fmt.Sprintf("%d:%d", unix.Major(w.Rdev), unix.Minor(w.Rdev)))
	}
	if g.Links != w.Links {
		add("names of the inode", fmt.Sprintf("%q", g.Links), fmt.Sprintf("%q", w.Links))
	}
	dir := g.Mode&unix.S_IFMT == unix.S_IFDIR
	if !o.IgnoreTimes && !(dir && o.IgnoreDirTimes) && !g.MTime.Equal(w.MTime) {
		add("mtime", g.MTime.Format(time.RFC3339Nano), w.MTime.Format(time.RFC3339Nano))
	}
	var names []string
	for name := range g.Xattrs {
		names = append(names, name)
	}
	for name := range w.Xattrs {
		if _, ok := g.Xattrs[name]; !ok {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		gv, inG := g.Xattrs[name]
		wv, inW := w.Xattrs[name]
		if inG != inW || gv != wv {
			add("attribute "+name, show(gv, inG), show(wv, inW))
		}
	}
	return out
}

func show(v string, ok bool) string {
	if !ok {
		return "none"
	}
	if len(v) > 40 {
		return fmt.Sprintf("%q… (%d bytes)", v[:40], len(v))
	}
	return fmt.Sprintf("%q", v)
}
