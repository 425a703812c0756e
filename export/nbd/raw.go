package nbd

import (
	"fmt"
	"log/slog"
	"math"
	"net"

	"mica/dev"
)

// A Raw serves connections that need no handshake, because the client knows the export's size and
// flags from us already: the kernel's client, configured over netlink. It has no exports and no
// listeners; its connections share a bound for memory. Safe for concurrent use.
type Raw struct {
	o      Options
	budget *budget
}

// NewRaw makes one. Of the options Workers, MaxBuffer and Log count.
func NewRaw(o Options) *Raw {
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	if o.MaxBuffer <= 0 {
		o.MaxBuffer = 32 << 20
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	o.Workers = max(o.Workers, leastWorkers)
	return &Raw{o: o, budget: newBudget(o.MaxBuffer)}
}

// RawFlags are the transmission flags of a device for a client of Raw.
func RawFlags(d dev.Device, readOnly bool) uint16 {
	e := export{d: d, readOnly: readOnly}
	e.discarder, _ = d.(dev.Discarder)
	return e.terms(false).flags &^ flagSendFastZero
}

// A RawConn is one connection.
type RawConn struct{ c *conn }

// Conn prepares to serve d on nc, a Unix stream socket. The size of the device is the client's
// affair: it may change while the connection lasts.
func (r *Raw) Conn(nc net.Conn, name string, d dev.Device, readOnly bool) (*RawConn, error) {
	e, err := newExport(name, d, ExportOptions{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	l, err := newSock(nc)
	if err != nil {
		return nil, fmt.Errorf("export %q: %w", name, err)
	}
	if e.trier == nil {
		e.trier = waits{} // a device that may wait, and does not say when, must not keep the reader
	}
	t := e.terms(false)
	t.flags = RawFlags(d, readOnly)
	t.size = math.MaxInt64 &^ (minBlock - 1)
	return &RawConn{newConn(e, t, l, r.o.Workers, r.budget, r.o.Log)}, nil
}

// waits is the dev.Trier of a device that has none.
type waits struct{}

func (waits) TryReadAt([]byte, int64) error { return dev.ErrWouldBlock }

func (waits) TryWriteAt([]byte, int64) error { return dev.ErrWouldBlock }

// Run serves until the client ends the connection, it breaks, or Leave is called; then it returns,
// when nothing of it is left in flight. It does not close the socket.
func (c *RawConn) Run() error { return c.c.run() }

// Goodbye reports, after Run, whether the client has said that it goes for good.
func (c *RawConn) Goodbye() bool { return c.c.goodbye }

// Leave ends the connection, from any goroutine: requests that were begun are finished and
// answered, others are dropped without an answer. A client that connects again sends them again.
func (c *RawConn) Leave() {
	c.c.leaving.Store(true)
	c.c.link.interrupt()
}

// Abort cuts the connection off. Requests that were begun are finished.
func (c *RawConn) Abort() { c.c.link.abort() }
