package nbd

import (
	"errors"
	"fmt"

	"mica/dev"
)

// serveTask serves t in a worker, sends what there is to send, and frees it.
func (c *conn) serveTask(t *task) {
	switch t.req.cmd {
	case cmdRead:
		c.serveRead(t)
	case cmdBlockStatus:
		c.serveStatus(t)
	default:
		c.finish(t, c.change(t))
	}
	c.freeTask(t)
}

// change does a command that returns no data, but for its FUA.
func (c *conn) change(t *task) error {
	d, off, n := c.e.d, t.off, int64(t.req.n)
	switch t.req.cmd {
	case cmdWrite:
		_, err := d.WriteAt(t.data, off)
		return err
	case cmdFlush:
		return d.Flush()
	case cmdTrim:
		if err := c.e.discarder.Discard(off, n); !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
		return nil // it is a hint
	case cmdWriteZeroes:
		return c.writeZeroes(off, n, t.req.flags)
	}
	return refuse(EINVAL, "%s: unknown", commandName(t.req.cmd))
}

func (c *conn) writeZeroes(off, n int64, flags uint16) error {
	fast, noHole := flags&cmdFlagFastZero != 0, flags&cmdFlagNoHole != 0
	if z := c.e.zeroer; z != nil && !(fast && noHole) {
		if err := z.WriteZeroes(off, n, noHole); !errors.Is(err, dev.ErrUnsupported) {
			return err
		}
	}
	if fast {
		return refuse(ENOTSUP, "write zeroes: not faster than writing")
	}
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := c.e.d.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// finish ends a task that changes data, or a piece of one: the last piece makes a forced write
// durable and replies.
func (c *conn) finish(t *task, err error) {
	if g := t.grp; g != nil {
		c.sendMu.Lock()
		if g.err == nil {
			g.err = err
		}
		g.left--
		left := g.left
		err = g.err
		c.sendMu.Unlock()
		if left > 0 {
			return
		}
	}
	if err == nil && t.req.flags&cmdFlagFUA != 0 && t.req.cmd != cmdFlush {
		err = c.e.d.Flush()
	}
	var b []byte
	if err != nil {
		b = c.errorReply(&t.req, err)
	} else {
		b = t.hdr[:simpleSize]
		putSimple(b, t.req.cookie, 0)
	}
	t.bufs[0] = b
	c.sendMu.Lock()
	c.sendLocked(t.bufs[:1])
	c.sendMu.Unlock()
}

// serveRead serves a READ or a piece of one.
func (c *conn) serveRead(t *task) {
	if !c.t.structured {
		c.readSimple(t)
		return
	}
	if c.e.findsHoles() && c.readHoles(t) {
		return
	}
	if err := readFull(c.e, t.data, t.off); err != nil {
		c.endRead(t, err)
		return
	}
	c.sendMu.Lock()
	flags, err := c.pieceDoneLocked(t, nil)
	if err == nil {
		putDataChunk(t.hdr[:], flags, t.req.cookie, uint64(t.off), len(t.data))
		t.bufs = [2][]byte{t.hdr[:dataChunkSize], t.data}
		c.sendLocked(t.bufs[:])
	}
	c.sendMu.Unlock()
	if err != nil {
		c.sendError(t, err)
	}
}

// pieceDoneLocked counts a piece as finished. The chunk that is sent next, under the same lock,
// carries the returned flags; if an error is returned instead, an error chunk ends the reply.
func (c *conn) pieceDoneLocked(t *task, err error) (flags uint16, final error) {
	g := t.grp
	if g == nil {
		return chunkFlagDone, err
	}
	if g.err == nil {
		g.err = err
	}
	if g.left--; g.left > 0 {
		return 0, nil
	}
	return chunkFlagDone, g.err
}

// endRead ends a piece that has no data to send.
func (c *conn) endRead(t *task, err error) {
	c.sendMu.Lock()
	_, err = c.pieceDoneLocked(t, err)
	c.sendMu.Unlock()
	if err != nil {
		c.sendError(t, err)
	}
}

func (c *conn) sendError(t *task, err error) {
	t.bufs[0] = c.errorReply(&t.req, err)
	c.sendMu.Lock()
	c.sendLocked(t.bufs[:1])
	c.sendMu.Unlock()
}

// readSimple answers with a simple reply: everything is read before the header is sent, unless
// the request is longer than wholeSize.
func (c *conn) readSimple(t *task) {
	if err := readFull(c.e, t.data, t.off); err != nil {
		c.sendError(t, err)
		return
	}
	putSimple(t.hdr[:], t.req.cookie, 0)
	t.bufs = [2][]byte{t.hdr[:simpleSize], t.data}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	err := c.sendLocked(t.bufs[:])
	for done := len(t.data); done < int(t.req.n) && err == nil; done += len(t.data) {
		t.data = t.buf.b[:min(pieceSize, int(t.req.n)-done)]
		if err := readFull(c.e, t.data, t.off+int64(done)); err != nil {
			// The header has promised success; the protocol leaves one way out.
			c.sendErr = fmt.Errorf("read after the reply's header was sent: %w", err)
			c.log.Warn("connection closed", "export", c.e.name, "error", c.sendErr)
			c.link.abort()
			return
		}
		t.bufs[0] = t.data
		err = c.sendLocked(t.bufs[:1])
	}
}
