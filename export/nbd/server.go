package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"mica/dev"
)

// Options of a server. The zero value serves well.
type Options struct {
	MaxConnections   int           // of all exports together; more are closed at once. 0: 256
	MaxNetwork       int           // of those, over TCP. 0: half of MaxConnections
	MaxHandshakes    int           // of those over TCP, that have not reached an export; the oldest goes. 0: 64
	Workers          int           // per connection, for requests that wait. 0: 16, at least 5
	MaxBuffer        int           // bytes, for requests that wait, of all connections. 0: 32 MiB
	HandshakeTimeout time.Duration // for the whole handshake. 0: 10 s
	CloseTimeout     time.Duration // for Close, and RemoveExport without a deadline. 0: 10 s
	Log              *slog.Logger  // nil: slog.Default()
}

// A Server serves exports on Unix sockets and, where told to, over TCP. Safe for concurrent use.
//
// Goroutines: one per Serve, one per connection (handshake, then conn.run), the workers of each
// connection. Close ends all of them.
type Server struct {
	o      Options
	log    *slog.Logger
	budget *budget
	end    chan struct{} // closed when Close begins

	mu        sync.Mutex
	exports   map[string]*export
	listeners map[net.Listener]struct{}
	conns     map[*client]struct{}
	path      string       // socket of the last Listen or Serve
	tcp       *tcpListener // of the last ListenTCP
	refused   ration       // of log lines about connections from the network
	closed    bool
	closeDone chan struct{} // closed when Close has returned
}

// A client is one accepted connection, from its handshake on.
type client struct {
	nc   net.Conn
	ln   *tcpListener // nil: a Unix socket
	at   time.Time    // accepted
	cut  bool         // its handshake was ended to make room; guarded by Server.mu
	c    *conn        // nil during the handshake; guarded by Server.mu
	e    *export      // entered; guarded by Server.mu
	done chan struct{}
}

// NewServer makes a server without exports that listens nowhere.
func NewServer(o Options) *Server {
	if o.MaxConnections <= 0 {
		o.MaxConnections = 256
	}
	if o.MaxNetwork <= 0 {
		o.MaxNetwork = (o.MaxConnections + 1) / 2
	}
	if o.MaxHandshakes <= 0 {
		o.MaxHandshakes = 64
	}
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	o.Workers = max(o.Workers, leastWorkers)
	if o.MaxBuffer <= 0 {
		o.MaxBuffer = 32 << 20
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.CloseTimeout <= 0 {
		o.CloseTimeout = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return &Server{o: o, log: o.Log, budget: newBudget(o.MaxBuffer), end: make(chan struct{}), closeDone: make(chan struct{}),
		exports: map[string]*export{}, listeners: map[net.Listener]struct{}{}, conns: map[*client]struct{}{}}
}

// AddExport serves d under a name. The export named "" is the default one, which clients get
// that ask for none; if there is no such, a single export is the default. Returns ErrExists,
// ErrClosed, or what is wrong with the name or the size.
func (s *Server) AddExport(name string, d dev.Device, o ExportOptions) error {
	e, err := newExport(name, d, o)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("add export %q: %w", name, ErrClosed)
	}
	if s.exports[name] != nil {
		return fmt.Errorf("add export %q: %w", name, ErrExists)
	}
	s.exports[name] = e
	return nil
}

// RemoveExport takes an export away: nobody can connect to it any more, its connections finish
// what is in flight and are closed. It is bounded by ctx, or by Options.CloseTimeout if ctx has
// no deadline; then the sockets are cut off and ErrTimeout is returned if the device still
// holds requests. The export is gone in every case. Returns ErrNotFound if there is none.
func (s *Server) RemoveExport(ctx context.Context, name string) error {
	s.mu.Lock()
	e := s.exports[name]
	if e == nil {
		s.mu.Unlock()
		return fmt.Errorf("remove export %q: %w", name, ErrNotFound)
	}
	delete(s.exports, name)
	var cs []*client
	for cl := range s.conns {
		if cl.e == e {
			cs = append(cs, cl)
		}
	}
	s.mu.Unlock()
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.o.CloseTimeout)
		defer cancel()
	}
	if err := s.endClients(ctx, cs); err != nil {
		return fmt.Errorf("remove export %q: %w", name, err)
	}
	return e.close(ctx)
}

// close closes the device if that was asked for. Its connections have ended.
func (e *export) close(ctx context.Context) error {
	if !e.closeDevice {
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- e.d.Close() }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("close device of export %q: %w", e.name, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close device of export %q: %w", e.name, ErrTimeout)
	}
}

// Exports lists the exports by name.
func (s *Server) Exports() []ExportInfo { return s.list(false) }

// list lists the exports, or those that the network sees.
func (s *Server) list(network bool) []ExportInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]ExportInfo, 0, len(s.exports))
	n := map[*export]int{}
	for cl := range s.conns {
		n[cl.e]++
	}
	for _, e := range s.exports {
		if network && !e.network {
			continue
		}
		out = append(out, ExportInfo{Name: e.name, Description: e.description, SizeBytes: e.d.Size(),
			ReadOnly: e.readOnly, Connections: n[e]})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// URI is the address of an export for NBD clients: nbd+unix:///name?socket=path, or for one that
// is served over TCP nbd://host:port/name, with TLS nbds://host:port/name. It is "" as long as
// nothing listens.
func (s *Server) URI(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.exports[name]; s.tcp != nil && e != nil && e.network {
		return s.tcp.scheme() + "://" + s.tcp.endpoint() + "/" + url.PathEscape(name)
	}
	if s.path == "" {
		return ""
	}
	return "nbd+unix:///" + url.PathEscape(name) + "?socket=" + escapeQuery.Replace(url.QueryEscape(s.path))
}

// escapeQuery turns the form encoding of a query into the general one, and keeps paths legible.
var escapeQuery = strings.NewReplacer("+", "%20", "%2F", "/")

// Listen makes a socket at path that only this user may use (mode 0600) and returns its
// listener, for Serve. A socket that nobody listens on any more is replaced; anything else at
// path is left alone: ErrInUse if somebody answers there. The file is removed by Close.
func (s *Server) Listen(path string) (net.Listener, error) {
	ln, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs // for URI, which others use elsewhere
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, ErrClosed)
	}
	s.path = path
	s.listeners[ln] = struct{}{}
	return ln, nil
}

// Serve accepts connections until Close; then it returns nil. It takes Unix sockets, and what
// ListenTCP made.
func (s *Server) Serve(ln net.Listener) error {
	a := ln.Addr()
	tl, _ := ln.(*tcpListener)
	if tl == nil && a.Network() != "unix" {
		ln.Close()
		return fmt.Errorf("serve on %s %s: only Unix sockets and listeners of ListenTCP are served", a.Network(), a)
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		ln.Close()
		return ErrClosed
	}
	if s.path == "" && tl == nil {
		s.path = a.String()
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()
	wait := time.Duration(0)
	for {
		nc, err := ln.Accept()
		if err != nil {
			select {
			case <-s.end:
				return nil
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors or memory: others go on, so do we, after a while.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			s.log.Warn("accept", "error", err, "retry_in", wait)
			select {
			case <-s.end:
				return nil
			case <-time.After(wait):
			}
			continue
		}
		wait = 0
		s.accept(nc, tl)
	}
}

// accept starts a connection, or closes it where there are too many.
func (s *Server) accept(nc net.Conn, ln *tcpListener) {
	cl := &client{nc: nc, ln: ln, at: time.Now(), done: make(chan struct{})}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		nc.Close()
		return
	}
	err := s.roomLocked(cl)
	if err == nil {
		s.conns[cl] = struct{}{}
		s.mu.Unlock()
		go s.serveClient(cl)
		return
	}
	n, log := s.refused.take()
	s.mu.Unlock()
	nc.Close()
	if log {
		s.log.Warn("connection refused", "error", err, "refused", n)
	}
}

// roomLocked says why one more connection is too many, or nil. Those of the network have a limit
// of their own, so that they leave room for others. Of those that have not reached an export the
// oldest makes room for the new one: who just holds them open keeps nobody out.
func (s *Server) roomLocked(cl *client) error {
	if n := len(s.conns); n >= s.o.MaxConnections {
		return fmt.Errorf("%d connections, the limit is %d", n, s.o.MaxConnections)
	}
	if cl.ln == nil {
		return nil
	}
	if err := cl.ln.admits(cl.nc); err != nil {
		return err
	}
	all, begun := 0, 0
	var oldest *client
	for c := range s.conns {
		if c.ln == nil {
			continue
		}
		all++
		if c.e == nil && !c.cut {
			begun++
			if oldest == nil || c.at.Before(oldest.at) {
				oldest = c
			}
		}
	}
	if all >= s.o.MaxNetwork {
		return fmt.Errorf("%d connections over TCP, the limit is %d", all, s.o.MaxNetwork)
	}
	if begun >= s.o.MaxHandshakes {
		oldest.cut = true
		oldest.nc.SetDeadline(time.Unix(1, 0))
	}
	return nil
}

// A ration lets one line a second into the log, of what strangers can repeat at will.
type ration struct {
	last time.Time
	n    int
}

// take counts one and tells whether to log now, and for how many.
func (r *ration) take() (n int, log bool) {
	r.n++
	if time.Since(r.last) < time.Second {
		return 0, false
	}
	n, r.last, r.n = r.n, time.Now(), 0
	return n, true
}

// serveClient is one connection from handshake to end.
func (s *Server) serveClient(cl *client) {
	defer close(cl.done)
	err := s.converse(cl)
	cl.nc.Close()
	s.mu.Lock()
	delete(s.conns, cl)
	stranger := cl.ln != nil && cl.c == nil
	n, log := 1, err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errGoodbye)
	if log && stranger {
		n, log = s.refused.take()
	}
	s.mu.Unlock()
	switch {
	case log && stranger:
		s.log.Warn("connection over TCP refused", "from", cl.nc.RemoteAddr().String(), "error", err, "refused", n)
	case log:
		s.log.Info("connection ended", "error", err)
	}
}

func (s *Server) converse(cl *client) error {
	cl.nc.SetDeadline(time.Now().Add(s.o.HandshakeTimeout))
	h := handshake{rw: cl.nc, table: clientTable{s, cl}}
	var secure *tlsLink
	if cl.ln != nil && cl.ln.tls != nil {
		h.upgrade = func() (_ io.ReadWriter, err error) {
			secure, err = startTLS(cl.nc, cl.ln.tls)
			return secure, err
		}
	}
	e, t, err := h.run()
	if err != nil {
		return err
	}
	var l link
	if secure != nil {
		defer secure.goodbye()
		l, err = secure, secure.transmit()
	} else {
		l, err = newSock(cl.nc)
	}
	if err != nil {
		return err
	}
	c := newConn(e, t, l, s.o.Workers, s.budget, s.log)
	s.mu.Lock()
	cl.nc.SetDeadline(time.Time{})
	cl.c = c
	leave := s.closed || s.exports[e.name] != e // asked to end in the meantime
	s.mu.Unlock()
	if leave {
		c.drain()
	}
	return c.run()
}

// clientTable is the server's exports as one client's handshake sees them.
type clientTable struct {
	*Server
	cl *client
}

func (t clientTable) closing() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.closed
}

func (t clientTable) lookup(name string) *export {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lookupLocked(name, t.network())
}

func (t clientTable) list() []ExportInfo { return t.Server.list(t.network()) }

// network: the client came over TCP.
func (t clientTable) network() bool { return t.cl.ln != nil }

func (t clientTable) enter(name string) *export {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.cl.cut {
		return nil
	}
	t.cl.e = t.lookupLocked(name, t.network())
	return t.cl.e
}

// lookupLocked finds an export by name; network: of those that the network sees. A single one
// is the default.
func (s *Server) lookupLocked(name string, network bool) *export {
	e := s.exports[name]
	if e == nil && name == "" {
		n := 0
		for _, x := range s.exports {
			if !network || x.network {
				e, n = x, n+1
			}
		}
		if n != 1 {
			return nil
		}
	}
	if e == nil || network && !e.network {
		return nil
	}
	return e
}

// endClients drains the given connections and waits for them; when ctx ends it cuts them off
// and gives them a moment more.
func (s *Server) endClients(ctx context.Context, cs []*client) error {
	for _, cl := range cs {
		s.mu.Lock()
		if cl.c != nil {
			cl.c.drain()
		} else {
			cl.nc.SetDeadline(time.Unix(1, 0)) // ends its handshake
		}
		s.mu.Unlock()
	}
	left := waitClients(ctx.Done(), cs)
	if len(left) == 0 {
		return nil
	}
	for _, cl := range left {
		s.mu.Lock()
		if cl.c != nil {
			cl.c.link.abort()
		}
		s.mu.Unlock()
	}
	grace := time.NewTimer(afterAbort)
	defer grace.Stop()
	if left = waitClients(grace.C, left); len(left) == 0 {
		return nil
	}
	tasks := 0
	for _, cl := range left {
		s.mu.Lock()
		if cl.c != nil {
			tasks += cl.c.w.inFlight()
		}
		s.mu.Unlock()
	}
	return fmt.Errorf("%d connections, %d requests at workers: %w", len(left), tasks, ErrTimeout)
}

// afterAbort is how long connections that were cut off may take to notice.
const afterAbort = 500 * time.Millisecond

// waitClients waits for the connections to end, or for stop, and returns those that did not.
func waitClients[T any](stop <-chan T, cs []*client) []*client {
	var left []*client
	stopped := false
	for _, cl := range cs {
		if !stopped {
			select {
			case <-cl.done:
				continue
			case <-stop:
				stopped = true
			}
		}
		select {
		case <-cl.done:
		default:
			left = append(left, cl)
		}
	}
	return left
}

// Close stops listening, removes the sockets that Listen made, lets requests in flight finish
// and ends all connections. It is bounded by Options.CloseTimeout; ErrTimeout if the device
// still holds requests then. Closing twice returns nil, after the first has finished.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		<-s.closeDone
		return nil
	}
	s.closed = true
	close(s.end)
	defer close(s.closeDone)
	var cs []*client
	for cl := range s.conns {
		cs = append(cs, cl)
	}
	lns, exports := s.listeners, s.exports
	s.listeners, s.exports = nil, nil
	s.mu.Unlock()

	var errs []error
	for ln := range lns {
		if err := ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.o.CloseTimeout)
	defer cancel()
	if err := s.endClients(ctx, cs); err != nil {
		errs = append(errs, fmt.Errorf("close nbd server: %w", err))
	} else {
		for _, e := range exports {
			if err := e.close(ctx); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
