package daemon

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"time"

	"mica/daemon/api"
)

// A stallReader reads a request's body. It gives up when nothing comes for its limit (0: never) and
// as soon as ctx ends.
type stallReader struct {
	ctx   context.Context
	r     io.Reader
	c     *http.ResponseController
	limit time.Duration
	stop  func() bool
}

func newStallReader(ctx context.Context, q *request, limit time.Duration) *stallReader {
	s := &stallReader{ctx: ctx, r: q.Body, c: http.NewResponseController(q.w), limit: limit}
	s.stop = context.AfterFunc(ctx, s.interrupt)
	return s
}

// interrupt makes a Read that waits return.
func (s *stallReader) interrupt() { s.c.SetReadDeadline(time.Unix(1, 0)) }

func (s *stallReader) Read(p []byte) (int, error) {
	begin := time.Now()
	if s.limit > 0 {
		s.c.SetReadDeadline(begin.Add(s.limit))
	}
	if s.ctx.Err() != nil {
		s.interrupt() // after the deadline above, which may have taken its place
		return 0, s.ctx.Err()
	}
	n, err := s.r.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// Package http cancels the request after any failed read, so the clock tells.
		if err = s.ctx.Err(); err == nil || s.limit > 0 && time.Since(begin) >= s.limit {
			err = api.Errorf(api.CodeInvalid, "the archive stopped: not a byte of it came in %v", s.limit)
		}
	}
	return n, err
}

// done lets the connection serve other requests.
func (s *stallReader) done() {
	if s.stop() {
		s.c.SetReadDeadline(time.Time{})
	}
}

// A lateWriter sends the header of a stream with its first byte, and gives up when the client
// takes nothing for its limit (0: never).
type lateWriter struct {
	w     http.ResponseWriter
	c     *http.ResponseController
	limit time.Duration
	begun bool
}

func (l *lateWriter) begin() {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", api.MediaTar)
		l.w.Header().Set("Trailer", api.TrailerLevel)
		l.w.WriteHeader(http.StatusOK)
	}
}

func (l *lateWriter) Write(p []byte) (int, error) {
	l.begin()
	if l.limit > 0 {
		l.c.SetWriteDeadline(time.Now().Add(l.limit))
	}
	return l.w.Write(p)
}

// done lets the connection serve other requests.
func (l *lateWriter) done() { l.c.SetWriteDeadline(time.Time{}) }
