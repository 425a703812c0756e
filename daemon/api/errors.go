package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"mica/dev"
	"mica/engine"
	"mica/layer"
	"mica/thin"
)

// A Code says what kind of error it is. Programs branch on it, never on the message.
type Code string

// The codes, and the HTTP status each one comes with.
const (
	CodeInvalid     Code = "invalid"     // 400: a name, size, parameter or body that cannot be used
	CodeNotFound    Code = "not_found"   // 404
	CodeExists      Code = "exists"      // 409: the name is taken by an object with other parameters
	CodeInUse       Code = "in_use"      // 409: something else needs it, or it must be detached first
	CodeBusy        Code = "busy"        // 409: mounted or open; details.holders says by whom
	CodeBroken      Code = "broken"      // 409: its thin device is missing
	CodeGuestOwned  Code = "guest_owned" // 409: the file system was written by a guest
	CodeReadOnly    Code = "read_only"   // 409: the store or the pool takes no changes
	CodeNeedsCheck  Code = "needs_check" // 409: the pool must be checked first
	CodeDigest      Code = "digest"      // 422: contents do not have the digest they should have
	CodeNoSpace     Code = "no_space"    // 507
	CodeCancelled   Code = "cancelled"   // 409: the operation was cancelled
	CodeTooLarge    Code = "too_large"   // 413: the body is longer than the limit
	CodeMethod      Code = "method"      // 405
	CodeTooMany     Code = "too_many"    // 429: too many operations at the same time
	CodeUnsupported Code = "unsupported" // 501: this host or this build cannot do that
	CodeClosing     Code = "closing"     // 503: the daemon is shutting down
	CodeInternal    Code = "internal"    // 500
)

var statusOf = map[Code]int{
	CodeInvalid:     http.StatusBadRequest,
	CodeNotFound:    http.StatusNotFound,
	CodeExists:      http.StatusConflict,
	CodeInUse:       http.StatusConflict,
	CodeBusy:        http.StatusConflict,
	CodeBroken:      http.StatusConflict,
	CodeGuestOwned:  http.StatusConflict,
	CodeReadOnly:    http.StatusConflict,
	CodeNeedsCheck:  http.StatusConflict,
	CodeDigest:      http.StatusUnprocessableEntity,
	CodeNoSpace:     http.StatusInsufficientStorage,
	CodeCancelled:   http.StatusConflict,
	CodeTooLarge:    http.StatusRequestEntityTooLarge,
	CodeMethod:      http.StatusMethodNotAllowed,
	CodeTooMany:     http.StatusTooManyRequests,
	CodeUnsupported: http.StatusNotImplemented,
	CodeClosing:     http.StatusServiceUnavailable,
	CodeInternal:    http.StatusInternalServerError,
}

// Codes lists every code there is, in no particular order.
func Codes() []Code {
	list := make([]Code, 0, len(statusOf))
	for c := range statusOf {
		list = append(list, c)
	}
	return list
}

// An Error is the body of every answer that is not a success. It is an error itself, and matches
// the condition that it stands for (errors.Is(err, layer.ErrNotFound)).
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	// Name is the object it is about, where there is one.
	Name    string         `json:"name,omitempty"`
	Details map[string]any `json:"details,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Status is the HTTP status that belongs to the code.
func (e *Error) Status() int {
	if s, ok := statusOf[e.Code]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// Is matches the conditions of the packages below.
func (e *Error) Is(target error) bool {
	for _, c := range conditions {
		if c.code == e.Code && c.err == target {
			return true
		}
	}
	return false
}

// conditions maps what callers branch on to codes. The first that matches counts, so that the
// special stands before the general.
var conditions = []struct {
	err  error
	code Code
}{
	{layer.ErrInvalid, CodeInvalid},
	{layer.ErrNotFound, CodeNotFound},
	{layer.ErrBusy, CodeBusy},
	{layer.ErrExists, CodeExists},
	{layer.ErrGuestOwned, CodeGuestOwned},
	{layer.ErrBroken, CodeBroken},
	{layer.ErrDigest, CodeDigest},
	{layer.ErrNoSpace, CodeNoSpace},
	{thin.ErrNoMetaSpace, CodeNoSpace},
	{engine.ErrFailed, CodeNeedsCheck},
	{thin.ErrNeedsCheck, CodeNeedsCheck},
	{layer.ErrReadOnly, CodeReadOnly},
	{layer.ErrInUse, CodeInUse},
	{engine.ErrInUse, CodeInUse},
	{thin.ErrNotFound, CodeNotFound},
	{thin.ErrExists, CodeExists},
	{dev.ErrOutOfRange, CodeInvalid},
	{layer.ErrClosed, CodeClosing},
	{errors.ErrUnsupported, CodeUnsupported},
	{context.Canceled, CodeCancelled},
}

// Errorf makes an error of a code.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// FromError turns any error into the one to send. name is the object of the request and may be
// empty.
func FromError(err error, name string) *Error {
	var e *Error
	if errors.As(err, &e) {
		if e.Name != "" || name == "" {
			return e
		}
		c := *e
		c.Name = name
		return &c
	}
	e = &Error{Code: CodeInternal, Message: err.Error(), Name: name}
	for _, c := range conditions {
		if errors.Is(err, c.err) {
			e.Code = c.code
			break
		}
	}
	return e
}
