package nbd

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
)

// A conn is one client in the transmission phase.
//
// Goroutines: the reader (run) and up to Options.Workers workers, which run waits for. sendMu is
// the only lock that both take; nothing is taken while it is held, and sending, which may wait
// for the client, happens under it.
type conn struct {
	e    *export
	t    terms
	link link
	log  *slog.Logger
	w    workers

	// The reader's own.
	in       inbuf
	out      batch
	want     int    // bytes that the next receive into in is for
	small    bool   // the next receive should not take more than a header: a payload follows
	direct   []byte // where a payload is being received
	inFn     func() []byte
	directFn func() []byte
	idleFn   func()

	pace pace

	draining atomic.Bool // answer what was received with ESHUTDOWN and end
	late     int         // requests received while draining; the reader's own
	goodbye  bool        // the client has said that it goes; the reader's own
	leaving  atomic.Bool // end without beginning another request: see RawConn.Leave

	sendMu  sync.Mutex // one message at a time on the link
	sendErr error      // guarded by sendMu: the first; nothing is sent after it

	failures atomic.Int64 // requests that failed in the device with EIO
}

func newConn(e *export, t terms, l link, workers int, b *budget, log *slog.Logger) *conn {
	c := &conn{e: e, t: t, link: l, log: log}
	c.w.init(workers, b, c.serveTask)
	c.out.reset()
	c.inFn, c.directFn, c.idleFn = c.inSpace, c.directSpace, c.idle
	return c
}

// run serves requests until the client disconnects, the connection breaks, or drain is called.
// It returns when nothing of the connection is left in flight; nil after an orderly end.
func (c *conn) run() error {
	err := c.readRequests()
	if ferr := c.flush(); err == nil { // what was served is answered, however this ends
		err = ferr
	}
	c.w.wait()
	c.out.reset()
	c.out.release()
	c.in.r, c.in.w = 0, 0
	c.in.release()
	return err
}

// drain ends the connection in an orderly way, from any goroutine.
func (c *conn) drain() {
	c.draining.Store(true)
	c.link.interrupt()
}

func (c *conn) readRequests() error {
	for {
		if c.leaving.Load() {
			return nil
		}
		if c.in.buffered() < requestSize {
			if c.draining.Load() {
				if c.late++; c.late > maxLate {
					return nil
				}
				c.link.interrupt() // again: a request in the middle may have lifted it
			}
			if err := c.fill(requestSize, false); err != nil {
				return c.endOf(err)
			}
		}
		r, err := decodeRequest(c.in.take(requestSize))
		if err != nil {
			return err
		}
		c.small = false
		switch {
		case r.cmd == cmdDisc:
			c.goodbye = true
			return nil
		case r.cmd == cmdRead:
			err = c.read(&r)
		case r.cmd == cmdWrite:
			err = c.write(&r)
		default:
			err = c.other(&r)
		}
		if err != nil {
			return c.endOf(err)
		}
	}
}

// endOf turns the reason why no request can be received into run's error.
func (c *conn) endOf(err error) error {
	if (c.draining.Load() || c.leaving.Load()) && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err == io.EOF && c.in.buffered() == 0 {
		return nil // a client that goes without saying goodbye is none of our troubles
	}
	return err
}

// admit says why a request is not served, or nil.
func (c *conn) admit(r *request) error {
	if c.draining.Load() {
		return errShutdown
	}
	return c.t.check(r)
}

// maxLate bounds the receives of a connection that drains, should the client not stop.
const maxLate = 64

// fill receives until n bytes, n <= requestSize+inlineMax, are in c.in.
func (c *conn) fill(n int, mid bool) error {
	for c.in.buffered() < n {
		// What was served is answered before anything may wait for the client.
		if err := c.flush(); err != nil {
			return err
		}
		c.want = n
		got, err := c.recv(c.inFn, mid)
		if err != nil {
			return err
		}
		c.in.received(got)
		c.pace.start()
	}
	return nil
}

// recv receives into p. In the middle of a request (mid) a drain does not cut it short: the
// request is served, within the time that whoever drains has.
func (c *conn) recv(p func() []byte, mid bool) (int, error) {
	for {
		n, err := c.link.recv(p, c.idleFn)
		if err == nil || !mid || !c.draining.Load() || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		c.link.resume()
	}
}

func (c *conn) inSpace() []byte {
	c.in.prepare(c.want)
	p := c.in.space()
	if c.small {
		p = p[:min(len(p), max(c.want-c.in.buffered(), requestSize))]
	}
	return p
}

func (c *conn) directSpace() []byte { return c.direct }

// idle gives memory back while the client sends nothing.
func (c *conn) idle() {
	c.in.release()
	if c.out.n == 0 {
		c.out.release()
	}
}

// payload receives len(p) bytes, past what is in c.in.
func (c *conn) payload(p []byte) error {
	if n := min(len(p), c.in.buffered()); n > 0 {
		copy(p, c.in.take(n))
		p = p[n:]
	}
	if len(p) > 0 {
		if err := c.flush(); err != nil {
			return err
		}
	}
	for len(p) > 0 {
		c.direct = p
		n, err := c.recv(c.directFn, true)
		if err != nil {
			c.direct = nil
			return err
		}
		p = p[n:]
	}
	c.direct = nil
	return nil
}

// read serves or submits a READ.
func (c *conn) read(r *request) error {
	if err := c.admit(r); err != nil {
		return c.fail(r, err)
	}
	if r.n > inlineMax {
		c.bigRead(r)
		return nil
	}
	n := int(r.n)
	if c.spread() {
		c.w.submit(c.newTask(r, int64(r.off), n))
		return nil
	}
	p := c.out.data(n)
	if p == nil || c.out.full() {
		if err := c.flush(); err != nil {
			return err
		}
		p = c.out.data(n)
	}
	var err error
	if tr := c.e.trier; tr != nil {
		if err = tr.TryReadAt(p, int64(r.off)); isWouldBlock(err) {
			c.w.submit(c.newTask(r, int64(r.off), n))
			return nil
		}
	} else {
		err = readFull(c.e, p, int64(r.off))
	}
	c.pace.served(n)
	if err != nil {
		return c.fail(r, err)
	}
	if c.t.structured {
		putDataChunk(c.out.header(dataChunkSize), chunkFlagDone, r.cookie, r.off, n)
	} else {
		putSimple(c.out.header(simpleSize), r.cookie, 0)
	}
	c.out.addData(p)
	return nil
}

// spread tells whether the request at hand, small as it is, should go to a worker: the device was
// slow just now, and there are others to be served at the same time.
func (c *conn) spread() bool {
	if c.pace.Left == 0 {
		return false // without a look at the others
	}
	return c.pace.Spread(c.in.buffered() >= requestSize || c.w.inFlight() > 0)
}

// bigRead submits a READ of more than inlineMax bytes. With structured replies it is served in
// pieces, each a chunk; otherwise whole, because the reply has one header and no way to report
// an error after it. What is too long even for that is read and sent piece by piece by one
// worker, and an error in the middle closes the connection (check limits DF to wholeSize).
func (c *conn) bigRead(r *request) {
	if !c.t.structured || r.flags&cmdFlagDF != 0 {
		size := int(r.n)
		if size > wholeSize {
			size = pieceSize
		}
		c.w.submit(c.newTask(r, int64(r.off), size))
		return
	}
	g := newGroup(r)
	for done := 0; done < int(r.n); done += pieceSize {
		t := c.newTask(r, int64(r.off)+int64(done), min(pieceSize, int(r.n)-done))
		t.grp = g
		c.w.submit(t)
	}
}

// write serves or submits a WRITE.
func (c *conn) write(r *request) error {
	if r.n > maxPayload {
		return fmt.Errorf("write: payload of %d bytes, longest is %d", r.n, maxPayload)
	}
	refused := c.admit(r)
	if refused != nil || r.n > inlineMax {
		return c.bigWrite(r, refused)
	}
	n := int(r.n)
	if c.in.buffered() < n {
		if err := c.fill(n, true); err != nil {
			return unexpected(err)
		}
	}
	p := c.in.take(n)
	if r.flags&cmdFlagFUA == 0 && !c.spread() {
		var err error
		if tr := c.e.trier; tr != nil {
			err = tr.TryWriteAt(p, int64(r.off))
		} else {
			_, err = c.e.d.WriteAt(p, int64(r.off))
		}
		if !isWouldBlock(err) {
			c.pace.served(n)
			return c.ack(r, err)
		}
	}
	t := c.newTask(r, int64(r.off), n)
	copy(t.data, p)
	c.w.submit(t)
	return nil
}

// bigWrite receives the payload of a WRITE in pieces and submits each; if the write is refused
// it only reads over it.
func (c *conn) bigWrite(r *request, refused error) error {
	c.small = r.n > inlineMax // the client is sending large writes: do not receive them twice
	if refused != nil {
		b := getBuffer(inlineMax)
		defer b.put()
		for left := int(r.n); left > 0; left -= inlineMax {
			if err := c.payload(b.b[:min(left, inlineMax)]); err != nil {
				return unexpected(err)
			}
		}
		return c.fail(r, refused)
	}
	g := newGroup(r)
	for done := 0; done < int(r.n); done += pieceSize {
		t := c.newTask(r, int64(r.off)+int64(done), min(pieceSize, int(r.n)-done))
		t.grp = g
		if err := c.payload(t.data); err != nil {
			c.w.leave(t.bytes())
			c.freeTask(t)
			return unexpected(err)
		}
		c.w.submit(t)
	}
	return nil
}

// other submits a command without data.
func (c *conn) other(r *request) error {
	if err := c.admit(r); err != nil {
		return c.fail(r, err)
	}
	t := c.newTask(r, int64(r.off), 0)
	c.w.submit(t)
	return nil
}

// newTask makes a task with a buffer for n bytes, waiting while too many are in flight.
func (c *conn) newTask(r *request, off int64, n int) *task {
	c.w.admit(bufferSize(n))
	t := taskPool.Get().(*task)
	t.req, t.off = *r, off
	if n > 0 {
		t.buf = getBuffer(n)
		t.data = t.buf.b[:n]
	}
	return t
}

func (c *conn) freeTask(t *task) {
	if t.buf != nil {
		t.buf.put()
	}
	t.buf, t.data, t.grp, t.bufs = nil, nil, nil, [2][]byte{}
	taskPool.Put(t)
}

func newGroup(r *request) *group {
	return &group{left: (int(r.n) + pieceSize - 1) / pieceSize}
}

// unexpected marks an end of the stream in the middle of a request.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
