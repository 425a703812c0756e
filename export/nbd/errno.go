package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"mica/dev"
)

// Errno is an error number as the NBD protocol defines it, whatever the platform's are.
type Errno uint32

// All error numbers of the protocol that this server sends.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return fmt.Sprintf("nbd error %d", uint32(e))
}

// A refusal is a request that the server itself turns down.
type refusal struct {
	errno Errno
	why   string
}

func (r *refusal) Error() string { return r.why }

func refuse(e Errno, format string, args ...any) error {
	return &refusal{errno: e, why: fmt.Sprintf(format, args...)}
}

var errShutdown error = &refusal{errno: ESHUTDOWN, why: "server is shutting down"}

// errnoOf is the one place where errors become numbers on the wire.
func errnoOf(err error) Errno {
	var r *refusal
	var e Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &r):
		return r.errno
	case errors.As(err, &e):
		return e
	case errors.Is(err, dev.ErrNoSpace),
		errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return ENOSPC
	case errors.Is(err, dev.ErrReadOnly),
		errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return EPERM
	case errors.Is(err, dev.ErrOutOfRange), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return EINVAL
	case errors.Is(err, dev.ErrClosed), errors.Is(err, context.Canceled):
		return ESHUTDOWN
	}
	return EIO
}
