package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// sameInode says whether an inode of a block-level copy cannot have changed since the copy:
// every change of content, attributes or links moves the change time.
func sameInode(a, b *unix.Stat_t) bool {
	return a.Ino == b.Ino && a.Mode == b.Mode && a.Size == b.Size && a.Ctim == b.Ctim && a.Mtim == b.Mtim && a.Nlink == b.Nlink
}

func sameMeta(a, b *unix.Stat_t) bool {
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Mtim == b.Mtim
}

func (d *differ) dirChanged(low, up *openDir) (bool, error) {
	var lst, ust unix.Stat_t
	if err := unix.Fstat(low.fd, &lst); err != nil {
		return false, err
	}
	if err := unix.Fstat(up.fd, &ust); err != nil {
		return false, err
	}
	if d.o.Snapshot && sameInode(&lst, &ust) {
		return false, nil
	}
	if !sameMeta(&lst, &ust) {
		return true, nil
	}
	same, err := sameXattrs(xattrHandle{fd: low.fd}, xattrHandle{fd: up.fd})
	return !same, err
}

// sameFile compares what is not a directory in upper with what lower has there.
func (d *differ) sameFile(low *openDir, lst *unix.Stat_t, up *openDir, ust *unix.Stat_t, name string) (bool, error) {
	if d.o.Snapshot && sameInode(lst, ust) {
		return true, nil
	}
	if !sameMeta(lst, ust) {
		return false, nil
	}
	switch ust.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFLNK:
		if lst.Size != ust.Size {
			return false, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if lst.Rdev != ust.Rdev {
			return false, nil
		}
	}
	same, err := sameXattrs(xattrHandle{fd: -1, path: procPath(low.fd, name)}, xattrHandle{fd: -1, path: procPath(up.fd, name)})
	if err != nil || !same {
		return false, err
	}
	switch ust.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		lt, err := readlinkat(low.fd, name)
		if err != nil {
			return false, err
		}
		ut, err := readlinkat(up.fd, name)
		return lt == ut, err
	case unix.S_IFREG:
		return d.sameContent(low, up, name, ust.Size)
	}
	return true, nil
}

// archived says whether layers carry an attribute.
func archived(name string) bool { return applicable(name) && name != selinux }

// layerXattrs reads the attributes that a layer carries.
func layerXattrs(h xattrHandle) (map[string][]byte, error) {
	names, err := h.list()
	if err != nil || len(names) == 0 {
		return nil, err
	}
	m := make(map[string][]byte, len(names))
	for _, name := range names {
		if !archived(name) {
			continue
		}
		v, err := h.get(name)
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %q: %w", name, err)
		}
		m[name] = v
	}
	return m, nil
}

func sameXattrs(a, b xattrHandle) (bool, error) {
	am, err := layerXattrs(a)
	if err != nil {
		return false, err
	}
	bm, err := layerXattrs(b)
	if err != nil || len(am) != len(bm) {
		return false, err
	}
	for name, v := range am {
		if w, ok := bm[name]; !ok || !bytes.Equal(v, w) {
			return false, nil
		}
	}
	return true, nil
}

// openFile opens a regular file for reading, and nothing else.
func openFile(d *openDir, base string) (int, error) {
	flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := retry(func() (int, error) { return unix.Openat(d.fd, base, flags|unix.O_NOATIME, 0) })
	if errors.Is(err, unix.EPERM) {
		fd, err = retry(func() (int, error) { return unix.Openat(d.fd, base, flags, 0) })
	}
	if err != nil {
		return -1, fmt.Errorf("open: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return -1, errors.New("not a regular file any more")
	}
	return fd, nil
}

func (d *differ) sameContent(low, up *openDir, name string, size int64) (bool, error) {
	if size == 0 {
		return true, nil
	}
	lfd, err := openFile(low, name)
	if err != nil {
		return false, err
	}
	defer unix.Close(lfd)
	ufd, err := openFile(up, name)
	if err != nil {
		return false, err
	}
	defer unix.Close(ufd)
	if d.bufA == nil {
		d.bufA, d.bufB = make([]byte, 256<<10), make([]byte, 256<<10)
	}
	for off := int64(0); off < size; {
		if err := d.ctx.Err(); err != nil {
			return false, err
		}
		n := min(size-off, int64(len(d.bufA)))
		if err := preadFull(lfd, d.bufA[:n], off); err != nil {
			return false, err
		}
		if err := preadFull(ufd, d.bufB[:n], off); err != nil {
			return false, err
		}
		if !bytes.Equal(d.bufA[:n], d.bufB[:n]) {
			return false, nil
		}
		off += n
	}
	return true, nil
}

func preadFull(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := retry(func() (int, error) { return unix.Pread(fd, p, off) })
		if err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		if n == 0 {
			return fmt.Errorf("file ends at %d while it is read: %w", off, io.ErrUnexpectedEOF)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
