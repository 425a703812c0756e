package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// ErrUnavailable: this host has no device-mapper, or not the thin-pool target.
var ErrUnavailable = errors.New("the kernel engine is not available")

// ErrForeign: an active pool that is not empty, or not mica's to use.
var ErrForeign = errors.New("the pool belongs to somebody else")

// ErrJournal: acknowledged writes of the user engine wait to be taken over.
var ErrJournal = errors.New("a journal of the user engine waits")

// messageErr explains the errno of a message about a thin device (and the one that it is made
// from).
func (p *Pool) messageErr(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%s: %w", what, thin.ErrExists)
	case errors.Is(err, unix.ENODATA):
		return fmt.Errorf("%s: %w", what, thin.ErrNotFound)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: it is active: %w", what, engine.ErrInUse)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSPC):
		if why := p.writable(); why != nil {
			return fmt.Errorf("%s: %w", what, why)
		}
	case errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s: the pool's device is gone: %w: %w", what, engine.ErrFailed, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// ioErr explains the errno of a request to a thin device.
func (t *Thin) ioErr(what string, err error) error {
	if err == nil {
		return nil
	}
	switch {
	case errors.Is(err, dev.ErrClosed), errors.Is(err, dev.ErrOutOfRange):
	case errors.Is(err, unix.ENOSPC):
		err = fmt.Errorf("%w in the pool: %w", dev.ErrNoSpace, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EPERM), errors.Is(err, unix.EBADF) && t.readOnly:
		err = fmt.Errorf("%w: %w", dev.ErrReadOnly, err)
	case errors.Is(err, unix.EIO):
		// The kernel has one word for a medium that fails and for a pool that takes no changes.
		if why := t.p.writable(); why != nil {
			err = fmt.Errorf("%w: %w", why, err)
		}
	}
	return fmt.Errorf("thin %d: %s: %w", t.id, what, err)
}

// writable says why the pool takes no changes, or nil.
func (p *Pool) writable() error {
	st, err := p.poolStatus(true)
	switch {
	case err != nil:
		return err
	case st.Failed:
		return fmt.Errorf("%w: the kernel has put the pool into mode Fail", engine.ErrFailed)
	case st.Mode != "ro":
		return nil
	case st.NeedsCheck:
		return fmt.Errorf("%w: the pool %w", dev.ErrReadOnly, thin.ErrNeedsCheck)
	case p.opts.ReadOnly:
		return fmt.Errorf("%w: the pool was opened read-only", dev.ErrReadOnly)
	}
	// Mode ro without the mark: the metadata reserve has been reached.
	return fmt.Errorf("%w (%d of %d metadata blocks used, the kernel's reserve included; grow the metadata): %w",
		thin.ErrNoMetaSpace, st.MetaUsed, st.MetaSize, dev.ErrNoSpace)
}
