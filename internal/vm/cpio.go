package vm

import (
	"fmt"
	"io"
	"path"
	"sort"
	"strings"
)

// File types of a cpio entry's mode, as in stat(2).
const (
	modeDir  = 0o040000
	modeReg  = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

// An archive collects the files of an initramfs and writes them as cpio "newc", the format the
// kernel unpacks: per entry a header of 110 ASCII bytes (magic 070701 and 13 numbers of 8 hex
// digits), the name with a NUL, padding to 4 bytes, the content, padding to 4 bytes; the last
// entry is named TRAILER!!!. Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
type archive struct {
	entries map[string]entry // by path without leading slash
}

type entry struct {
	mode         uint32
	data         []byte
	major, minor uint32 // of a device node
}

func newArchive() *archive { return &archive{entries: map[string]entry{}} }

// add puts an entry at name and makes its parent directories.
func (a *archive) add(name string, e entry) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := a.entries[dir]; !ok {
			a.entries[dir] = entry{mode: modeDir | 0o755}
		}
	}
	a.entries[name] = e
}

func (a *archive) file(name string, perm uint32, data []byte) {
	a.add(name, entry{mode: modeReg | perm, data: data})
}

func (a *archive) dir(name string) { a.add(name, entry{mode: modeDir | 0o755}) }

func (a *archive) symlink(name, target string) {
	a.add(name, entry{mode: modeLink | 0o777, data: []byte(target)})
}

func (a *archive) charDevice(name string, major, minor uint32) {
	a.add(name, entry{mode: modeChar | 0o600, major: major, minor: minor})
}

// writeTo writes the archive, parents before children.
func (a *archive) writeTo(w io.Writer) error {
	names := make([]string, 0, len(a.entries))
	for name := range a.entries {
		names = append(names, name)
	}
	sort.Strings(names) // "a" sorts before "a/b"
	for i, name := range names {
		if err := writeEntry(w, uint32(i+1), name, a.entries[name]); err != nil {
			return err
		}
	}
	return writeEntry(w, 0, "TRAILER!!!", entry{})
}

func writeEntry(w io.Writer, ino uint32, name string, e entry) error {
	links := 1
	if e.mode&modeDir != 0 && e.mode&modeReg == 0 {
		links = 2
	}
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		ino, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(name)+1, 0)
	head += name + "\x00"
	if _, err := io.WriteString(w, head+padding(len(head))); err != nil {
		return err
	}
	if _, err := w.Write(e.data); err != nil {
		return err
	}
	_, err := io.WriteString(w, padding(len(e.data)))
	return err
}

// padding is what brings n bytes to a multiple of 4.
func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
