package archive

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// errHidden: a whiteout is below a directory that became a link in this same tar. Some builders
// list all that was in such a directory; it is gone already.
var errHidden = errors.New("hidden already")

// whiteout applies an entry whose last component begins with ".wh.". Where there is nothing to
// hide it does nothing, and makes no directory either.
func (a *applier) whiteout(parent []string, base string) error {
	if strings.HasPrefix(base, whMeta) && base != whOpaque {
		return nil // bookkeeping of AUFS, no content
	}
	name := strings.TrimPrefix(base, whPrefix)
	if base != whOpaque && (name == "" || name == "." || name == "..") {
		return fmt.Errorf("whiteout of %q: %w", name, ErrInvalid)
	}
	d, err := a.dirs.resolve(parent, func(path string) error {
		if a.hid.has(path) {
			return errHidden
		}
		return a.follow(path)
	})
	var missing *missingError
	if errors.As(err, &missing) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errHidden) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.pin()()
	if err := a.touch(d); err != nil {
		return err
	}
	if base == whOpaque {
		_, err := a.removeLowerIn(d.fd, d.path)
		return err
	}
	_, err = a.removeLower(d.fd, d.path, name)
	return err
}

// remove deletes base in d with everything below it, whoever made it.
func (a *applier) remove(d *openDir, base string) error {
	path := join(d.path, base)
	delete(a.times, path)
	a.made.drop(path)
	err := unix.Unlinkat(d.fd, base, 0)
	if errors.Is(err, unix.EISDIR) {
		a.dirs.forget(path)
		a.hid.add(path)
		err = a.removeDir(d.fd, base)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s: %w", quote(path), err)
	}
	return nil
}

// removeDir deletes a directory and all in it.
func (a *applier) removeDir(parent int, base string) error {
	fd, err := a.openOwn(parent, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	names, err := readDirNames(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		err := unix.Unlinkat(fd, name, 0)
		if errors.Is(err, unix.EISDIR) {
			err = a.removeDir(fd, name)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return unix.Unlinkat(parent, base, unix.AT_REMOVEDIR)
}

// openOwn opens a directory outside of the cache. It does not enter other file systems.
func (a *applier) openOwn(parent int, base string) (int, error) {
	fd, err := retry(func() (int, error) { return unix.Openat(parent, base, dirFlags, 0) })
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if st.Dev != a.dirs.dev {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is a mount point: %w", quote(base), ErrEscape)
	}
	return fd, nil
}

// removeLower deletes base in the directory at dir, except for what this tar brought. kept
// says that something remains.
func (a *applier) removeLower(parent int, dir, base string) (kept bool, err error) {
	path := join(dir, base)
	st, err := fstatat(parent, base)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat %s: %w", quote(path), err)
	}
	mine := a.made.has(path)
	if !isDir(&st) {
		if mine {
			return true, nil
		}
		if err := unix.Unlinkat(parent, base, 0); err != nil {
			return false, fmt.Errorf("remove %s: %w", quote(path), err)
		}
		return false, nil
	}
	fd, err := a.openOwn(parent, base)
	if err != nil {
		return false, fmt.Errorf("open directory %s: %w", quote(path), err)
	}
	defer unix.Close(fd)
	kept, err = a.removeLowerIn(fd, path)
	if err != nil || kept || mine {
		return true, err
	}
	delete(a.times, path)
	a.dirs.forget(path)
	if err := unix.Unlinkat(parent, base, unix.AT_REMOVEDIR); err != nil {
		return false, fmt.Errorf("remove %s: %w", quote(path), err)
	}
	return false, nil
}

// removeLowerIn empties an open directory of what lower layers left there.
func (a *applier) removeLowerIn(fd int, path string) (kept bool, err error) {
	names, err := readDirNames(fd)
	if err != nil {
		return true, fmt.Errorf("read directory %s: %w", quote(path), err)
	}
	if _, ok := a.times[path]; !ok && len(names) > 0 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return true, fmt.Errorf("stat directory %s: %w", quote(path), err)
		}
		a.times[path] = times{st.Atim, st.Mtim}
	}
	for _, name := range names {
		if err := a.ctx.Err(); err != nil {
			return true, err
		}
		k, err := a.removeLower(fd, path, name)
		if err != nil {
			return true, err
		}
		kept = kept || k
	}
	return kept, nil
}
