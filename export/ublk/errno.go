package ublk

import (
	"errors"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// errnoOf is the one place where errors of a device become what the driver is told. The block
// layer knows few; what it does not know is an I/O error to the application.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, dev.ErrNoSpace):
		return unix.ENOSPC
	case errors.Is(err, dev.ErrReadOnly):
		return unix.EROFS
	case errors.Is(err, dev.ErrOutOfRange):
		return unix.EINVAL
	case errors.Is(err, dev.ErrUnsupported):
		return unix.EOPNOTSUPP
	case errors.As(err, &errno):
		switch errno {
		// The driver gives these a meaning of its own: try again, the device is gone.
		case 0, unix.EAGAIN, unix.EINTR, unix.ENODEV:
			return unix.EIO
		case unix.EDQUOT:
			return unix.ENOSPC
		}
		return errno
	}
	return unix.EIO
}
