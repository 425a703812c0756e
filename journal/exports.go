package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A process that gives out devices of a pool as block devices leaves them, when it ends or is killed,
// to the next one with the same run directory: requests wait in the kernel for it. Whoever else
// writes to the pool meanwhile pulls it away from under them. So there is a note beside the place of
// the journal that says whose devices they may be; it is there as long as the pool is open, and
// longer if any are left.

// Exports say who gives out devices of a pool.
type Exports struct {
	Run  string   `json:"run"`  // run directory of whoever does, and of its successor
	Dirs []string `json:"dirs"` // directories with an entry for each device that is given out
}

// ErrExported: devices of the pool are given out, and their process is gone.
var ErrExported = errors.New("devices of the pool are given out")

// An exportsNote is the file.
type exportsNote struct {
	Version int      `json:"version"`
	Boot    [16]byte `json:"boot"`
	Pool    Identity `json:"pool"`
	Kind    int32    `json:"handle_kind"`
	Handle  []byte   `json:"handle"` // of the metadata file, see sweep
	Exports
}

const (
	exportsVersion = 1
	exportsSuffix  = ".exports"
	maxExportsNote = 64 << 10
)

// NoteExports says that e may give out devices of a pool from now on. The caller holds the pool's
// lock. The paths become absolute.
func NoteExports(id Identity, o Options, e Exports) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	h := handleOf(id)
	n := exportsNote{Version: exportsVersion, Boot: boot, Pool: id, Kind: h.kind, Handle: h.data}
	if n.Run, err = filepath.Abs(e.Run); err != nil {
		return err
	}
	for _, d := range e.Dirs {
		if d, err = filepath.Abs(d); err != nil {
			return err
		}
		n.Dirs = append(n.Dirs, d)
	}
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	var why []error
	for _, dir := range o.dirs(id.UID) {
		if err = putNote(dir, id, b); err == nil {
			return nil
		}
		why = append(why, err)
	}
	return fmt.Errorf("%w: %w", ErrNoPlace, errors.Join(why...))
}

func putNote(dir string, id Identity, b []byte) error {
	fd, err := openDir(dir, id.UID, true)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	name := id.name() + exportsSuffix
	tmp := name + newSuffix
	if err := unix.Unlinkat(fd, tmp, 0); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "remove", Path: filepath.Join(dir, tmp), Err: err}
	}
	file, err := unix.Openat(fd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: filepath.Join(dir, tmp), Err: err}
	}
	f := os.NewFile(uintptr(file), filepath.Join(dir, tmp))
	_, err = f.Write(b)
	if err == nil && int(id.UID) != os.Geteuid() {
		err = f.Chown(int(id.UID), -1)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = unix.Renameat(fd, tmp, fd, name)
	}
	if err != nil {
		unix.Unlinkat(fd, tmp, 0)
	}
	return err
}

// ForgetExports takes the note of a pool away. The caller holds the pool's lock.
func ForgetExports(id Identity, o Options) error {
	var errs []error
	for _, dir := range o.dirs(id.UID) {
		fd, err := openDir(dir, id.UID, false)
		if err != nil {
			continue // no note of ours is there
		}
		if err := unix.Unlinkat(fd, id.name()+exportsSuffix, 0); err != nil && err != unix.ENOENT {
			errs = append(errs, &os.PathError{Op: "remove", Path: filepath.Join(dir, id.name()+exportsSuffix), Err: err})
		}
		unix.Close(fd)
	}
	return errors.Join(errs...)
}

// ExportsOf returns who gives out devices of a pool at this moment, nil if nobody does. Of a pool
// that is open this is no news: the caller holds its lock.
func ExportsOf(id Identity, o Options) (*Exports, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	for _, dir := range o.dirs(id.UID) {
		fd, err := openDir(dir, id.UID, false)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNotHere) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for exports of %s: %w", id.Path, err)
		}
		n, err := readNote(fd, id.name()+exportsSuffix, id.UID)
		unix.Close(fd)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("exports of %s: %s: %w: remove it if nothing of the pool is mounted or attached", id.Path, filepath.Join(dir, id.name()+exportsSuffix), err)
		}
		if n.Boot == boot && n.Pool.same(id) && n.Exports.Any() {
			return &n.Exports, nil
		}
	}
	return nil, nil
}

func readNote(dir int, name string, uid uint32) (*exportsNote, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != uid || st.Size > maxExportsNote {
		return nil, fmt.Errorf("not a small file of user %d: %w", uid, ErrDamaged)
	}
	b := make([]byte, st.Size)
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		return nil, err
	}
	var note exportsNote
	if err := json.Unmarshal(b[:n], &note); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if note.Version != exportsVersion {
		return nil, fmt.Errorf("version %d, this build reads %d: %w", note.Version, exportsVersion, ErrVersion)
	}
	return &note, nil
}

// Any reports whether there is an entry in one of the directories.
func (e *Exports) Any() bool {
	for _, dir := range e.Dirs {
		if f, err := os.Open(dir); err == nil {
			names, _ := f.Readdirnames(1)
			f.Close()
			if len(names) > 0 {
				return true
			}
		}
	}
	return false
}

// Same reports whether e are those of a run directory.
func (e *Exports) Same(run string) bool {
	if abs, err := filepath.Abs(run); err == nil && abs == e.Run {
		return true
	}
	a, aerr := os.Stat(run)
	b, berr := os.Stat(e.Run)
	return aerr == nil && berr == nil && os.SameFile(a, b)
}

// RefuseExported returns ErrExported, with what to do, if devices of the pool are given out by
// somebody else than run, which may be empty. The caller holds the pool's lock and is about to
// write.
func RefuseExported(id Identity, o Options, run string) error {
	e, err := ExportsOf(id, o)
	if err != nil || e == nil || run != "" && e.Same(run) {
		return err
	}
	return fmt.Errorf("%w by a daemon that is gone, and wait for the next one (%s): start 'mica serve --run %s', and detach them, or end it with 'mica shutdown --run %s'",
		ErrExported, strings.Join(e.entries(3), ", "), e.Run, e.Run)
}

// entries names some of the devices.
func (e *Exports) entries(most int) (paths []string) {
	for _, dir := range e.Dirs {
		list, _ := os.ReadDir(dir)
		for _, f := range list {
			if len(paths) == most {
				return append(paths, "...")
			}
			paths = append(paths, filepath.Join(dir, f.Name()))
		}
	}
	return paths
}

// goneNote reports whether a file in a directory of journals is the note of a pool that is no more.
func goneNote(dir int, name string, uid uint32, boot [16]byte) bool {
	base, ok := strings.CutSuffix(name, exportsSuffix)
	if !ok {
		return false
	}
	n, err := readNote(dir, name, uid)
	if err != nil || n.Boot != boot || n.Pool.name() != base || len(n.Handle) > maxHandle {
		return false
	}
	h := header{id: n.Pool, handle: handle{n.Kind, n.Handle}}
	return h.gone()
}
