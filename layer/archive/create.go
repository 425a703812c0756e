package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// makeDir makes a directory, or gives one that exists the entry's owner, mode and attributes.
func (a *applier) makeDir(d *openDir, base string, hdr *tar.Header, m meta) error {
	err := unix.Mkdirat(d.fd, base, 0o700)
	fresh := err == nil
	if errors.Is(err, unix.EEXIST) {
		st, err := fstatat(d.fd, base)
		if err != nil {
			return err
		}
		if isDir(&st) {
			n, err := a.dirs.child(d, base)
			if err != nil {
				return err
			}
			return a.mergeDir(n, hdr, m)
		}
		if err := a.remove(d, base); err != nil {
			return err
		}
		if err := unix.Mkdirat(d.fd, base, 0o700); err != nil {
			return fmt.Errorf("mkdir: %w", err)
		}
		fresh = true
	} else if err != nil {
		return fmt.Errorf("mkdir: %w", err)
	}
	n, err := a.dirs.child(d, base)
	if err != nil {
		return err
	}
	if err := a.setDirMeta(n, hdr, m, !fresh || d.defaultACL); err != nil {
		return err
	}
	a.times[n.path] = times{m.atime, m.mtime}
	return nil
}

// mergeDir makes an existing directory look as its entry says; what is in it stays.
func (a *applier) mergeDir(n *openDir, hdr *tar.Header, m meta) error {
	if err := a.setDirMeta(n, hdr, m, true); err != nil {
		return err
	}
	a.times[n.path] = times{m.atime, m.mtime}
	return nil
}

// setDirMeta sets everything about a directory but its times. clear drops attributes that it
// has and the entry (nil: none) does not name.
func (a *applier) setDirMeta(n *openDir, hdr *tar.Header, m meta, clear bool) error {
	h := xattrHandle{fd: n.fd}
	if clear {
		if err := clearXattrs(h, hdr); err != nil {
			return err
		}
	}
	if err := unix.Fchown(n.fd, m.uid, m.gid); err != nil {
		return fmt.Errorf("chown %d:%d: %w", m.uid, m.gid, err)
	}
	if err := unix.Fchmod(n.fd, m.mode); err != nil {
		return fmt.Errorf("chmod %04o: %w", m.mode, err)
	}
	if hdr != nil {
		if err := a.setXattrs(h, hdr, true); err != nil {
			return err
		}
	}
	n.defaultACL = hasDefaultACL(n.fd)
	return nil
}

// makeFile writes a regular file in place of whatever is there.
func (a *applier) makeFile(d *openDir, base string, hdr *tar.Header, m meta) error {
	open := func() (int, error) {
		return retry(func() (int, error) {
			return unix.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		})
	}
	fd, err := open()
	if errors.Is(err, unix.EEXIST) {
		if err := a.remove(d, base); err != nil {
			return err
		}
		fd, err = open()
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	err = a.fillFile(fd, d, base, hdr, m)
	if cerr := unix.Close(fd); err == nil && cerr != nil && !errors.Is(cerr, unix.EINTR) {
		err = fmt.Errorf("close: %w", cerr)
	}
	return err
}

func (a *applier) fillFile(fd int, d *openDir, base string, hdr *tar.Header, m meta) error {
	if hdr.Size > 0 {
		if err := a.copyContent(fd, hdr.Size); err != nil {
			return err
		}
	}
	h := xattrHandle{fd: fd}
	if d.defaultACL {
		if err := clearXattrs(h, nil); err != nil {
			return err
		}
	}
	// chown clears setuid and file capabilities, so it comes first.
	if err := unix.Fchown(fd, m.uid, m.gid); err != nil {
		return fmt.Errorf("chown %d:%d: %w", m.uid, m.gid, err)
	}
	if err := unix.Fchmod(fd, m.mode); err != nil {
		return fmt.Errorf("chmod %04o: %w", m.mode, err)
	}
	if err := a.setXattrs(h, hdr, true); err != nil {
		return err
	}
	return setTimesAt(d, base, m)
}

func (a *applier) makeSymlink(d *openDir, base string, hdr *tar.Header, m meta) error {
	if hdr.Linkname == "" {
		return fmt.Errorf("symbolic link to nothing: %w", ErrInvalid)
	}
	if len(hdr.Linkname) > a.o.MaxName {
		return fmt.Errorf("link target of %d bytes, at most %d: %w", len(hdr.Linkname), a.o.MaxName, ErrLimit)
	}
	if err := a.replace(d, base, func() error { return unix.Symlinkat(hdr.Linkname, d.fd, base) }); err != nil {
		return fmt.Errorf("symlink: %w", err)
	}
	if err := chownAt(d, base, m); err != nil {
		return err
	}
	if err := a.setXattrs(xattrHandle{fd: -1, path: procPath(d.fd, base)}, hdr, false); err != nil {
		return err
	}
	return setTimesAt(d, base, m)
}

// makeNode makes a device node or a fifo.
func (a *applier) makeNode(d *openDir, base string, hdr *tar.Header, m meta) error {
	mode, dev := m.mode, uint64(0)
	switch hdr.Typeflag {
	case tar.TypeFifo:
		mode |= unix.S_IFIFO
	case tar.TypeChar:
		mode |= unix.S_IFCHR
	case tar.TypeBlock:
		mode |= unix.S_IFBLK
	}
	if hdr.Typeflag != tar.TypeFifo {
		// What mknod takes: 12 bits and 20 bits.
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return fmt.Errorf("device number %d:%d is out of range: %w", hdr.Devmajor, hdr.Devminor, ErrInvalid)
		}
		dev = unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	}
	if err := a.replace(d, base, func() error { return unix.Mknodat(d.fd, base, mode, int(dev)) }); err != nil {
		return fmt.Errorf("mknod: %w", err)
	}
	h := xattrHandle{fd: -1, path: procPath(d.fd, base)}
	if d.defaultACL {
		if err := clearXattrs(h, nil); err != nil {
			return err
		}
	}
	if err := chownAt(d, base, m); err != nil {
		return err
	}
	if err := chmodAt(d, base, m.mode); err != nil {
		return err
	}
	if err := a.setXattrs(h, hdr, false); err != nil {
		return err
	}
	return setTimesAt(d, base, m)
}

// makeLink makes a hard link to something inside the root: what this tar made, or what a lower
// layer left there.
func (a *applier) makeLink(d *openDir, base string, hdr *tar.Header) error {
	name := hdr.Linkname
	rooted := strings.HasPrefix(name, "/")
	comps, err := a.o.cleanName(strings.TrimLeft(name, "/"))
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(name), err)
	}
	if len(comps) == 0 {
		return fmt.Errorf("hard link to the root: %w", ErrInvalid)
	}
	if rooted {
		if !a.made.has(strings.Join(comps, "/")) {
			return fmt.Errorf("hard link to %s: absolute, and not made by this archive: %w", quote(name), ErrEscape)
		}
	}
	if reserved(comps) {
		return fmt.Errorf("hard link to %s: the name is reserved for whiteouts: %w", quote(name), ErrInvalid)
	}
	td, err := a.dirs.resolve(comps[:len(comps)-1], a.follow)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(name), err)
	}
	defer td.pin()()
	tbase := comps[len(comps)-1]
	st, err := fstatat(td.fd, tbase)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(name), err)
	}
	if isDir(&st) {
		return fmt.Errorf("hard link to directory %s: %w", quote(name), ErrInvalid)
	}
	if old, err := fstatat(d.fd, base); err == nil && old.Ino == st.Ino && old.Dev == st.Dev {
		return nil // linked already, perhaps by the same name
	}
	if strings.HasPrefix(td.path+"/", join(d.path, base)+"/") {
		return fmt.Errorf("hard link to %s, which it would replace: %w", quote(name), ErrInvalid)
	}
	err = a.replace(d, base, func() error { return unix.Linkat(td.fd, tbase, d.fd, base, 0) })
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(name), err)
	}
	return nil
}

// replace runs make, and once more after removing what is in its place.
func (a *applier) replace(d *openDir, base string, make func() error) error {
	err := make()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := a.remove(d, base); err != nil {
		return err
	}
	return make()
}

func chownAt(d *openDir, base string, m meta) error {
	if err := unix.Fchownat(d.fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown %d:%d: %w", m.uid, m.gid, err)
	}
	return nil
}

// chmodAt sets the mode of what is not a symbolic link. Kernels before 6.6 cannot be told not
// to follow one, so there it is looked at first.
func chmodAt(d *openDir, base string, mode uint32) error {
	err := unix.Fchmodat(d.fd, base, mode, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		st, serr := fstatat(d.fd, base)
		if serr != nil {
			return fmt.Errorf("chmod %04o: %w", mode, serr)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return fmt.Errorf("chmod %04o: %w", mode, unix.ELOOP)
		}
		err = unix.Fchmodat(d.fd, base, mode, 0)
	}
	if err != nil {
		return fmt.Errorf("chmod %04o: %w", mode, err)
	}
	return nil
}

func setTimesAt(d *openDir, base string, m meta) error {
	if err := unix.UtimesNanoAt(d.fd, base, []unix.Timespec{m.atime, m.mtime}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}
