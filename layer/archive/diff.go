package archive

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// DiffOptions say how trees are compared.
type DiffOptions struct {
	// Snapshot says that upper's file system began as a block-level copy of lower's. A file
	// with the same inode number, change time, modification time and size is then the same
	// file, and is not read. Otherwise contents are compared whenever sizes are equal.
	Snapshot bool
	// Changed, with Snapshot and if not nil, are the inodes of upper that may differ from those of
	// lower with the same number, as MergeInodes leaves them. The others are not looked at, nor is
	// lower where a directory is none of them.
	Changed []InodeRange
	// Warn, if not nil, is told what a tar cannot hold and was left out: sockets.
	Warn func(name, what string)
}

// Diff writes the layer tar that Apply, or any container runtime, turns the tree at lower into
// the tree at upper with. lower may be "": an empty tree.
//
// The tar holds what was added and what changed in content, mode, owner, modification time,
// device number, hard links or extended attributes (all but security.selinux, which is the
// host's), the directories above each change, and a whiteout for what is gone. Of hard links
// that changed the first name carries the content. It is PAX with nanoseconds, in the bytewise
// order of names, whiteouts first in each directory: the same trees give the same bytes.
// Sparse files are read as holes, and written as zeros, which layers compress away.
//
// Neither tree may change meanwhile. Symbolic links are never followed, mount points inside
// refused. Names that begin with ".wh." cannot be in a layer: an *EntryError.
func Diff(ctx context.Context, lower, upper string, w io.Writer, o DiffOptions) (Stats, error) {
	if o.Warn == nil {
		o.Warn = func(string, string) {}
	}
	up, err := newDirCache(upper, 256)
	if err != nil {
		return Stats{}, err
	}
	defer up.close()
	up.read = true
	d := &differ{ctx: ctx, o: o, up: up}
	if !o.Snapshot || lower == "" {
		d.o.Changed = nil
	}
	if lower != "" {
		if d.low, err = newDirCache(lower, 256); err != nil {
			return Stats{}, err
		}
		defer d.low.close()
		d.low.read = true
	}
	err = d.plan()
	if errors.Is(err, errMoved) {
		d.o.Changed, d.items, d.sockets = nil, nil, nil
		err = d.plan()
	}
	if err != nil {
		return Stats{}, err
	}
	for _, name := range d.sockets {
		o.Warn(name, "socket left out")
	}
	bw := bufio.NewWriterSize(w, 1<<20)
	stats, err := d.write(bw)
	if err != nil {
		return stats, err
	}
	if err := bw.Flush(); err != nil {
		return stats, fmt.Errorf("write the layer: %w", err)
	}
	return stats, nil
}

// An item is a name that is, or may come to be, in the tar.
type item struct {
	path   string
	parent int // index of the directory above
	kind   itemKind
	emit   bool
	ino    uint64 // with links: inode number in upper
	lowIno uint64 // with links: of the same name in lower, if it is unchanged
	links  bool   // it has other names, in upper or in lower
}

type itemKind uint8

const (
	itemDir itemKind = iota
	itemFile
	itemWhiteout
)

// A differ first walks both trees and plans, then writes.
type differ struct {
	ctx     context.Context
	o       DiffOptions
	low, up *dirCache // low is nil for an empty tree
	items   []item    // in the order of the tar
	sockets []string  // left out
	bufA    []byte
	bufB    []byte
}

// errMoved: an inode with several names is in the tar, and did not change itself: a directory above
// it was moved. Its other names have to be looked at, wherever they are.
var errMoved = errors.New("linked file below a directory that was moved")

// plan walks both trees and decides what the tar holds.
func (d *differ) plan() error {
	changed, same := true, false
	if d.low != nil {
		lowIno, err := dirIno(d.low.root)
		if err != nil {
			return err
		}
		upIno, err := dirIno(d.up.root)
		if err != nil {
			return err
		}
		if same = d.unchanged(lowIno, upIno); same {
			changed = false
		} else if changed, err = d.dirChanged(d.low.root, d.up.root); err != nil {
			return err
		}
	}
	d.items = append(d.items, item{kind: itemDir, emit: changed})
	if err := d.walk(d.low != nil, same, d.up.root, 0); err != nil {
		return err
	}
	d.planLinks()
	for i := len(d.items) - 1; i > 0; i-- {
		if it := &d.items[i]; it.emit && it.parent > 0 {
			d.items[it.parent].emit = true
		}
	}
	return nil
}

func dirIno(d *openDir) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(d.fd, &st)
	return st.Ino, err
}

// unchanged says whether an inode is known not to have changed since the copy. A directory that is
// unchanged has the same names, with the same inodes.
func (d *differ) unchanged(low, up uint64) bool {
	return d.o.Changed != nil && low == up && !holds(d.o.Changed, up)
}

func (d *differ) entryErr(path string, err error) error {
	var e *EntryError
	if errors.As(err, &e) || err == nil || d.ctx.Err() != nil || errors.Is(err, errMoved) {
		return err
	}
	return &EntryError{Name: path, Err: err}
}

// names lists a directory without what a layer cannot hold.
func (d *differ) names(dir *openDir, warn bool) ([]dirent, error) {
	all, err := readDir(dir.fd)
	if err != nil {
		return nil, d.entryErr(dir.path, err)
	}
	list := all[:0]
	for _, e := range all {
		if reserved([]string{e.name}) {
			return nil, d.entryErr(join(dir.path, e.name),
				fmt.Errorf("a layer cannot hold names that begin with %q: %w", whPrefix, ErrInvalid))
		}
		if e.typ == unix.DT_UNKNOWN { // not every file system keeps types in directories
			st, err := fstatat(dir.fd, e.name)
			if err != nil {
				return nil, d.entryErr(join(dir.path, e.name), err)
			}
			e.typ = uint8(st.Mode & unix.S_IFMT >> 12)
		}
		if e.typ == unix.DT_SOCK {
			if warn {
				d.sockets = append(d.sockets, join(dir.path, e.name))
			}
			continue
		}
		list = append(list, e)
	}
	return list, nil
}

// walk plans for what is in the directory up, index its item, and in lower's of the same path, if
// inLow says that there is one. With same it has the same names and inodes, and is not read.
func (d *differ) walk(inLow, same bool, up *openDir, index int) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	defer up.pin()()
	upNames, err := d.names(up, true)
	if err != nil {
		return err
	}
	lowNames := upNames
	switch {
	case !inLow:
		lowNames = nil
	case !same:
		low, err := d.low.get(up.path)
		if err != nil {
			return d.entryErr(up.path, err)
		}
		if lowNames, err = d.names(low, false); err != nil {
			return err
		}
	}
	in := 0
	for _, e := range lowNames {
		for in < len(upNames) && upNames[in].name < e.name {
			in++
		}
		if in == len(upNames) || upNames[in].name != e.name {
			d.items = append(d.items, item{path: join(up.path, e.name), parent: index, kind: itemWhiteout, emit: true})
		}
	}
	in = 0
	for i := range upNames {
		e := &upNames[i]
		for in < len(lowNames) && lowNames[in].name < e.name {
			in++
		}
		var le *dirent
		if in < len(lowNames) && lowNames[in].name == e.name {
			le = &lowNames[in]
		}
		if err := d.visit(le, up, e, index); err != nil {
			return d.entryErr(join(up.path, e.name), err)
		}
	}
	return nil
}

// visit plans for one name of the directory up; le is nil if lower does not have it.
func (d *differ) visit(le *dirent, up *openDir, e *dirent, index int) error {
	same := le != nil && d.unchanged(le.ino, e.ino)
	if e.typ == unix.DT_DIR {
		return d.visitDir(le, same, up, e, index)
	}
	if same {
		return nil // with all its names, whatever they are: a change of one changes the inode
	}
	it := item{path: join(up.path, e.name), parent: index, emit: true, kind: itemFile}
	ust, err := fstatat(up.fd, e.name)
	if err != nil {
		return err
	}
	if isDir(&ust) {
		return fmt.Errorf("a directory whose entry says that it is none: %w", unix.EUCLEAN)
	}
	lowLinks := false
	if le != nil {
		low, err := d.low.get(up.path)
		if err != nil {
			return err
		}
		lst, err := fstatat(low.fd, e.name)
		if err != nil {
			return err
		}
		same, err := d.sameFile(low, &lst, up, &ust, e.name)
		if err != nil {
			return err
		}
		it.emit = !same
		if same {
			it.lowIno, lowLinks = lst.Ino, lst.Nlink > 1
		}
	}
	if ust.Nlink > 1 || lowLinks {
		it.links, it.ino = true, ust.Ino
		if d.unchanged(ust.Ino, ust.Ino) {
			return errMoved
		}
	}
	if it.emit || it.links {
		d.items = append(d.items, it)
	}
	return nil
}

func (d *differ) visitDir(le *dirent, same bool, up *openDir, e *dirent, index int) error {
	it := item{path: join(up.path, e.name), parent: index, emit: !same}
	next, err := d.up.child(up, e.name)
	if err != nil {
		return err
	}
	defer next.pin()()
	inLow := le != nil && le.typ == unix.DT_DIR
	if inLow && !same {
		low, err := d.low.get(up.path)
		if err != nil {
			return err
		}
		lowNext, err := d.low.child(low, e.name)
		if err != nil {
			return err
		}
		if it.emit, err = d.dirChanged(lowNext, next); err != nil {
			return err
		}
	}
	d.items = append(d.items, it)
	return d.walk(inLow, same, next, len(d.items)-1)
}

// planLinks decides about names whose inode has others. Unchanged names stay out of the tar
// only if, without them, Apply leaves exactly upper's links between them; else all names of
// the inode go in.
func (d *differ) planLinks() {
	upper := map[uint64][]int{} // inode of upper: its names
	lower := map[uint64]int{}   // inode of lower: how many unchanged names it has
	for i := range d.items {
		if it := &d.items[i]; it.links {
			upper[it.ino] = append(upper[it.ino], i)
			if !it.emit {
				lower[it.lowIno]++
			}
		}
	}
	for _, group := range upper {
		first := &d.items[group[0]]
		keep := !first.emit && lower[first.lowIno] == len(group)
		for _, i := range group {
			keep = keep && !d.items[i].emit && d.items[i].lowIno == first.lowIno
		}
		if !keep {
			for _, i := range group {
				d.items[i].emit = true
			}
		}
	}
}
