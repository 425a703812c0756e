package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"
	"time"
)

// copyBuffer is the size in bytes of one piece of a stream.
const copyBuffer = 256 << 10

// A watch ends an operation that waits for the helper too long. The time in which we wait for
// our own reader or writer does not count: whoever gave it bounds it.
type watch struct {
	since atomic.Int64 // when we began to wait for the helper, Unix nanoseconds; 0: we do not
	quit  chan struct{}
}

func newWatch(limit time.Duration, cancel context.CancelCauseFunc) *watch {
	w := &watch{quit: make(chan struct{})}
	w.waiting()
	go func() {
		tick := time.NewTicker(max(limit/8, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-w.quit:
				return
			case now := <-tick.C:
				if s := w.since.Load(); s != 0 && now.Sub(time.Unix(0, s)) > limit {
					cancel(fmt.Errorf("nothing moved for %v: %w", limit, ErrTimeout))
					return
				}
			}
		}
	}()
	return w
}

func (w *watch) waiting() { w.since.Store(time.Now().UnixNano()) }
func (w *watch) ours()    { w.since.Store(0) }
func (w *watch) stop()    { close(w.quit) }

// feed copies r to the helper and closes the pipe at r's end. An error of r is returned (and the
// helper killed, so that it does not take what it has for the whole); one of the pipe is not:
// the helper says itself why it stopped reading.
func (p *process) feed(r io.Reader, w *watch) error {
	defer w.waiting()
	buf := make([]byte, copyBuffer)
	for {
		w.ours()
		n, err := r.Read(buf)
		if n > 0 {
			w.waiting()
			if _, werr := p.data.Write(buf[:n]); werr != nil {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return p.data.Close()
		}
		if err != nil {
			p.kill()
			return err
		}
	}
}

// waitFeed gets the feed's result. After a failure a feed that waits for its reader is given up:
// the reader belongs to the caller, who ends it.
func waitFeed(fed <-chan error, failed bool) error {
	if !failed {
		return <-fed
	}
	select {
	case err := <-fed:
		return err
	case <-time.After(100 * time.Millisecond):
		return nil
	}
}

// drain copies the helper's stream to w, to its end. After an error of w the helper is ended by
// the pipe.
func (p *process) drain(out io.Writer, w *watch) error {
	buf := make([]byte, copyBuffer)
	defer w.waiting()
	for {
		w.waiting()
		n, err := p.data.Read(buf)
		if n > 0 {
			w.ours()
			if _, werr := out.Write(buf[:n]); werr != nil {
				if errors.Is(werr, syscall.EPIPE) {
					return fmt.Errorf("reader went away: %w", werr)
				}
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
