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
	d := &differ{ctx: ctx, o: o, up: up}
	if lower != "" {
		if d.low, err = newDirCache(lower, 256); err != nil {
			return Stats{}, err
		}
		defer d.low.close()
	}
	if err := d.plan(); err != nil {
		return Stats{}, err
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
	lowIno uint64 // of the same name in lower, if it is unchanged
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
	bufA    []byte
	bufB    []byte
}

// plan walks both trees and decides what the tar holds.
func (d *differ) plan() error {
	var lowRoot *openDir
	changed := true
	if d.low != nil {
		lowRoot = d.low.root
		var err error
		if changed, err = d.dirChanged(lowRoot, d.up.root); err != nil {
			return err
		}
	}
	d.items = append(d.items, item{kind: itemDir, emit: changed})
	if err := d.walk(lowRoot, d.up.root, 0); err != nil {
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

func (d *differ) entryErr(path string, err error) error {
	var e *EntryError
	if errors.As(err, &e) || err == nil || d.ctx.Err() != nil {
		return err
	}
	return &EntryError{Name: path, Err: err}
}

// names lists a directory without what a layer cannot hold.
func (d *differ) names(dir *openDir, warn bool) ([]string, []unix.Stat_t, error) {
	if dir == nil {
		return nil, nil, nil
	}
	all, err := readDirNames(dir.fd)
	if err != nil {
		return nil, nil, d.entryErr(dir.path, err)
	}
	names := all[:0]
	stats := make([]unix.Stat_t, 0, len(all))
	for _, name := range all {
		st, err := fstatat(dir.fd, name)
		if err != nil {
			return nil, nil, d.entryErr(join(dir.path, name), err)
		}
		if reserved([]string{name}) {
			return nil, nil, d.entryErr(join(dir.path, name),
				fmt.Errorf("a layer cannot hold names that begin with %q: %w", whPrefix, ErrInvalid))
		}
		if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			if warn {
				d.o.Warn(join(dir.path, name), "socket left out")
			}
			continue
		}
		names, stats = append(names, name), append(stats, st)
	}
	return names, stats, nil
}

// walk plans for what is in the directories low (nil: nothing) and up. index is up's item.
func (d *differ) walk(low, up *openDir, index int) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	defer up.pin()()
	if low != nil {
		defer low.pin()()
	}
	lowNames, lowStats, err := d.names(low, false)
	if err != nil {
		return err
	}
	upNames, upStats, err := d.names(up, true)
	if err != nil {
		return err
	}
	in := 0
	for _, name := range lowNames {
		for in < len(upNames) && upNames[in] < name {
			in++
		}
		if in == len(upNames) || upNames[in] != name {
			d.items = append(d.items, item{path: join(up.path, name), parent: index, kind: itemWhiteout, emit: true})
		}
	}
	in = 0
	for i, name := range upNames {
		for in < len(lowNames) && lowNames[in] < name {
			in++
		}
		var lst *unix.Stat_t
		if in < len(lowNames) && lowNames[in] == name {
			lst = &lowStats[in]
		}
		if err := d.visit(low, lst, up, &upStats[i], name, index); err != nil {
			return d.entryErr(join(up.path, name), err)
		}
	}
	return nil
}

// visit plans for one name of upper; lst is nil if lower does not have it.
func (d *differ) visit(low *openDir, lst *unix.Stat_t, up *openDir, ust *unix.Stat_t, name string, index int) error {
	it := item{path: join(up.path, name), parent: index, emit: true}
	if !isDir(ust) {
		it.kind = itemFile
		if lst != nil {
			same, err := d.sameFile(low, lst, up, ust, name)
			if err != nil {
				return err
			}
			it.emit = !same
		}
		if ust.Nlink > 1 || (!it.emit && lst.Nlink > 1) {
			it.links, it.ino = true, ust.Ino
			if !it.emit {
				it.lowIno = lst.Ino
			}
		}
		if it.emit || it.links {
			d.items = append(d.items, it)
		}
		return nil
	}
	next, err := d.up.child(up, name)
	if err != nil {
		return err
	}
	defer next.pin()()
	var lowNext *openDir
	if lst != nil && isDir(lst) {
		if lowNext, err = d.low.child(low, name); err != nil {
			return err
		}
		if it.emit, err = d.dirChanged(lowNext, next); err != nil {
			return err
		}
	}
	d.items = append(d.items, it)
	return d.walk(lowNext, next, len(d.items)-1)
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
