package daemon

import (
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// apiLimits bound what a client of the API can hold on to. Zero values mean the defaults named.
type apiLimits struct {
	header time.Duration // for the head of a request. 10 s
	body   time.Duration // for a body of JSON. 30 s. Archives: limits.stall_timeout for a pause
	write  time.Duration // for an answer, or one piece of a stream of events, to be taken. 30 s
	idle   time.Duration // between requests. 2 min
	conns  int           // connections; more are closed at once. 1024
}

func (l apiLimits) withDefaults() apiLimits {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&l.header, 10*time.Second)
	set(&l.body, 30*time.Second)
	set(&l.write, 30*time.Second)
	set(&l.idle, 2*time.Minute)
	if l.conns == 0 {
		l.conns = 1024
	}
	return l
}

// newHTTPServer serves the API within limits; the handler applies those of bodies and answers.
func newHTTPServer(h http.Handler, l apiLimits, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: l.header,
		IdleTimeout:       l.idle,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// boundBody gives the client some time to send its body, which is read before anything else is
// done; the returned function lifts the limit, so that a request may then take its time.
func (s *server) boundBody(w http.ResponseWriter) (lift func()) {
	c := http.NewResponseController(w)
	c.SetReadDeadline(time.Now().Add(s.limits.body))
	return func() { c.SetReadDeadline(time.Time{}) }
}

// boundWrite gives the client some time to take what is written next.
func (s *server) boundWrite(w http.ResponseWriter) (lift func()) {
	c := http.NewResponseController(w)
	c.SetWriteDeadline(time.Now().Add(s.limits.write))
	return func() { c.SetWriteDeadline(time.Time{}) }
}

// A fewListener takes so many connections at a time, and closes what is too many: whoever holds
// connections open does not use up the daemon's descriptors.
type fewListener struct {
	net.Listener
	max  int64
	open atomic.Int64
	log  *slog.Logger
	told atomic.Int64 // when the last refusal was logged, Unix seconds
}

func (l *fewListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= l.max {
			return &countedConn{Conn: c, left: func() { l.open.Add(-1) }}, nil
		}
		l.open.Add(-1)
		c.Close()
		if now := time.Now().Unix(); l.told.Swap(now) != now {
			l.log.Warn("too many connections to the API; one more was closed", "limit", l.max)
		}
	}
}

type countedConn struct {
	net.Conn
	once sync.Once
	left func()
}

func (c *countedConn) Close() error {
	c.once.Do(c.left)
	return c.Conn.Close()
}
