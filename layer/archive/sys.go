package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// retry repeats a system call that a signal interrupted.
func retry[T any](f func() (T, error)) (T, error) {
	for {
		v, err := f()
		if !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}

func retry0(f func() error) error {
	_, err := retry(func() (struct{}, error) { return struct{}{}, f() })
	return err
}

func readlinkat(fd int, base string) (string, error) {
	buf := make([]byte, 4096)
	n, err := unix.Readlinkat(fd, base, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func fstatat(fd int, base string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

func isDir(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

// pwriteAll writes all of p at off.
func pwriteAll(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := retry(func() (int, error) { return unix.Pwrite(fd, p, off) })
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("write of %d bytes at %d wrote nothing", len(p), off)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// A dirent is one name in a directory.
type dirent struct {
	name string
	ino  uint64
	typ  uint8 // unix.DT_*
}

// readDir returns what is in an open directory, sorted by name.
func readDir(fd int) ([]dirent, error) {
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	buf := make([]byte, 32<<10)
	var list []dirent
	for {
		n, err := retry(func() (int, error) { return unix.ReadDirent(fd, buf) })
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			slices.SortFunc(list, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
			return list, nil
		}
		list = parseDirents(list, buf[:n])
	}
}

// readDirNames returns the sorted names in an open directory.
func readDirNames(fd int) ([]string, error) {
	list, err := readDir(fd)
	names := make([]string, len(list))
	for i, e := range list {
		names[i] = e.name
	}
	return names, err
}

// parseDirents appends what getdents64 returned, in the host's byte order:
//
//	offset  size  field
//	0       8     inode number; 0: a name that is gone
//	8       8     where the next one is, for the kernel
//	16      2     length of this entry
//	18      1     type
//	19            name, ended by a NUL
func parseDirents(list []dirent, b []byte) []dirent {
	const nameAt = 19
	for len(b) > nameAt {
		n := int(binary.NativeEndian.Uint16(b[16:]))
		if n <= nameAt || n > len(b) {
			return list
		}
		name := b[nameAt:n]
		if end := bytes.IndexByte(name, 0); end >= 0 {
			name = name[:end]
		}
		e := dirent{name: string(name), ino: binary.NativeEndian.Uint64(b), typ: b[18]}
		if e.ino != 0 && e.name != "." && e.name != ".." {
			list = append(list, e)
		}
		b = b[n:]
	}
	return list
}

// procPath is a path to base inside the open directory fd for the calls that know no *at form.
// The kernel resolves it through the descriptor; calls used with it must not follow base.
func procPath(fd int, base string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, base)
}

func hasDefaultACL(fd int) bool {
	_, err := unix.Fgetxattr(fd, aclDefault, nil)
	return err == nil
}

// An xattrHandle reads and changes the extended attributes of one file: by descriptor where
// there is one, else (symbolic links, devices, fifos) by a path that is not followed.
type xattrHandle struct {
	fd   int    // -1 if there is none
	path string // from procPath
}

func (h xattrHandle) list() ([]string, error) {
	for size := 1024; ; size *= 4 {
		buf := make([]byte, size)
		n, err := retry(func() (int, error) {
			if h.fd >= 0 {
				return unix.Flistxattr(h.fd, buf)
			}
			return unix.Llistxattr(h.path, buf)
		})
		if errors.Is(err, unix.ERANGE) && size < 1<<20 {
			continue
		}
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		if err != nil {
			return nil, os.NewSyscallError("listxattr", err)
		}
		var names []string
		for name := range bytes.SplitSeq(buf[:n], []byte{0}) {
			if len(name) > 0 {
				names = append(names, string(name))
			}
		}
		sort.Strings(names)
		return names, nil
	}
}

func (h xattrHandle) get(name string) ([]byte, error) {
	for size := 256; ; size *= 16 {
		buf := make([]byte, size)
		n, err := retry(func() (int, error) {
			if h.fd >= 0 {
				return unix.Fgetxattr(h.fd, name, buf)
			}
			return unix.Lgetxattr(h.path, name, buf)
		})
		if errors.Is(err, unix.ERANGE) && size < maxValue {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

func (h xattrHandle) set(name string, value []byte) error {
	return retry0(func() error {
		if h.fd >= 0 {
			return unix.Fsetxattr(h.fd, name, value, 0)
		}
		return unix.Lsetxattr(h.path, name, value, 0)
	})
}

func (h xattrHandle) remove(name string) error {
	return retry0(func() error {
		if h.fd >= 0 {
			return unix.Fremovexattr(h.fd, name)
		}
		return unix.Lremovexattr(h.path, name)
	})
}
