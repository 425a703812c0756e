package archive

import (
	"container/list"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// An openDir is an open directory inside the root. path is physical: no component of it is a
// symbolic link.
type openDir struct {
	path       string
	fd         int
	defaultACL bool // new files inherit from it, and must not
	pins       int  // while above zero it stays open
	elem       *list.Element
}

// pin keeps d open until the returned function is called.
func (d *openDir) pin() (unpin func()) {
	d.pins++
	return func() { d.pins-- }
}

// A dirCache opens directories below a root, one component at a time, and keeps the most
// recently used ones open. It is the only way by which Apply reaches anything.
//
// A directory may be closed as soon as another is opened, unless it is pinned.
type dirCache struct {
	root *openDir
	dev  uint64 // file system of the root; others are not entered
	open map[string]*openDir
	lru  list.List // of *openDir, most recent first, without the root
	max  int
	read bool // nothing is made in them: nobody asks for their default ACLs
}

const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

func newDirCache(root string, max int) (*dirCache, error) {
	fd, err := openRoot(root)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("stat %s: %w", root, err)
	}
	c := &dirCache{dev: st.Dev, open: map[string]*openDir{}, max: max}
	c.root = &openDir{fd: fd, defaultACL: hasDefaultACL(fd)}
	return c, nil
}

// openRoot opens the root itself; here, and only here, the path is the caller's and may lead
// through symbolic links.
func openRoot(root string) (int, error) {
	fd, err := retry(func() (int, error) {
		return unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return -1, fmt.Errorf("open root %s: %w", root, err)
	}
	return fd, nil
}

func (c *dirCache) close() {
	for _, d := range c.open {
		unix.Close(d.fd)
	}
	c.open = map[string]*openDir{}
	c.lru.Init()
	unix.Close(c.root.fd)
}

// get opens the directory at a physical path. The error is ENOENT, ENOTDIR or ELOOP where
// something else is in the place of a directory.
func (c *dirCache) get(path string) (*openDir, error) {
	if path == "" {
		return c.root, nil
	}
	if d := c.open[path]; d != nil {
		c.lru.MoveToFront(d.elem)
		return d, nil
	}
	// Find the nearest open ancestor, then go down again: no recursion, however deep.
	at := path
	var d *openDir
	for d == nil {
		at, _ = split(at)
		if at == "" {
			d = c.root
		} else if d = c.open[at]; d != nil {
			c.lru.MoveToFront(d.elem)
		}
	}
	rest := path[len(at):]
	for c1 := range strings.SplitSeq(strings.TrimPrefix(rest, "/"), "/") {
		var err error
		if d, err = c.child(d, c1); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// child opens one directory inside d.
func (c *dirCache) child(d *openDir, base string) (*openDir, error) {
	path := join(d.path, base)
	if e := c.open[path]; e != nil {
		c.lru.MoveToFront(e.elem)
		return e, nil
	}
	fd, err := retry(func() (int, error) { return unix.Openat(d.fd, base, dirFlags, 0) })
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if st.Dev != c.dev {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is a mount point: %w", quote(path), ErrEscape)
	}
	e := &openDir{path: path, fd: fd, defaultACL: !c.read && hasDefaultACL(fd)}
	e.elem = c.lru.PushFront(e)
	c.open[path] = e
	for v := c.lru.Back(); v != nil && v != e.elem && c.lru.Len() > c.max; {
		old := v.Value.(*openDir)
		v = v.Prev()
		if old.pins == 0 {
			c.drop(old)
		}
	}
	return e, nil
}

func (c *dirCache) drop(d *openDir) {
	c.lru.Remove(d.elem)
	delete(c.open, d.path)
	unix.Close(d.fd)
}

// forget closes the directory at path and all below it, because they are being removed.
func (c *dirCache) forget(path string) {
	for p, d := range c.open {
		if p == path || strings.HasPrefix(p, path+"/") {
			c.drop(d)
		}
	}
}

// A missingError says where the way to a directory ended, so that the rest can be made.
type missingError struct {
	at   string   // existing physical directory
	rest []string // components that do not exist in it
}

func (e *missingError) Error() string {
	return fmt.Sprintf("directory %s does not exist", quote(join(e.at, strings.Join(e.rest, "/"))))
}

const maxLinks = 40 // as the kernel's limit on nested symbolic links

// resolve finds the physical directory that comps lead to. Symbolic links are followed inside
// the root, as chroot would, if follow allows the link at that physical path. A link that
// climbs above the root, or leads to something that does not exist, is refused. If comps
// themselves end in directories that do not exist the error is a *missingError.
func (c *dirCache) resolve(comps []string, follow func(path string) error) (*openDir, error) {
	if d := c.open[strings.Join(comps, "/")]; d != nil {
		c.lru.MoveToFront(d.elem)
		return d, nil
	}
	type step struct {
		name string
		via  string // the symbolic link that this component comes from
	}
	todo := make([]step, len(comps))
	for i, name := range comps {
		todo[len(comps)-1-i].name = name // a stack, next component last
	}
	d, links := c.root, 0
	for len(todo) > 0 {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if s.name == ".." { // only links have these
			if d.path == "" {
				return nil, fmt.Errorf("symbolic link %s climbs above the root: %w", quote(s.via), ErrEscape)
			}
			up, _ := split(d.path)
			var err error
			if d, err = c.get(up); err != nil {
				return nil, err
			}
			continue
		}
		path := join(d.path, s.name)
		next, err := c.child(d, s.name)
		if err == nil {
			d = next
			continue
		}
		switch {
		case errors.Is(err, unix.ENOENT) && s.via == "":
			m := &missingError{at: d.path, rest: []string{s.name}}
			for i := len(todo) - 1; i >= 0; i-- {
				m.rest = append(m.rest, todo[i].name)
			}
			return nil, m
		case errors.Is(err, unix.ENOENT):
			return nil, fmt.Errorf("symbolic link %s leads to %s, which does not exist inside the root: %w",
				quote(s.via), quote(path), ErrEscape)
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		default:
			return nil, fmt.Errorf("open directory %s: %w", quote(path), err)
		}
		target, err := readlinkat(d.fd, s.name)
		if errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("%s is not a directory: %w", quote(path), unix.ENOTDIR)
		} else if err != nil {
			return nil, fmt.Errorf("read link %s: %w", quote(path), err)
		}
		if err := follow(path); err != nil {
			return nil, err
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("more than %d symbolic links on the way: %w", maxLinks, unix.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			d = c.root
		}
		parts := strings.Split(target, "/")
		for i := len(parts) - 1; i >= 0; i-- {
			if parts[i] != "" && parts[i] != "." {
				todo = append(todo, step{name: parts[i], via: path})
			}
		}
	}
	return d, nil
}
