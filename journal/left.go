package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/thin"
)

// A Left is a journal that an earlier opener of a pool has left: it was killed, or the pool had
// failed.
type Left struct {
	m        *mapping
	writable bool
	c        *content // nil if bad
	bad      string   // why it is of no use
}

// Find returns what was left for a pool, one for each place where something lies, or nothing.
// The caller holds the pool's lock. What cannot be understood but may matter (ErrVersion, a place
// that somebody else has a hand in) is an error.
func Find(id Identity, o Options, writable bool) (_ []*Left, err error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	var found []*Left
	defer func() {
		if err != nil {
			for _, l := range found {
				l.Close()
			}
		}
	}()
	for _, dir := range o.dirs(id.UID) {
		path := filepath.Join(dir, id.name())
		fd, err := openDir(dir, id.UID, false)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNotHere) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for the journal of %s: %w", id.Path, err)
		}
		m, err := openFile(fd, path, id.UID, writable)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("journal of %s: %w", id.Path, err)
		}
		l, err := newLeft(m, id, boot)
		if err != nil {
			m.unmap()
			return nil, fmt.Errorf("journal of %s: %s: %w", id.Path, path, err)
		}
		l.writable = writable
		found = append(found, l)
	}
	return found, nil
}

func newLeft(m *mapping, id Identity, boot [16]byte) (*Left, error) {
	l := &Left{m: m}
	c, err := read(m.mem)
	switch {
	case errors.Is(err, ErrVersion):
		return nil, fmt.Errorf("%w: a newer mica has left changes in it that no commit holds: start that one, or remove the file to give up the last moments before it was killed", err)
	case err != nil:
		l.bad = err.Error()
	case c.boot != boot:
		l.bad = "it is of another boot of this machine"
	case !c.id.same(id):
		l.bad = fmt.Sprintf("it is of another pool, %s", c.id.Path)
	default:
		l.c = c
	}
	return l, nil
}

// Path is where the file is.
func (l *Left) Path() string { return l.m.path }

// Entries returns the changes that a pool lacks whose superblock on the medium is the one named by
// disk, in the order in which they happened. why is not empty if something was lost with the
// journal, or may have been.
func (l *Left) Entries(disk State) (entries []Entry, why string) {
	if l.c == nil {
		return nil, l.bad
	}
	entries, lost, why := l.c.choose(disk)
	if why != "" && lost > 0 {
		why = fmt.Sprintf("up to %d entries: %s", lost, why)
	}
	return entries, why
}

// Done notes the superblock that is about to be written to a pool which has taken the entries:
// with it on the medium nothing is left to take.
func (l *Left) Done(next State) { putRecord(l.m.mem[doneAt:], markDone, 0, next) }

// Fail makes the journal worthless: what it tells of may be lost, the data device could not be
// synced.
func (l *Left) Fail() { word(l.m.mem, failedAt).Store(1) }

// Remove takes the journal away.
func (l *Left) Remove() error { return errors.Join(l.m.unlink(), l.m.unmap()) }

// Close leaves it where it is.
func (l *Left) Close() error { return l.m.unmap() }

// Discard removes what was left for a pool that is being made anew. The caller holds the pool's
// lock.
func Discard(id Identity, o Options) error {
	for _, dir := range o.dirs(id.UID) {
		fd, err := openDir(dir, id.UID, false)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errNotHere) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look for the journal of %s: %w", id.Path, err)
		}
		m := &mapping{path: filepath.Join(dir, id.name()), dir: fd, name: id.name()}
		if err := errors.Join(m.unlink(), m.unmap()); err != nil {
			return err
		}
	}
	return nil
}

// A Waiting says that a journal waits for a pool to be opened for writing: what is on the
// medium lacks what was acknowledged in the last moments before an opener was killed.
type Waiting struct {
	Path    string // of the journal
	Entries int    // changes, or runs of changes, that wait
	Why     string // if not empty, they cannot be taken over any more, for this reason
}

// WaitingFor looks whether a journal waits for the pool with this metadata device; nil if none
// does. Whoever is about to let something else write to a pool (a kernel, a repair) asks under
// the pool's lock: while somebody has the pool open, its journal looks like one that waits.
func WaitingFor(metadataPath string, o Options) (*Waiting, error) {
	id, err := Identify(metadataPath)
	if err != nil {
		return nil, err
	}
	left, err := Find(id, o, false)
	if err != nil || len(left) == 0 {
		return nil, err
	}
	defer func() {
		for _, l := range left {
			l.Close()
		}
	}()
	disk, err := stateOn(metadataPath)
	if err != nil {
		return nil, err
	}
	var lost *Waiting
	for _, l := range left {
		entries, why := l.Entries(disk)
		if len(entries) > 0 {
			return &Waiting{Path: l.Path(), Entries: len(entries)}, nil
		}
		if why != "" && lost == nil {
			lost = &Waiting{Path: l.Path(), Why: why}
		}
	}
	return lost, nil
}

// stateOn reads the superblock of a metadata device.
func stateOn(path string) (State, error) {
	d, err := dev.Open(path, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		return State{}, err
	}
	defer d.Close()
	b := make([]byte, pageBytes)
	if _, err := d.ReadAt(b, 0); err != nil {
		return State{}, fmt.Errorf("read the superblock of %s: %w", path, err)
	}
	return StateOf(thin.DecodeSuperblock(b)), nil
}
