package nbd

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"mica/dev"
)

func TestCheckTCP(t *testing.T) {
	tests := []struct {
		addr   string
		plain  bool // accepted without TLS
		secure bool // accepted with TLS
	}{
		{"127.0.0.1:10809", true, true},
		{"127.0.0.1:0", true, true},
		{"127.9.9.9:1", true, true},
		{"[::1]:10809", true, true},
		{"localhost:10809", true, true},
		{"[::ffff:127.0.0.1]:10809", true, true},
		{":10809", false, true},
		{"0.0.0.0:10809", false, true},
		{"[::]:10809", false, true},
		{"192.0.2.1:10809", false, true},
		{"[2001:db8::1]:10809", false, true},
		{"[::ffff:192.0.2.1]:10809", false, true},
		{"[fe80::1%eth0]:10809", false, true},
		{"host.example:10809", false, false}, // names are decided elsewhere
		{"localhost.:10809", false, false},
		{"127.1:10809", false, false},
		{"0x7f000001:10809", false, false},
		{"127.0.0.1", false, false},
		{"127.0.0.1:", false, false},
		{"127.0.0.1:65536", false, false},
		{"127.0.0.1:nbd", false, false},
		{"127.0.0.1:-1", false, false},
		{"", false, false},
		{"/run/nbd.sock", false, false},
	}
	for _, tt := range tests {
		if err := CheckTCP(tt.addr, false); (err == nil) != tt.plain {
			t.Errorf("CheckTCP(%q) without TLS: %v", tt.addr, err)
		} else if !tt.plain && tt.secure && !errors.Is(err, ErrInsecure) {
			t.Errorf("CheckTCP(%q) without TLS: %v, want ErrInsecure", tt.addr, err)
		}
		if err := CheckTCP(tt.addr, true); (err == nil) != tt.secure {
			t.Errorf("CheckTCP(%q) with TLS: %v", tt.addr, err)
		}
	}
}

// listenTCP serves on TCP too, until the server is closed.
func listenTCP(t testing.TB, s *Server, addr string, x *TLS) string {
	t.Helper()
	ln, err := s.ListenTCP(addr, x)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() { // before the server's own, which closes it
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("serve on TCP: %v", err)
		}
		if c, err := net.DialTimeout("tcp", ln.Addr().String(), time.Second); err == nil {
			c.Close()
			t.Error("the TCP listener is still there after Close")
		}
	})
	return ln.Addr().String()
}

func dialTCP(t testing.TB, addr string) net.Conn {
	t.Helper()
	nc, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(30 * time.Second))
	return nc
}

// TestListenTCPRefusesTheNetworkWithoutTLS: the refusal says what to do, and nothing listens.
func TestListenTCPRefusesTheNetworkWithoutTLS(t *testing.T) {
	s := NewServer(Options{Log: quiet})
	defer s.Close()
	for _, addr := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:0"} {
		ln, err := s.ListenTCP(addr, nil)
		if !errors.Is(err, ErrInsecure) {
			t.Fatalf("listen on %s: %v, want ErrInsecure", addr, err)
		}
		if ln != nil {
			t.Fatalf("listen on %s: a listener beside the error", addr)
		}
		for _, w := range []string{addr, "certificate", "CA", "127.0.0.1"} {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("error %q does not contain %q", err, w)
			}
		}
	}
	if len(s.listeners) != 0 {
		t.Errorf("%d listeners", len(s.listeners))
	}
}

// TestTCPShowsNetworkExportsOnly: what was not meant for the network is not found, listed or
// taken as the default there.
func TestTCPShowsNetworkExportsOnly(t *testing.T) {
	s, path := startServer(t, Options{})
	for _, n := range []string{"private", "shared"} {
		if err := s.AddExport(n, dev.NewMem(1<<20), ExportOptions{Network: n == "shared"}); err != nil {
			t.Fatal(err)
		}
	}
	addr := listenTCP(t, s, "127.0.0.1:0", nil)
	if got, want := s.URI("shared"), "nbd://"+addr+"/shared"; got != want {
		t.Errorf("URI %q, want %q", got, want)
	}
	if got := s.URI("private"); !strings.HasPrefix(got, "nbd+unix:///private?") {
		t.Errorf("URI of a private export: %q", got)
	}
	greeted := func(nc net.Conn) *tclient {
		t.Helper()
		c, err := greet(nc, 3)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	names := func(c *tclient) (out []string) {
		t.Helper()
		rs, err := c.option(3, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rs {
			if r.typ == 2 {
				out = append(out, string(r.data[4:]))
			}
		}
		return out
	}
	c := greeted(dialTCP(t, addr))
	if got := names(c); len(got) != 1 || got[0] != "shared" {
		t.Errorf("listed over TCP: %q, want shared", got)
	}
	for _, opt := range []uint32{6, 7} {
		if rs, err := c.option(opt, goData("private")); err != nil || len(rs) != 1 || rs[0].typ != repErrUnknown {
			t.Errorf("option %d of a private export over TCP: %v %v", opt, rs, err)
		}
	}
	if _, err := c.option(8, nil); err != nil {
		t.Fatal(err)
	}
	if rs, err := c.option(10, metaData("private", "base:allocation")); err != nil || rs[0].typ != repErrUnknown {
		t.Errorf("context of a private export over TCP: %v %v", rs, err)
	}
	// The default is the only one that the network sees.
	if err := c.enter("", true, false); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.do(0, cmdWrite, 0, 512, pattern(1, 512)); err != nil {
		t.Error(err)
	}
	legacy := greeted(dialTCP(t, addr))
	if err := legacy.sendOption(1, []byte("private")); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, legacy)
	local, err := dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if got := names(local); len(got) != 2 {
		t.Errorf("listed on the Unix socket: %q", got)
	}
}

// TestPlainTCPAnswersThisHostOnly: a packet to 127.0.0.1 from a neighbour (route_localnet) is
// not taken.
func TestPlainTCPAnswersThisHostOnly(t *testing.T) {
	l := &tcpListener{}
	for ip, want := range map[string]bool{"127.0.0.1": true, "127.0.0.2": true, "::1": true, "192.0.2.9": false, "169.254.1.1": false, "2001:db8::1": false} {
		err := l.admits(fakePeer{ip: net.ParseIP(ip)})
		if (err == nil) != want {
			t.Errorf("peer %s: %v", ip, err)
		}
		if err := (&tcpListener{tls: &TLS{}}).admits(fakePeer{ip: net.ParseIP(ip)}); err != nil {
			t.Errorf("peer %s with TLS: %v", ip, err)
		}
	}
}

// TestServeChecksThePeer: what admits says counts.
func TestServeChecksThePeer(t *testing.T) {
	s := NewServer(Options{Log: quiet})
	defer s.Close()
	closed := make(chan struct{})
	s.accept(fakePeer{ip: net.IPv4(192, 0, 2, 9), closed: closed}, &tcpListener{})
	select {
	case <-closed:
	default:
		t.Error("a connection from elsewhere was kept")
	}
	if len(s.conns) != 0 {
		t.Errorf("%d connections", len(s.conns))
	}
}

type fakePeer struct {
	net.Conn
	ip     net.IP
	closed chan struct{}
}

func (p fakePeer) RemoteAddr() net.Addr { return &net.TCPAddr{IP: p.ip, Port: 4711} }
func (p fakePeer) Close() error         { close(p.closed); return nil }

// TestStrangersMakeRoom: handshakes that get nowhere are bounded in number and time, and neither
// keep a client out nor touch those that are connected, on either kind of socket.
func TestStrangersMakeRoom(t *testing.T) {
	const handshakes = 4
	s, path := startServer(t, Options{MaxConnections: 40, MaxNetwork: 20, MaxHandshakes: handshakes, HandshakeTimeout: time.Minute})
	if err := s.AddExport("a", dev.NewMem(1<<20), ExportOptions{Network: true}); err != nil {
		t.Fatal(err)
	}
	addr := listenTCP(t, s, "127.0.0.1:0", nil)
	enter := func() *tclient {
		t.Helper()
		c, err := greet(dialTCP(t, addr), 3)
		if err == nil {
			err = c.enter("a", true, false)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	early := enter()
	var silent []*tclient
	for range 3 * handshakes {
		c, err := greet(dialTCP(t, addr), 3) // and then says nothing
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	late := enter() // one more of the silent ones has gone
	for i, c := range []*tclient{early, late, connect(t, path, "a", true, false)} {
		if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
			t.Errorf("client %d: %v", i, err)
		}
	}
	for i, c := range silent[:2*handshakes+1] {
		c.nc.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.r.ReadByte(); err == nil || isTimeout(err) {
			t.Errorf("silent connection %d is still there: %v", i, err)
		}
	}
}

// TestNetworkLeavesRoom: the network's connections have a limit of their own.
func TestNetworkLeavesRoom(t *testing.T) {
	s, path := startServer(t, Options{MaxConnections: 10, MaxNetwork: 3, MaxHandshakes: 8})
	if err := s.AddExport("a", dev.NewMem(1<<20), ExportOptions{Network: true}); err != nil {
		t.Fatal(err)
	}
	addr := listenTCP(t, s, "127.0.0.1:0", nil)
	for range 3 {
		c, err := greet(dialTCP(t, addr), 3)
		if err == nil {
			err = c.enter("a", true, false)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if c, err := greet(dialTCP(t, addr), 3); err == nil {
		if _, err := c.option(3, nil); err == nil {
			t.Error("a fourth connection over TCP was served")
		}
	}
	for range 4 {
		connect(t, path, "a", true, false)
	}
}

func TestRation(t *testing.T) {
	var r ration
	logged, total := 0, 0
	for range 1000 {
		if n, log := r.take(); log {
			logged, total = logged+1, total+n
		}
	}
	if logged != 1 || total != 1 {
		t.Errorf("%d lines about %d, want one about one", logged, total)
	}
	r.last = time.Now().Add(-2 * time.Second)
	if n, log := r.take(); !log || n != 1000 {
		t.Errorf("after a while: %v, about %d, want 1000", log, n)
	}
}
