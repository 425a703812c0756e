package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"mica/dev"
	"mica/export"
	"mica/export/holder"
	"mica/export/loop"
	"mica/export/node"

	"golang.org/x/sys/unix"
)

// kernelResends reports whether this kernel can put requests that a dead server had read back
// into the queue: FUSE_HAS_RESEND came with Linux 6.9.
func kernelResends() (bool, string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false, "uname: " + err.Error()
	}
	release := unix.ByteSliceToString(u.Release[:])
	if major, minor := version(release); major < 6 || major == 6 && minor < 9 {
		return false, fmt.Sprintf("kernel %s cannot resend FUSE requests: want 6.9 or later", release)
	}
	return true, ""
}

// version reads the first two numbers of a kernel release such as "6.12.9+bpo-amd64".
func version(release string) (major, minor int) {
	a, rest, _ := strings.Cut(release, ".")
	b := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		b = rest[:i]
	}
	major, _ = strconv.Atoi(a)
	minor, _ = strconv.Atoi(b)
	return major, minor
}

// Survivors lists what a dead predecessor served and this exporter does not yet.
func (e *Exporter) Survivors(ctx context.Context) ([]string, error) {
	if e.keep == nil {
		return nil, nil
	}
	all, err := e.keep.list()
	if err != nil {
		return nil, fmt.Errorf("survivors: %w", err)
	}
	var names []string
	for name, rec := range all {
		e.mu.Lock()
		_, mine := e.atts[name]
		e.mu.Unlock()
		switch {
		case mine:
		case rec.Version == recordVersion && !rec.Live:
			if err := e.Drop(ctx, name); err != nil && !errors.Is(err, export.ErrNotFound) && !errors.Is(err, export.ErrExists) {
				return nil, fmt.Errorf("survivors: %w", err)
			}
		default:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Adopt takes a survivor's connection from the holder and serves it from d. If the survivor was
// being detached when its server died and is gone by now, the error is export.ErrNotFound, and
// the name is free.
func (e *Exporter) Adopt(ctx context.Context, name string, d dev.Device) (export.Attachment, error) {
	if err := e.claim(name); err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	a, err := e.adopt(name, d)
	e.settle(name, a)
	if err != nil {
		return nil, fmt.Errorf("adopt %q: %w", name, err)
	}
	if d.Size() > a.rec.Size {
		if err := a.Resize(ctx); err != nil {
			e.o.Logger.Warn("grow an adopted device", "name", name, "error", err)
		}
	}
	return a, nil
}

func (e *Exporter) adopt(name string, d dev.Device) (_ *attachment, err error) {
	if e.keep == nil {
		return nil, fmt.Errorf("no holder is configured: %w", export.ErrNotFound)
	}
	fd, rec, err := e.keep.get(name)
	if errors.Is(err, holder.ErrNotFound) {
		return nil, export.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	switch b := loop.Backing(rec.Loop.Number); {
	case !rec.Live || gone(rec, e.backing(name)):
		// Its detach was under way when the predecessor died.
		if err := e.dropSurvivor(name, rec); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s is no longer on its file: %w", rec.Loop.Node, export.ErrNotFound)
	case b != e.backing(name):
		return nil, fmt.Errorf("%s is on %q, not %q: drop it", rec.Loop.Node, b, e.backing(name))
	case d.Size() < rec.Size:
		return nil, fmt.Errorf("device of %d bytes, the node has %d", d.Size(), rec.Size)
	}
	a := newAttachment(e, name, d)
	a.rec = rec
	if a.s, err = newServer(fd, d, rec.ReadOnly, &e.o); err != nil {
		return nil, err
	}
	a.s.kernel = rec.Kernel
	close(a.s.ready)
	a.s.park, a.s.onEnd = e.park.park, a.cut
	a.s.join(&e.crew)
	if rec.Kernel.Resend {
		if err := a.s.resend(); err != nil {
			a.s.close()
			return nil, err
		}
	}
	if err := e.links.Make(name, rec.Loop.Node); err != nil {
		a.s.close()
		return nil, err
	}
	if rec.Kernel.Resend {
		err = e.keep.put(name, rec, fd) // so that a new holder would get it
	} else {
		err = e.keep.drop(name) // our death must end the connection
	}
	if err != nil {
		a.s.close()
		return nil, err
	}
	e.reap.used(rec.Loop)
	a.s.start()
	return a, nil
}

// Drop cuts a survivor off: its requests fail, and its node goes as soon as nobody uses it.
func (e *Exporter) Drop(_ context.Context, name string) error {
	if e.keep == nil {
		return fmt.Errorf("drop %q: %w", name, export.ErrNotFound)
	}
	if err := e.claim(name); err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	defer e.settle(name, nil)
	all, err := e.keep.list()
	if err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	rec, ok := all[name]
	if !ok {
		return fmt.Errorf("drop %q: %w", name, export.ErrNotFound)
	}
	if err := e.dropSurvivor(name, rec); err != nil {
		return fmt.Errorf("drop %q: %w", name, err)
	}
	return nil
}

func (e *Exporter) dropSurvivor(name string, rec record) error {
	if err := e.links.Remove(name); err != nil {
		return err
	}
	// With the last descriptor the connection ends, and with it everything that waits.
	if err := e.keep.drop(name); err != nil {
		return err
	}
	if !rec.Live {
		if err := e.waitHelpers(name, rec.Helper); err != nil {
			return err
		}
	}
	err := e.removeMount(name)
	if rec.Loop.Node != "" && loop.Backing(rec.Loop.Number) != "" {
		// Its mount was detached lazily, so that it was not found by its file.
		if lerr := loop.Abandon(rec.Loop, e.backing(name)); lerr != nil && !errors.Is(lerr, loop.ErrNotBound) {
			err = errors.Join(err, lerr)
		}
	}
	return err
}

// clean removes what nobody serves and nobody holds: attachments whose attach or detach was
// interrupted, mounts without a connection, stale links. It runs before any device is attached.
func (e *Exporter) clean() error {
	known := make(map[string]record)
	if e.keep != nil {
		var err error
		if known, err = e.keep.list(); err != nil {
			return err
		}
	}
	for name, rec := range known {
		if rec.Version != recordVersion {
			continue // somebody else's; the caller sees it among the survivors
		}
		if rec.Live && !gone(rec, e.backing(name)) {
			continue
		}
		if err := e.dropSurvivor(name, rec); err != nil {
			return err
		}
		delete(known, name)
	}
	dirs, err := os.ReadDir(e.dir)
	if err != nil {
		return err
	}
	for _, de := range dirs {
		if _, held := known[de.Name()]; !held && de.IsDir() && node.CheckID(de.Name()) == nil {
			if err := e.cleanDir(de.Name()); err != nil {
				return err
			}
		}
	}
	if err := e.roll.clear(); err != nil {
		return err
	}
	// Links of other daemons in the same directory are told by the backing file, too.
	_, err = e.links.RemoveIf(func(id, target string) bool {
		n, err := loop.NumberOf(target)
		return err == nil && !strings.HasSuffix(loop.Backing(n), "/"+filepath.Join("fuse", id, diskName))
	})
	return err
}

// gone reports whether the loop device of a record was detached. A file of another path but the
// same name is ours, its mount detached lazily.
func gone(r record, backing string) bool {
	now := loop.Backing(r.Loop.Number)
	return now != backing && filepath.Base(now) != diskName
}

// waitHelpers waits for helpers of a predecessor, and another process if that is not 0, that may be
// about to put a loop device on an attachment's file. The end of the connection lets them go.
func (e *Exporter) waitHelpers(name string, other int) error {
	abort(e.mountDir(name))
	helpers, err := e.roll.read()
	if err != nil {
		return err
	}
	for _, pid := range append(helpers, other) {
		waitGone(pid, callTag(e.backing(name)), helperWait)
	}
	return nil
}

// cleanDir removes a mount point that is nobody's, and loop devices on it.
func (e *Exporter) cleanDir(name string) error {
	dir := e.mountDir(name)
	if !mounted(dir) { // stat would ask a server that may be gone
		if _, err := os.Lstat(dir); os.IsNotExist(err) {
			return nil
		}
	}
	e.o.Logger.Warn("clear away the rest of an attachment", "name", name)
	if err := e.waitHelpers(name, 0); err != nil {
		return err
	}
	if e.keep != nil {
		// The holder may have read a dead predecessor's last message only now.
		if err := e.keep.drop(name); err != nil {
			return err
		}
	}
	return e.removeMount(name)
}

// removeMount ends a connection, marks loop devices on its file to be cleared when nobody uses
// them, and takes the link and the mount away. It waits for nobody.
func (e *Exporter) removeMount(name string) error {
	dir := e.mountDir(name)
	errs := []error{e.links.Remove(name)}
	abort(dir)
	for _, n := range loop.Find(func(b string) bool { return b == e.backing(name) }) {
		err := loop.Abandon(loop.Device{Number: n, Node: fmt.Sprintf("/dev/loop%d", n)}, e.backing(name))
		if err != nil && !errors.Is(err, loop.ErrNotBound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, unmount(dir))...)
}
