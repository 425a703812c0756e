package fuse

import (
	"errors"
	"io"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// errnoOf is the one place where errors of a device become what the kernel is told. ENOSPC
// reaches the application through the loop driver as ENOSPC; nearly all others as EIO.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, dev.ErrNoSpace):
		return unix.ENOSPC
	case errors.Is(err, dev.ErrReadOnly):
		return unix.EROFS
	case errors.Is(err, dev.ErrOutOfRange), errors.Is(err, errMalformed):
		return unix.EINVAL
	case errors.Is(err, dev.ErrUnsupported):
		return unix.EOPNOTSUPP
	case errors.Is(err, dev.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return unix.EIO
	case errors.As(err, &errno):
		switch errno {
		// The kernel gives these a meaning of its own (retry, "not implemented", success).
		case 0, unix.EAGAIN, unix.EINTR, unix.ENOSYS:
			return unix.EIO
		case unix.EDQUOT:
			return unix.ENOSPC
		}
		// Values that the kernel does not accept in a reply end the connection.
		if errno > 511 {
			return unix.EIO
		}
		return errno
	}
	return unix.EIO
}
