package snapshotter

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"

	"mica/engine"
	"mica/layer"
	"mica/layer/archive"
	"mica/thin"
)

// A classed error reads like the error in it, and belongs to a class that containerd acts on.
type classed struct {
	err   error
	class error
}

func (e *classed) Error() string   { return e.err.Error() }
func (e *classed) Unwrap() []error { return []error{e.err, e.class} }

// classes says which of containerd's classes an error belongs to; the first that matches counts.
var classes = []struct{ is, class error }{
	{layer.ErrNoSpace, errdefs.ErrResourceExhausted},
	{thin.ErrNoMetaSpace, errdefs.ErrResourceExhausted},
	{layer.ErrExists, errdefs.ErrAlreadyExists},
	{layer.ErrInvalid, errdefs.ErrInvalidArgument},
	{archive.ErrEscape, errdefs.ErrInvalidArgument},
	{archive.ErrInvalid, errdefs.ErrInvalidArgument},
	{archive.ErrLimit, errdefs.ErrInvalidArgument},
	{layer.ErrState, errdefs.ErrFailedPrecondition},
	{layer.ErrInUse, errdefs.ErrFailedPrecondition},
	{layer.ErrBusy, errdefs.ErrFailedPrecondition},
	{layer.ErrReadOnly, errdefs.ErrFailedPrecondition},
	{layer.ErrBroken, errdefs.ErrFailedPrecondition},
	{layer.ErrGuestOwned, errdefs.ErrFailedPrecondition},
	{layer.ErrNotFound, errdefs.ErrNotFound},
	{layer.ErrDigest, errdefs.ErrDataLoss},
	{layer.ErrClosed, errdefs.ErrUnavailable},
	{context.Canceled, context.Canceled},
	{context.DeadlineExceeded, context.DeadlineExceeded},
	{engine.ErrFailed, errdefs.ErrInternal},
}

// class gives an error its class. One that has a class keeps it.
func class(err error) error {
	var c *classed
	if err == nil || errors.As(err, &c) {
		return err
	}
	for _, k := range classes {
		if errors.Is(err, k.is) {
			return &classed{err, k.class}
		}
	}
	return &classed{err, errdefs.ErrUnknown}
}

// as gives an error a class whatever it had.
func as(err, class error) error { return &classed{err, class} }
