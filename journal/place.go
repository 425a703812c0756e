package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Options say where a journal is and how long. The zero value is right for everybody but tests.
type Options struct {
	// Bytes is the length of a new journal; 0: 64 MiB. Where the tmpfs has no room for it a
	// shorter one is made, of at least 1 MiB.
	Bytes int64
	// Dirs are the places that are tried, in this order; nil: those of the owner of the pool.
	Dirs []string
}

const (
	defaultBytes = 64 << 20
	leastBytes   = 1 << 20
	maxBytes     = 4 << 30
)

func (o Options) dirs(uid uint32) []string {
	switch {
	case o.Dirs != nil:
		return o.Dirs
	case uid == 0:
		return []string{"/run/mica-journal", "/dev/shm/mica-journal"}
	}
	return []string{fmt.Sprintf("/run/user/%d/mica-journal", uid), fmt.Sprintf("/dev/shm/mica-journal-%d", uid)}
}

// errNotHere: a directory cannot hold journals; another one may.
var errNotHere = errors.New("no journals here")

// openDir opens a directory of journals and refuses one that others could have a hand in. Anybody
// can make directories in /dev/shm.
func openDir(path string, uid uint32, create bool) (int, error) {
	if create {
		if err := onTmpfs(path, filepath.Dir(path)); err != nil {
			return -1, err
		}
		if err := unix.Mkdir(path, 0o700); err == nil {
			if int(uid) != os.Geteuid() {
				if err := os.Lchown(path, int(uid), -1); err != nil {
					os.Remove(path)
					return -1, err
				}
			}
		} else if err != unix.EEXIST {
			return -1, &os.PathError{Op: "mkdir", Path: path, Err: err}
		}
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := checkDir(fd, path, uid); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func checkDir(fd int, path string, uid uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Uid != uid || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s: belongs to user %d with mode %#o, want user %d with mode 0700: remove it", path, st.Uid, st.Mode&0o777, uid)
	}
	return tmpfs(fd, path)
}

// onTmpfs looks at the first of the paths that is there.
func onTmpfs(paths ...string) error {
	for _, p := range paths {
		fd, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: p, Err: err}
		}
		err = tmpfs(fd, p)
		unix.Close(fd)
		return err
	}
	return fmt.Errorf("%s: %w: %w", paths[len(paths)-1], errNotHere, os.ErrNotExist)
}

// tmpfs refuses other file systems: what is written there must stay in memory, be there at once,
// and be gone with the machine.
func tmpfs(fd int, path string) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("%s is not on tmpfs: %w", path, errNotHere)
	}
	return nil
}

// A mapping is a journal's file, mapped.
type mapping struct {
	path string
	dir  int // descriptor of the directory
	name string
	mem  []byte
}

func (m *mapping) unmap() error {
	var err error
	if m.mem != nil {
		err = unix.Munmap(m.mem)
		m.mem = nil
	}
	if m.dir >= 0 {
		unix.Close(m.dir)
		m.dir = -1
	}
	return err
}

// unlink takes the file's name away.
func (m *mapping) unlink() error {
	if err := unix.Unlinkat(m.dir, m.name, 0); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "remove", Path: m.path, Err: err}
	}
	return nil
}

// openFile maps an existing file of a directory. The directory's descriptor is the mapping's from
// then on, also when it fails.
func openFile(dir int, path string, uid uint32, writable bool) (_ *mapping, err error) {
	m := &mapping{path: path, dir: dir, name: filepath.Base(path)}
	defer func() {
		if err != nil {
			m.unmap()
		}
	}()
	mode, prot := unix.O_RDONLY, unix.PROT_READ
	if writable {
		mode, prot = unix.O_RDWR, unix.PROT_READ|unix.PROT_WRITE
	}
	fd, err := unix.Openat(dir, m.name, mode|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != uid || st.Nlink != 1 || st.Mode&0o077 != 0 {
		return nil, fmt.Errorf("%s: not a file of user %d alone: remove it", path, uid)
	}
	if st.Size < slotsAt || st.Size > maxBytes {
		return m, nil // nothing to map: it is damaged
	}
	m.mem, err = unix.Mmap(fd, 0, int(st.Size), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, &os.PathError{Op: "map", Path: path, Err: err}
	}
	return m, nil
}

// newFile makes a file of size bytes under a name that nobody looks for, with all its memory
// allocated, and maps it.
func newFile(dir int, path string, uid uint32, size int64) (_ *mapping, err error) {
	m := &mapping{path: path, dir: dir, name: filepath.Base(path) + newSuffix}
	if err := unix.Unlinkat(dir, m.name, 0); err != nil && err != unix.ENOENT {
		return nil, &os.PathError{Op: "remove", Path: path + newSuffix, Err: err}
	}
	fd, err := unix.Openat(dir, m.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: path + newSuffix, Err: err}
	}
	defer unix.Close(fd)
	defer func() {
		if err != nil {
			m.unlink()
		}
	}()
	if int(uid) != os.Geteuid() {
		if err := unix.Fchown(fd, int(uid), -1); err != nil {
			return nil, &os.PathError{Op: "chown", Path: path + newSuffix, Err: err}
		}
	}
	for {
		err := unix.Fallocate(fd, 0, 0, size)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "allocate", Path: path + newSuffix, Err: err}
		}
		break
	}
	m.mem, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, &os.PathError{Op: "map", Path: path + newSuffix, Err: err}
	}
	return m, nil
}

const newSuffix = ".new"

// publish gives a new file its name, in place of what had it.
func (m *mapping) publish() error {
	name := strings.TrimSuffix(m.name, newSuffix)
	if err := unix.Renameat(m.dir, m.name, m.dir, name); err != nil {
		return &os.PathError{Op: "rename", Path: m.path, Err: err}
	}
	m.name = name
	return nil
}
