package nbd

import (
	"errors"
	"fmt"
	"io"

	"mica/dev"
)

// flush sends the batch.
func (c *conn) flush() error {
	if c.out.n == 0 {
		return nil
	}
	c.sendMu.Lock()
	err := c.sendLocked(c.out.bufs)
	c.sendMu.Unlock()
	c.out.reset()
	return err
}

// sendLocked sends one or more whole messages. After an error the stream is broken: nothing is
// sent any more, and the reader finds out when it next sends or receives.
func (c *conn) sendLocked(bufs [][]byte) error {
	if c.sendErr == nil {
		if c.sendErr = c.link.send(bufs); c.sendErr != nil {
			c.link.abort()
		}
	}
	return c.sendErr
}

// ack answers a request without data that was served inline.
func (c *conn) ack(r *request, err error) error {
	if err != nil {
		return c.fail(r, err)
	}
	if c.out.full() {
		if err := c.flush(); err != nil {
			return err
		}
	}
	putSimple(c.out.header(simpleSize), r.cookie, 0)
	return nil
}

// fail answers a request that the reader could not serve.
func (c *conn) fail(r *request, err error) error {
	if err := c.flush(); err != nil {
		return err
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.sendLocked([][]byte{c.errorReply(r, err)})
}

// errorReply makes the final reply to a request that failed, and logs what deserves it.
func (c *conn) errorReply(r *request, err error) []byte {
	e := errnoOf(err)
	if e == EIO {
		if n := c.failures.Add(1); n&(n-1) == 0 { // the 1st, 2nd, 4th, ...
			c.log.Warn("request failed", "export", c.e.name, "command", commandName(r.cmd),
				"offset", r.off, "length", r.n, "failures", n, "error", err)
		}
	}
	if c.t.structured {
		return appendErrorChunk(nil, r.cookie, e, err.Error())
	}
	b := make([]byte, simpleSize)
	putSimple(b, r.cookie, e)
	return b
}

// isWouldBlock is errors.Is(err, dev.ErrWouldBlock), cheap for nil and for the error itself.
func isWouldBlock(err error) bool {
	return err == dev.ErrWouldBlock || err != nil && errors.Is(err, dev.ErrWouldBlock)
}

// readFull fills p from the device. Reading exactly up to the end may return io.EOF.
func readFull(e *export, p []byte, off int64) error {
	n, err := e.d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("read at %d: %d of %d bytes: %w", off, n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}
