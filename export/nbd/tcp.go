package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// ErrInsecure: an address that others than this host can reach, and no certificates.
var ErrInsecure = errors.New("only with TLS")

// A tcpListener is a TCP listener as ListenTCP makes it. Serve takes no others, so that nothing
// is served on a network by accident.
//
// Without TLS it listens on a loopback address, and takes connections from loopback addresses
// only: with net.ipv4.conf.*.route_localnet, which container networks set, a neighbour on the
// network can reach 127.0.0.1.
type tcpListener struct {
	*net.TCPListener
	tls *TLS // nil: plain
}

// CheckTCP says what is wrong with an address to listen on: "127.0.0.1:10809", "[::1]:0",
// "localhost:10809", ":10809" (every address). Names but localhost are refused: what they mean
// is decided elsewhere. Without TLS only loopback addresses are accepted (ErrInsecure).
func CheckTCP(addr string, withTLS bool) error {
	_, err := tcpAddr(addr, withTLS)
	return err
}

func tcpAddr(addr string, withTLS bool) (netip.AddrPort, error) {
	bad := func(why string) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("TCP address %q: %s: want IP:PORT, such as 127.0.0.1:10809 or [::1]:10809", addr, why)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return bad("no host and port")
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return bad("port " + strconv.Quote(port) + " is not a number from 0 to 65535")
	}
	var ip netip.Addr
	switch host {
	case "":
		ip = netip.IPv6Unspecified()
	case "localhost":
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	default:
		if ip, err = netip.ParseAddr(host); err != nil {
			return bad("host " + strconv.Quote(host) + " is not an IP address")
		}
	}
	if !withTLS && !ip.Unmap().IsLoopback() {
		return netip.AddrPort{}, fmt.Errorf("TCP address %q: others than this host can reach it: %w: give a certificate, its key and the CA of the clients, or listen on 127.0.0.1 or [::1]",
			addr, ErrInsecure)
	}
	return netip.AddrPortFrom(ip, uint16(p)), nil
}

// ListenTCP listens on a TCP address (see CheckTCP) and returns the listener for Serve. With t
// every client must start TLS before anything else, and show a certificate that t accepts;
// without, the address must be a loopback one, and everybody on this host may connect. Only
// exports with ExportOptions.Network are seen by clients that come this way.
func (s *Server) ListenTCP(addr string, t *TLS) (net.Listener, error) {
	ap, err := tcpAddr(addr, t != nil)
	if err != nil {
		return nil, err
	}
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive / 2, Count: 4}}
	// Of an address of one kind Go would make a listener for both, were it told only "tcp".
	network, ip := "tcp6", ap.Addr().Unmap()
	if strings.HasPrefix(addr, ":") {
		network = "tcp" // every address there is
	} else if ip.Is4() {
		network = "tcp4"
	}
	ln, err := lc.Listen(context.Background(), network, netip.AddrPortFrom(ip, ap.Port()).String())
	if err != nil {
		return nil, err
	}
	tl := &tcpListener{TCPListener: ln.(*net.TCPListener), tls: t}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", addr, ErrClosed)
	}
	s.tcp = tl
	s.listeners[tl] = struct{}{}
	return tl, nil
}

// keepAlive is how long a connection may be silent before its peer is asked whether it is there.
const keepAlive = 30 * time.Second

// admits says whether a connection may go on to its handshake.
func (l *tcpListener) admits(nc net.Conn) error {
	if l.tls != nil {
		return nil
	}
	a, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok || !a.IP.IsLoopback() {
		return fmt.Errorf("connection from %s, without TLS only this host may connect", nc.RemoteAddr())
	}
	return nil
}

// endpoint is the host and port for a URI. A listener on every address has the host's name.
func (l *tcpListener) endpoint() string {
	a := l.Addr().(*net.TCPAddr)
	host := a.IP.String()
	if a.IP.IsUnspecified() {
		if h, err := os.Hostname(); err == nil && h != "" {
			host = h
		}
	}
	return net.JoinHostPort(host, strconv.Itoa(a.Port))
}

// scheme is that of a URI.
func (l *tcpListener) scheme() string {
	if l.tls != nil {
		return "nbds"
	}
	return "nbd"
}
