package archive

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Apply changes the tree at root as the layer tar r says and reads r to its end, also past the
// end-of-archive marker, so that a checking reader can have its say. Names, contents, modes,
// owners, times (nanoseconds; access time = modification time where the tar has none), devices,
// hard links and extended attributes are those of the tar afterwards; the times of directories
// that it does not list stay as they were. Runs of zeros become holes.
//
// Whiteouts hide what was in root before the call, never what the same tar brings, in whichever
// order they come. Directories that the tar needs and nobody made get mode 0755, owner 0:0 and
// the time of the entry that needs them.
//
// On an error, among them *EntryError for an entry that is refused, the tree is left half
// changed: the caller throws it away. ctx is looked at between entries and between pieces of
// file content; a Read of r that blocks is the caller's to end.
//
// The process needs the privileges for what the tar holds (chown, mknod, trusted.*).
func Apply(ctx context.Context, root string, r io.Reader, o ApplyOptions) (Stats, error) {
	o = o.withDefaults()
	dirs, err := newDirCache(root, 256)
	if err != nil {
		return Stats{}, err
	}
	defer dirs.close()
	in := &unpacking{r: r, l: o.Limits}
	br := bufio.NewReaderSize(in, 256<<10)
	a := &applier{
		ctx: ctx, o: o, dirs: dirs, in: in, tr: tar.NewReader(br),
		made:  names{m: map[string]struct{}{}},
		hid:   names{m: map[string]struct{}{}},
		times: map[string]times{},
		buf:   make([]byte, 1<<20),
	}
	if err := a.run(); err != nil {
		return a.stats, err
	}
	// Only zeros may follow in a tar; digests of what follows are for r to check.
	for {
		if err := ctx.Err(); err != nil {
			return a.stats, err
		}
		switch _, err := br.Read(a.buf); {
		case err == io.EOF:
			return a.stats, nil
		case err != nil:
			return a.stats, fmt.Errorf("read the end of the archive: %w", err)
		}
	}
}

// names are a set of paths that knows how much memory they take, more or less.
type names struct {
	m     map[string]struct{}
	bytes int64
}

// pathCost is what a path costs beside its bytes.
const pathCost = 64

func (n *names) has(p string) bool {
	_, ok := n.m[p]
	return ok
}

func (n *names) add(p string) {
	if !n.has(p) {
		n.m[p] = struct{}{}
		n.bytes += pathCost + int64(len(p))
	}
}

func (n *names) drop(p string) {
	if n.has(p) {
		delete(n.m, p)
		n.bytes -= pathCost + int64(len(p))
	}
}

// times are set on a directory when everything in it has been done.
type times struct{ atime, mtime unix.Timespec }

// An applier is one run of Apply. Paths are physical and relative to the root, "" being it.
type applier struct {
	ctx   context.Context
	o     ApplyOptions
	dirs  *dirCache
	in    *unpacking
	tr    *tar.Reader
	made  names            // what this tar brought
	hid   names            // where something else took the place of a directory
	times map[string]times // of directories that were listed or changed
	buf   []byte
	stats Stats
}

func (a *applier) run() error {
	last := ""
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		hdr, err := a.tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !(errors.Is(err, tar.ErrInsecurePath) && hdr != nil) {
			if last == "" {
				return fmt.Errorf("read the first tar header: %w", err)
			}
			return fmt.Errorf("read the tar header after entry %s: %w", quote(last), err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := a.count(hdr); err != nil {
			return &EntryError{Name: hdr.Name, Err: err}
		}
		if err := a.entry(hdr); err != nil {
			return &EntryError{Name: hdr.Name, Err: err}
		}
		last = hdr.Name
	}
	return a.setTimes()
}

// count enforces the limits on numbers before anything is made.
func (a *applier) count(hdr *tar.Header) error {
	if a.stats.Entries++; a.stats.Entries > a.o.MaxEntries {
		return fmt.Errorf("more than %d entries: %w", a.o.MaxEntries, ErrLimit)
	}
	if hdr.Size < 0 {
		return fmt.Errorf("size %d: %w", hdr.Size, ErrInvalid)
	}
	if hdr.Size > a.o.MaxBytes-a.stats.Bytes {
		return fmt.Errorf("file of %d bytes after %d bytes of others, at most %d in all: %w",
			hdr.Size, a.stats.Bytes, a.o.MaxBytes, ErrLimit)
	}
	a.stats.Bytes += hdr.Size
	// Holes are in no stream: a few bytes of tar can stand for a disk of zeros.
	if err := a.o.expands(a.stats.Bytes, a.in.n); err != nil {
		return err
	}
	if n := a.made.bytes + a.hid.bytes; n > a.o.MaxNames {
		return fmt.Errorf("its paths take %d bytes of memory so far, at most %d: %w", n, a.o.MaxNames, ErrLimit)
	}
	sum := 0
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if len(name) > maxComponent {
			return fmt.Errorf("extended attribute name of %d bytes, at most %d: %w", len(name), maxComponent, ErrLimit)
		}
		if len(v) > maxValue {
			return fmt.Errorf("extended attribute %q of %d bytes, at most %d: %w", name, len(v), maxValue, ErrLimit)
		}
		sum += len(name) + len(v)
	}
	if sum > a.o.MaxXattr {
		return fmt.Errorf("extended attributes of %d bytes, at most %d: %w", sum, a.o.MaxXattr, ErrLimit)
	}
	return nil
}

// entry applies one entry.
func (a *applier) entry(hdr *tar.Header) error {
	name := hdr.Name
	if hdr.Typeflag == tar.TypeDir && name != "" && strings.Trim(name, "/") == "" {
		name = "." // some builders call the root "/"
	}
	comps, err := a.o.cleanName(name)
	if err != nil {
		return err
	}
	m, err := metaOf(hdr)
	if err != nil {
		return err
	}
	if len(comps) == 0 {
		if hdr.Typeflag != tar.TypeDir {
			return fmt.Errorf("the root is not a directory here: %w", ErrInvalid)
		}
		return a.mergeDir(a.dirs.root, hdr, m)
	}
	parent, base := comps[:len(comps)-1], comps[len(comps)-1]
	if reserved(parent) {
		return fmt.Errorf("below a name that is reserved for whiteouts: %w", ErrInvalid)
	}
	if strings.HasPrefix(base, whPrefix) {
		return a.whiteout(parent, base)
	}
	d, err := a.parentDir(parent, m)
	if err != nil {
		return err
	}
	defer d.pin()()
	path := join(d.path, base)
	if len(path) > a.o.MaxName {
		return fmt.Errorf("resolved path of %d bytes, at most %d: %w", len(path), a.o.MaxName, ErrLimit)
	}
	if err := a.touch(d); err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		err = a.makeDir(d, base, hdr, m)
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		err = a.makeFile(d, base, hdr, m)
	case tar.TypeSymlink:
		err = a.makeSymlink(d, base, hdr, m)
	case tar.TypeLink:
		err = a.makeLink(d, base, hdr)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		err = a.makeNode(d, base, hdr, m)
	default:
		err = fmt.Errorf("tar type %q is not a file: %w", hdr.Typeflag, ErrInvalid)
	}
	if err != nil {
		return err
	}
	a.made.add(path)
	return nil
}

// follow allows symbolic links of lower layers as parents, and refuses those of this tar.
func (a *applier) follow(path string) error {
	if a.made.has(path) {
		return fmt.Errorf("parent %s is a symbolic link made by the same archive: %w", quote(path), ErrEscape)
	}
	return nil
}

// parentDir finds the directory for an entry, and makes what is missing.
func (a *applier) parentDir(comps []string, m meta) (*openDir, error) {
	d, err := a.dirs.resolve(comps, a.follow)
	var missing *missingError
	if !errors.As(err, &missing) {
		return d, err
	}
	if d, err = a.dirs.get(missing.at); err != nil {
		return nil, err
	}
	for _, base := range missing.rest {
		unpin := d.pin()
		next, err := a.makeParent(d, base, m)
		unpin()
		if err != nil {
			return nil, fmt.Errorf("make directory %s: %w", quote(join(d.path, base)), err)
		}
		d = next
	}
	return d, nil
}

// makeParent makes a directory that no entry describes.
func (a *applier) makeParent(d *openDir, base string, m meta) (*openDir, error) {
	path := join(d.path, base)
	if len(path) > a.o.MaxName {
		return nil, fmt.Errorf("resolved path of %d bytes, at most %d: %w", len(path), a.o.MaxName, ErrLimit)
	}
	if err := a.touch(d); err != nil {
		return nil, err
	}
	if err := unix.Mkdirat(d.fd, base, 0o700); err != nil {
		return nil, err
	}
	n, err := a.dirs.child(d, base)
	if err != nil {
		return nil, err
	}
	plain := meta{mode: 0o755, atime: m.mtime, mtime: m.mtime}
	if err := a.setDirMeta(n, nil, plain, d.defaultACL); err != nil {
		return nil, err
	}
	a.made.add(path)
	a.times[path] = times{plain.atime, plain.mtime}
	return n, nil
}

// touch remembers the times of a directory before its first change.
func (a *applier) touch(d *openDir) error {
	if _, ok := a.times[d.path]; ok {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return fmt.Errorf("stat directory %s: %w", quote(d.path), err)
	}
	a.times[d.path] = times{st.Atim, st.Mtim}
	return nil
}

// setTimes sets the times of directories, last of all. What was removed or replaced since it
// was noted is passed over.
func (a *applier) setTimes() error {
	paths := make([]string, 0, len(a.times))
	for p := range a.times {
		paths = append(paths, p)
	}
	sort.Strings(paths) // siblings share an open parent
	for i, p := range paths {
		if i%1024 == 0 && a.ctx.Err() != nil {
			return a.ctx.Err()
		}
		t := a.times[p]
		d, err := a.dirs.get(p)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			continue
		case err != nil:
			return &EntryError{Name: p, Err: fmt.Errorf("set times: %w", err)}
		}
		if err := unix.UtimesNanoAt(d.fd, ".", []unix.Timespec{t.atime, t.mtime}, 0); err != nil {
			return &EntryError{Name: p, Err: fmt.Errorf("set times: %w", err)}
		}
	}
	return nil
}

// meta is what a header says about an inode, checked.
type meta struct {
	mode         uint32 // permission bits with setuid, setgid and sticky
	uid, gid     int
	atime, mtime unix.Timespec
}

func metaOf(hdr *tar.Header) (meta, error) {
	m := meta{mode: uint32(hdr.Mode) & 0o7777, uid: hdr.Uid, gid: hdr.Gid}
	// The largest 32-bit value means "leave as it is" to chown.
	if hdr.Uid < 0 || int64(hdr.Uid) >= math.MaxUint32 || hdr.Gid < 0 || int64(hdr.Gid) >= math.MaxUint32 {
		return m, fmt.Errorf("owner %d:%d is out of range: %w", hdr.Uid, hdr.Gid, ErrInvalid)
	}
	m.mtime = unix.Timespec{Sec: hdr.ModTime.Unix(), Nsec: int64(hdr.ModTime.Nanosecond())}
	m.atime = m.mtime
	if !hdr.AccessTime.IsZero() {
		m.atime = unix.Timespec{Sec: hdr.AccessTime.Unix(), Nsec: int64(hdr.AccessTime.Nanosecond())}
	}
	return m, nil
}
