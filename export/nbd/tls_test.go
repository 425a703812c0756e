package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/internal/testpki"
)

// A tlsSite is a server with TLS, and what its clients need.
type tlsSite struct {
	s     *Server
	addr  string
	ca    *testpki.CA // of servers and clients
	files TLSFiles
	d     *dev.Mem
}

const tlsSize = 16 << 20

func newTLSSite(t testing.TB, o Options, clients ...string) *tlsSite {
	t.Helper()
	x := &tlsSite{ca: testpki.NewCA(t, "ca"), d: dev.NewMem(tlsSize)}
	x.files = writeTLS(t, t.TempDir(), x.ca, x.ca.Server())
	x.files.Clients = clients
	tc, err := LoadTLS(x.files, quiet)
	if err != nil {
		t.Fatal(err)
	}
	x.s, _ = startServer(t, o)
	if err := x.s.AddExport("disk", x.d, ExportOptions{Network: true}); err != nil {
		t.Fatal(err)
	}
	x.addr = listenTCP(t, x.s, "127.0.0.1:0", tc)
	return x
}

// writeTLS writes a server's three files.
func writeTLS(t testing.TB, dir string, ca *testpki.CA, cert testpki.Cert) TLSFiles {
	t.Helper()
	f := TLSFiles{Certificate: filepath.Join(dir, "server.pem"), Key: filepath.Join(dir, "server.key"), ClientCA: filepath.Join(dir, "ca.pem")}
	cert.Write(t, f.Certificate, f.Key)
	ca.WriteCA(f.ClientCA)
	return f
}

func (x *tlsSite) clientConfig(certs ...testpki.Cert) *tls.Config {
	c := &tls.Config{RootCAs: x.ca.Pool(), ServerName: "localhost"}
	for _, k := range certs {
		c.Certificates = append(c.Certificates, k.TLS())
	}
	return c
}

// secure dials, asks for TLS and does its handshake. With TLS 1.3 a refused certificate shows
// at the first read after it.
func (x *tlsSite) secure(t testing.TB, c *tls.Config) (*tclient, error) {
	t.Helper()
	p, err := greet(dialTCP(t, x.addr), 3)
	if err != nil {
		return nil, err
	}
	rs, err := p.option(5, nil)
	if err != nil || len(rs) != 1 || rs[0].typ != 1 || p.r.Buffered() != 0 {
		return nil, fmt.Errorf("STARTTLS: %v %v", rs, err)
	}
	tc := tls.Client(p.nc, c)
	if err := tc.Handshake(); err != nil {
		return nil, err
	}
	out := newTClient(tc)
	_, err = out.option(3, nil)
	return out, err
}

// connect enters the export.
func (x *tlsSite) connect(t testing.TB, structured bool) *tclient {
	t.Helper()
	c, err := x.secure(t, x.clientConfig(x.ca.Client()))
	if err == nil {
		err = c.enter("disk", structured, false)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestTLSReadBackAllSizes: every path of the data through TLS, with both kinds of replies.
func TestTLSReadBackAllSizes(t *testing.T) {
	x := newTLSSite(t, Options{})
	if got, want := x.s.URI("disk"), "nbds://"+x.addr+"/disk"; got != want {
		t.Errorf("URI %q, want %q", got, want)
	}
	for _, structured := range []bool{false, true} {
		c := x.connect(t, structured)
		for _, n := range []int{512, 4096, inlineMax, inlineMax + 512, pieceSize, pieceSize + 512, wholeSize + 4096, 12 << 20} {
			off := uint64(1<<20 + 512)
			want := pattern(uint64(n), n)
			if _, _, err := c.do(0, cmdWrite, off, uint32(n), want); err != nil {
				t.Fatalf("structured %v: write of %d: %v", structured, n, err)
			}
			got, _, err := c.do(0, cmdRead, off, uint32(n), nil)
			if err != nil {
				t.Fatalf("structured %v: read of %d: %v", structured, n, err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("structured %v: read of %d differs from what was written", structured, n)
			}
		}
	}
}

// TestListensWhereTold: on the addresses of the kind that was given, no others.
func TestListensWhereTold(t *testing.T) {
	ca := testpki.NewCA(t, "ca")
	tc, err := LoadTLS(writeTLS(t, t.TempDir(), ca, ca.Server()), quiet)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		addr   string
		v4, v6 bool
	}{{"0.0.0.0:0", true, false}, {"[::]:0", false, true}, {":0", true, true}, {"127.0.0.1:0", true, false}, {"[::1]:0", false, true}, {"localhost:0", true, false}, {"[::ffff:127.0.0.1]:0", true, false}} {
		s := NewServer(Options{Log: quiet})
		ln, err := s.ListenTCP(c.addr, tc)
		if err != nil {
			if strings.Contains(err.Error(), "cannot assign") || strings.Contains(err.Error(), "not supported") {
				t.Logf("%s: %v: this host cannot", c.addr, err)
				s.Close()
				continue
			}
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		for host, want := range map[string]bool{"127.0.0.1": c.v4, "::1": c.v6} {
			nc, err := net.DialTimeout("tcp", net.JoinHostPort(host, port), time.Second)
			if err == nil {
				nc.Close()
			}
			if host == "::1" && want && err != nil && strings.Contains(err.Error(), "cannot assign") {
				continue
			}
			if (err == nil) != want {
				t.Errorf("listen on %s: connect to %s: %v", c.addr, host, err)
			}
		}
		s.Close()
	}
}

// TestTLSManyInFlight: many requests of many sizes on several connections, each kind of worker
// and the reader sending at the same time; the bytes are the right ones.
func TestTLSManyInFlight(t *testing.T) {
	x := newTLSSite(t, Options{})
	const conns, rounds = 4, 30
	var wg sync.WaitGroup
	for i := range conns {
		c := x.connect(t, true)
		wg.Go(func() {
			base := uint64(i) * tlsSize / conns
			sizes := []uint32{512, 4096, 70 << 10, 300 << 10}
			data := map[uint64][]byte{}
			for r := range rounds {
				off := base + uint64(r%4)*(512<<10)
				n := sizes[r%len(sizes)]
				data[off] = pattern(uint64(i*1000+r), int(n))
				if _, err := c.request(0, cmdWrite, off, n, data[off]); err != nil {
					t.Error(err)
					return
				}
				if k, err := c.reply(nil); err != nil || k.errno != 0 {
					t.Error(k.errno, err)
					return
				}
				// A burst of reads in flight together.
				want := map[uint64]uint64{}
				for o, b := range data {
					id, err := c.request(0, cmdRead, o, uint32(len(b)), nil)
					if err != nil {
						t.Error(err)
						return
					}
					want[id] = o
				}
				got := map[uint64][]byte{}
				for left := len(want); left > 0; {
					k, err := c.reply(nil)
					if err != nil || k.errno != 0 {
						t.Error(k.errno, err)
						return
					}
					o := want[k.cookie]
					if got[o] == nil {
						got[o] = make([]byte, len(data[o]))
					}
					if k.typ == chunkOffsetData {
						copy(got[o][binary.BigEndian.Uint64(k.data)-o:], k.data[8:])
					}
					if k.flags&1 != 0 {
						left--
					}
				}
				for o, b := range data {
					if !bytes.Equal(got[o], b) {
						t.Errorf("connection %d, round %d: read at %d differs", i, r, o)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestTLSClients: who may connect, and who may not.
func TestTLSClients(t *testing.T) {
	other := testpki.NewCA(t, "ca") // of the same name
	tests := []struct {
		name   string
		client func(x *tlsSite) *tls.Config
		names  []string // TLSFiles.Clients
		want   string   // in the server's log; empty: accepted
	}{
		{name: "a good one", client: func(x *tlsSite) *tls.Config { return x.clientConfig(x.ca.Client()) }},
		{name: "TLS 1.2", client: func(x *tlsSite) *tls.Config {
			c := x.clientConfig(x.ca.Client())
			c.MaxVersion = tls.VersionTLS12
			return c
		}},
		{name: "of a listed name", names: []string{"vm1"}, client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(testpki.Name("vm1")))
		}},
		{name: "of a listed DNS name", names: []string{"x", "vm1.example"}, client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(testpki.Name("", "vm1.example")))
		}},
		{name: "of another name", names: []string{"vm1"}, want: "none of its names", client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(testpki.Name("vm2", "VM1", "vm1.example")))
		}},
		{name: "without a name", names: []string{"vm1"}, want: "none of its names", client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(testpki.Name("")))
		}},
		{name: "no certificate", want: "certificate", client: func(x *tlsSite) *tls.Config { return x.clientConfig() }},
		{name: "expired", want: "expired", client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(testpki.Expired))
		}},
		{name: "not yet valid", want: "expired", client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Client(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }))
		}},
		{name: "of another CA", want: "unknown authority", client: func(x *tlsSite) *tls.Config {
			c := x.clientConfig()
			k := other.Client().TLS()
			// Also where the server's list of authorities does not name it.
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &k, nil }
			return c
		}},
		{name: "a server's certificate", want: "incompatible key usage", client: func(x *tlsSite) *tls.Config {
			return x.clientConfig(x.ca.Server())
		}},
		{name: "TLS 1.1", want: "version", client: func(x *tlsSite) *tls.Config {
			c := x.clientConfig(x.ca.Client())
			c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
			return c
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var log lines
			x := newTLSSite(t, Options{Log: slog.New(slog.NewTextHandler(&log, nil))}, tt.names...)
			c, err := x.secure(t, tt.client(x))
			if tt.want == "" {
				if err == nil {
					err = c.enter("disk", true, false)
				}
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatal("the client was served")
			}
			if isTimeout(err) {
				t.Fatalf("the client was left waiting: %v", err)
			}
			log.wait(t, tt.want)
		})
	}
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// wait waits for a line that contains want.
func (l *lines) wait(t *testing.T, want string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got := l.String()
		if strings.Contains(got, want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("log without %q:\n%s", want, got)
		}
	}
}

// TestTLSIsForced: without TLS a client gets nothing but the word that TLS is required: no name,
// no size, no list.
func TestTLSIsForced(t *testing.T) {
	x := newTLSSite(t, Options{HandshakeTimeout: 20 * time.Second})
	plain := func() *tclient {
		t.Helper()
		c, err := greet(dialTCP(t, x.addr), 3)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := plain()
	for _, o := range []struct {
		opt  uint32
		data []byte
	}{{3, nil}, {6, goData("disk")}, {7, goData("disk")}, {7, goData("none")}, {8, nil}, {9, metaData("disk")}, {10, metaData("disk", "base:allocation")}, {11, nil}, {4711, []byte("x")}, {4, nil}} {
		rs, err := c.option(o.opt, o.data)
		if err != nil || len(rs) != 1 || rs[0].typ != 1<<31+5 {
			t.Errorf("option %d before TLS: %v %v, want TLS_REQD only", o.opt, rs, err)
		}
		for _, r := range rs {
			if bytes.Contains(r.data, []byte("disk")) {
				t.Errorf("option %d before TLS: reply %q tells of the export", o.opt, r.data)
			}
		}
	}
	if rs, err := c.option(5, []byte("x")); err != nil || rs[0].typ != 1<<31+3 {
		t.Errorf("STARTTLS with data: %v %v, want INVALID", rs, err)
	}
	if rs, err := c.option(2, nil); err != nil || rs[0].typ != 1 {
		t.Errorf("ABORT before TLS: %v %v", rs, err)
	}
	t.Run("EXPORT_NAME closes", func(t *testing.T) {
		c := plain()
		if err := c.sendOption(1, []byte("disk")); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, c)
	})
	t.Run("requests instead of options", func(t *testing.T) {
		c := plain()
		c.nc.Write(rawRequest(0, cmdRead, 1, 0, 4096, nil))
		wantClosed(t, c)
	})
	t.Run("TLS twice", func(t *testing.T) {
		c, err := x.secure(t, x.clientConfig(x.ca.Client()))
		if err != nil {
			t.Fatal(err)
		}
		if rs, err := c.option(5, nil); err != nil || rs[0].typ != 1<<31+3 {
			t.Errorf("STARTTLS in TLS: %v %v, want INVALID", rs, err)
		}
		if err := c.enter("disk", true, false); err != nil {
			t.Error(err)
		}
	})
	t.Run("TLS from the first byte", func(t *testing.T) {
		if err := tls.Client(dialTCP(t, x.addr), x.clientConfig(x.ca.Client())).Handshake(); err == nil {
			t.Error("TLS without STARTTLS worked")
		}
	})
	t.Run("STARTTLS where there is none", func(t *testing.T) {
		s, path := startServer(t, Options{})
		if err := s.AddExport("disk", dev.NewMem(1<<20), ExportOptions{}); err != nil {
			t.Fatal(err)
		}
		c, err := dial(path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if rs, err := c.option(5, nil); err != nil || rs[0].typ != 1<<31+1 {
			t.Errorf("STARTTLS on a Unix socket: %v %v, want UNSUP", rs, err)
		}
		if err := c.enter("disk", true, false); err != nil {
			t.Error(err)
		}
	})
}

// TestTLSTakesNothingFromBefore: what somebody in the middle puts behind STARTTLS, in the clear,
// is not served as if it had come through TLS.
func TestTLSTakesNothingFromBefore(t *testing.T) {
	x := newTLSSite(t, Options{})
	c, err := greet(dialTCP(t, x.addr), 3)
	if err != nil {
		t.Fatal(err)
	}
	option := func(n uint32, data []byte) []byte {
		b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), n)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	if _, err := c.nc.Write(append(option(5, nil), append(option(8, nil), option(7, goData("disk"))...)...)); err != nil {
		t.Fatal(err)
	}
	var b [20]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil || binary.BigEndian.Uint32(b[12:]) != 1 {
		t.Fatalf("STARTTLS: %x %v", b, err)
	}
	rest, err := io.ReadAll(c.r)
	if isTimeout(err) || len(rest) > 64 || bytes.Contains(rest, []byte("IHAVEOPT")) {
		t.Errorf("after plain options behind STARTTLS: %d bytes %q, %v; want an alert and the end", len(rest), rest, err)
	}
}

// TestTLSHandshakeIsBounded: in time, whatever the client does or leaves undone, and in the
// memory that the length of an option can ask for.
func TestTLSHandshakeIsBounded(t *testing.T) {
	x := newTLSSite(t, Options{HandshakeTimeout: 700 * time.Millisecond})
	tests := map[string]func(nc net.Conn){
		"silent":               func(net.Conn) {},
		"one byte at a time":   func(nc net.Conn) { drip(nc, append([]byte{0, 0, 0, 3}, make([]byte, 100)...)) },
		"silent after options": func(nc net.Conn) { nc.Write([]byte{0, 0, 0, 3}) },
		"silent after STARTTLS": func(nc net.Conn) {
			nc.Write(append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00"...))
		},
		"half a client hello": func(nc net.Conn) {
			nc.Write(append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00"...))
			drip(nc, append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, make([]byte, 400)...))
		},
		"huge hello": func(nc net.Conn) {
			nc.Write(append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00"...))
			nc.Write([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff})
			nc.Write(make([]byte, 1<<20))
		},
		"option of 4 GiB":  func(nc net.Conn) { nc.Write(append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff"...)) },
		"option of 64 KiB": func(nc net.Conn) { nc.Write(append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00\x00\x00\x07\x00\x01\x00\x00"...)) },
	}
	var wg sync.WaitGroup
	for name, send := range tests {
		nc := dialTCP(t, x.addr)
		wg.Go(func() {
			go send(nc)
			nc.SetReadDeadline(time.Now().Add(10 * time.Second))
			if n, err := io.Copy(io.Discard, nc); isTimeout(err) || n > 4096 {
				t.Errorf("%s: still open after 10 s, or %d bytes: %v", name, n, err)
			}
		})
	}
	wg.Wait()
	x.connect(t, true)
}

// TestLongOptionBeforeTLS: what is refused at its length is refused at once, before its bytes.
func TestLongOptionBeforeTLS(t *testing.T) {
	x := newTLSSite(t, Options{HandshakeTimeout: time.Minute})
	c, err := greet(dialTCP(t, x.addr), 3)
	if err != nil {
		t.Fatal(err)
	}
	c.nc.Write([]byte("IHAVEOPT\x00\x00\x00\x07\x00\x00\x20\x01")) // 8193
	wantClosed(t, c)
}

func drip(nc net.Conn, b []byte) {
	for i := range b {
		if _, err := nc.Write(b[i : i+1]); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestTLSIdleConnectionHoldsNoBuffers: before it waits for the client it gives its memory back,
// and takes some again only when there is something. Idle for longer than a handshake may take,
// it answers all the same.
func TestTLSIdleConnectionHoldsNoBuffers(t *testing.T) {
	ca := testpki.NewCA(t, "ca")
	tc, err := LoadTLS(writeTLS(t, t.TempDir(), ca, ca.Server()), quiet)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client := tls.Client(dialTCP(t, ln.Addr().String()), &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", Certificates: []tls.Certificate{ca.Client().TLS()}})
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	shaken := make(chan error, 1)
	go func() { shaken <- client.Handshake() }()
	l, err := startTLS(nc, tc)
	if err == nil {
		err = errors.Join(l.transmit(), <-shaken)
	}
	if err != nil {
		t.Fatal(err)
	}
	const held, given = "held", "given"
	steps := make(chan string, 100)
	type result struct {
		n   int
		err error
	}
	done := make(chan result)
	buf := make([]byte, 4096)
	go func() {
		n, err := l.recv(func() []byte { steps <- held; return buf }, func() { steps <- given })
		done <- result{n, err}
	}()
	last := ""
	for wait := time.After(300 * time.Millisecond); ; {
		select {
		case last = <-steps:
			continue
		case r := <-done:
			t.Fatalf("received %+v, nothing was sent", r)
		case <-wait:
		}
		break
	}
	if last != given {
		t.Errorf("while it waits its buffer is %s, want given back", last)
	}
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if r := <-done; r.err != nil || string(buf[:r.n]) != "hello" {
		t.Errorf("received %q, %v", buf[:r.n], r.err)
	}
	// An interrupt ends the wait, and nothing is lost.
	l.interrupt()
	if _, err := l.recv(func() []byte { return buf }, func() {}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("interrupted: %v", err)
	}
	l.resume()
	go client.Write([]byte("again"))
	n, err := l.recv(func() []byte { return buf }, func() {})
	if err != nil || string(buf[:n]) != "again" {
		t.Errorf("after an interrupt: %q, %v", buf[:n], err)
	}
}

// TestTLSMayBeSilent: once it has its export, for as long as it likes.
func TestTLSMayBeSilent(t *testing.T) {
	x := newTLSSite(t, Options{HandshakeTimeout: 200 * time.Millisecond})
	c := x.connect(t, true)
	for range 2 {
		time.Sleep(300 * time.Millisecond)
		if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTLSDrain: removing the export answers what is in flight and says goodbye in TLS.
func TestTLSDrain(t *testing.T) {
	x := newTLSSite(t, Options{})
	c := x.connect(t, true)
	if _, _, err := c.do(0, cmdWrite, 0, 4096, pattern(3, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := x.s.RemoveExport(t.Context(), "disk"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.r.ReadByte(); err != io.EOF {
		t.Errorf("after the removal: %v, want EOF", err)
	}
}

// TestTLSGoodbye: the end of the stream is said in TLS, so that nobody in the middle can say it.
// With TLS 1.2 an alert can be told from data on the wire.
func TestTLSGoodbye(t *testing.T) {
	x := newTLSSite(t, Options{})
	p, err := greet(dialTCP(t, x.addr), 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.option(5, nil); err != nil {
		t.Fatal(err)
	}
	cc := x.clientConfig(x.ca.Client())
	cc.MaxVersion = tls.VersionTLS12
	tap := &tapped{Conn: p.nc}
	c := newTClient(tls.Client(tap, cc))
	if err := c.enter("disk", true, false); err != nil {
		t.Fatal(err)
	}
	tap.b = nil
	if err := x.s.RemoveExport(t.Context(), "disk"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c.r); err != nil {
		t.Fatal(err)
	}
	if len(tap.b) < 5 || tap.b[0] != 21 {
		t.Errorf("the last bytes are % x, want a record of an alert (21)", tap.b)
	}
}

// A tapped connection remembers what was read.
type tapped struct {
	net.Conn
	b []byte
}

func (c *tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.b = append(c.b, p[:n]...)
	return n, err
}

// TestTLSStalledClientIsCutOff: one that reads nothing does not hold up the end.
func TestTLSStalledClientIsCutOff(t *testing.T) {
	x := newTLSSite(t, Options{CloseTimeout: 500 * time.Millisecond})
	c := x.connect(t, true)
	for i := range 16 { // replies of 16 MiB, of which the client reads nothing
		if _, err := c.request(0, cmdRead, uint64(i)<<20, 1<<20, nil); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() { done <- x.s.Close() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("close: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Close hangs")
	}
}

// TestTLSRecordsInPieces: records that arrive byte by byte, and several at once, are put together.
func TestTLSRecordsInPieces(t *testing.T) {
	x := newTLSSite(t, Options{})
	p, err := greet(dialTCP(t, x.addr), 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.option(5, nil); err != nil {
		t.Fatal(err)
	}
	sl := &slowWriter{Conn: p.nc}
	c := newTClient(tls.Client(sl, x.clientConfig(x.ca.Client())))
	if err := c.enter("disk", true, false); err != nil {
		t.Fatal(err)
	}
	sl.step = 7
	want := pattern(9, 2048)
	if _, _, err := c.do(0, cmdWrite, 512, 2048, want); err != nil {
		t.Fatal(err)
	}
	sl.step, sl.hold = 0, true // three requests in one segment
	for i := range uint64(3) {
		if _, err := c.request(0, cmdRead, 512*i, 512, nil); err != nil {
			t.Fatal(err)
		}
	}
	sl.flush()
	for i := range 3 {
		k, err := c.reply(nil)
		if err != nil || k.errno != 0 {
			t.Fatal(k.errno, err)
		}
		if off := binary.BigEndian.Uint64(k.data); off > 0 && !bytes.Equal(k.data[8:], want[off-512:off]) {
			t.Errorf("reply %d differs", i)
		}
	}
}

// A slowWriter cuts writes into pieces, or holds them back.
type slowWriter struct {
	net.Conn
	step int
	hold bool
	held []byte
}

func (w *slowWriter) Write(p []byte) (int, error) {
	if w.hold {
		w.held = append(w.held, p...)
		return len(p), nil
	}
	if w.step == 0 {
		return w.Conn.Write(p)
	}
	for i := 0; i < len(p); i += w.step {
		if _, err := w.Conn.Write(p[i:min(i+w.step, len(p))]); err != nil {
			return i, err
		}
		time.Sleep(200 * time.Microsecond)
	}
	return len(p), nil
}

func (w *slowWriter) flush() {
	w.hold = false
	w.Conn.Write(w.held)
}

func TestLoadTLSRefuses(t *testing.T) {
	ca := testpki.NewCA(t, "ca")
	good := writeTLS(t, t.TempDir(), ca, ca.Server())
	file := func(text string) string {
		p := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	open := writeTLS(t, t.TempDir(), ca, ca.Server())
	if err := os.Chmod(open.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	foreign := writeTLS(t, t.TempDir(), ca, ca.Server())
	foreign.Key = good.Key
	with := func(change func(*TLSFiles)) TLSFiles {
		f := good
		change(&f)
		return f
	}
	tests := []struct {
		name string
		f    TLSFiles
		want []string
	}{
		{"nothing", TLSFiles{}, []string{"three files"}},
		{"no CA", with(func(f *TLSFiles) { f.ClientCA = "" }), []string{"three files", "CA of the clients"}},
		{"no such file", with(func(f *TLSFiles) { f.Certificate += "x" }), []string{good.Certificate + "x"}},
		{"key for everybody", open, []string{open.Key, "0644", "chmod"}},
		{"key of another certificate", foreign, []string{"private key does not match"}},
		{"CA without certificates", with(func(f *TLSFiles) { f.ClientCA = file("hello") }), []string{"no certificate in it"}},
		{"garbage", with(func(f *TLSFiles) {
			f.Certificate = file("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}), []string{"certificate"}},
		{"too long", with(func(f *TLSFiles) { f.ClientCA = file(strings.Repeat("x", maxPEM+1)) }), []string{"at most"}},
		{"a directory", with(func(f *TLSFiles) { f.Certificate = t.TempDir() }), []string{"certificate"}},
	}
	if _, err := LoadTLS(good, quiet); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := LoadTLS(tt.f, quiet)
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not contain %q", err, w)
				}
			}
		})
	}
}

// TestTLSFilesAreReadAgain: a new certificate and a new CA count for the next connection; broken
// ones leave the old.
func TestTLSFilesAreReadAgain(t *testing.T) {
	x := newTLSSite(t, Options{})
	x.connect(t, true)
	look := func() {
		for ln := range x.s.listeners {
			if tl, ok := ln.(*tcpListener); ok {
				tl.tls.mu.Lock()
				tl.tls.looked = time.Time{}
				tl.tls.mu.Unlock()
			}
		}
	}
	next := testpki.NewCA(t, "next")
	next.WriteCA(x.files.ClientCA)
	os.Chtimes(x.files.ClientCA, time.Time{}, time.Now().Add(time.Minute))
	look()
	if _, err := x.secure(t, x.clientConfig(x.ca.Client())); err == nil {
		t.Error("a client of the old CA was served")
	}
	if _, err := x.secure(t, x.clientConfig(next.Client())); err != nil {
		t.Errorf("a client of the new CA: %v", err)
	}
	if err := os.WriteFile(x.files.Certificate, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	look()
	if _, err := x.secure(t, x.clientConfig(next.Client())); err != nil {
		t.Errorf("with a broken file, the old ones: %v", err)
	}
}

// TestExpiredServerCertificate is refused by the client; the server says so in its log.
func TestExpiredServerCertificate(t *testing.T) {
	ca := testpki.NewCA(t, "ca")
	var log lines
	tc, err := LoadTLS(writeTLS(t, t.TempDir(), ca, ca.Server(testpki.Expired)), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	log.wait(t, "has expired")
	s, _ := startServer(t, Options{})
	x := &tlsSite{s: s, ca: ca, addr: listenTCP(t, s, "127.0.0.1:0", tc)}
	var bad x509.CertificateInvalidError
	if _, err := x.secure(t, x.clientConfig(ca.Client())); !errors.As(err, &bad) || bad.Reason != x509.Expired {
		t.Errorf("got %v, want an expired certificate", err)
	}
}
