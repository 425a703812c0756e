package nbd

import (
	"bytes"
	"encoding/json"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/internal/testpki"
)

// withCertificates is an nbds URI with the directory that libnbd takes certificates from.
func withCertificates(uri, dir string) string {
	return uri + "?tls-certificates=" + url.QueryEscape(dir)
}

// TestLibnbdOverTLS: nbdinfo and nbdcopy with certificates, and what they say without.
func TestLibnbdOverTLS(t *testing.T) {
	x := newTLSSite(t, Options{})
	uri := withCertificates(x.s.URI("disk"), x.ca.Client().ClientDir(t, x.ca))
	var info struct {
		TLS     bool
		Exports []map[string]any
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if !info.TLS || len(info.Exports) != 1 || info.Exports[0]["export-size"] != float64(tlsSize) {
		t.Errorf("nbdinfo: %+v", info)
	}
	if out := tool(t, "nbdinfo", "--list", uri); !strings.Contains(out, `export="disk"`) {
		t.Errorf("nbdinfo --list:\n%s", out)
	}
	image := filepath.Join(medium(t), "image")
	want := pattern(77, tlsSize)
	if err := os.WriteFile(image, want, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", "--flush", image, uri)
	if !bytes.Equal(contentsOf(t, x.d), want) {
		t.Error("nbdcopy to the server: the device differs")
	}
	back := filepath.Join(medium(t), "back")
	tool(t, "nbdcopy", uri, back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
		t.Errorf("nbdcopy from the server differs: %v", err)
	}

	refused := map[string]string{
		"plain":           "nbd://" + x.addr + "/disk",
		"no certificate":  withCertificates(x.s.URI("disk"), onlyCA(t, x.ca)),
		"of another CA":   withCertificates(x.s.URI("disk"), testpki.NewCA(t, "other").Client().ClientDir(t, x.ca)),
		"expired":         withCertificates(x.s.URI("disk"), x.ca.Client(testpki.Expired).ClientDir(t, x.ca)),
		"trusts other CA": withCertificates(x.s.URI("disk"), x.ca.Client().ClientDir(t, testpki.NewCA(t, "other"))),
	}
	for name, uri := range refused {
		if out, err := tryTool(t, "nbdinfo", uri); err == nil {
			t.Errorf("nbdinfo, %s: no error\n%s", name, out)
		} else if strings.Contains(err.Error(), "export-size") {
			t.Errorf("nbdinfo, %s: told the size: %v", name, err)
		}
	}
}

func onlyCA(t *testing.T, ca *testpki.CA) string {
	t.Helper()
	dir := t.TempDir()
	ca.WriteCA(filepath.Join(dir, "ca-cert.pem"))
	return dir
}

// TestLibnbdOverPlainTCP: on the loopback address.
func TestLibnbdOverPlainTCP(t *testing.T) {
	s, _ := startServer(t, Options{})
	d := newTryMem(tlsSize)
	if err := s.AddExport("a b/ü", d, ExportOptions{Network: true}); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Logf("%s: %v: this host cannot", addr, err)
			continue
		}
		ln.Close()
		listenTCP(t, s, addr, nil)
		if out := tool(t, "nbdinfo", "--size", s.URI("a b/ü")); strings.TrimSpace(out) != "16777216" {
			t.Errorf("nbdinfo --size %s: %q", s.URI("a b/ü"), out)
		}
	}
}

// TestQemuOverTLS: qemu-img as a client, with its own kind of certificates' directory.
func TestQemuOverTLS(t *testing.T) {
	x := newTLSSite(t, Options{})
	host, port, _ := net.SplitHostPort(x.addr)
	creds := func(dir string) []string {
		return []string{"--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir, "--image-opts",
			"driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=" + host + ",file.server.port=" + port + ",file.export=disk,file.tls-creds=t"}
	}
	dir := x.ca.Client().ClientDir(t, x.ca)
	if out := tool(t, "qemu-img", append([]string{"info"}, creds(dir)...)...); !strings.Contains(out, "16 MiB (16777216 bytes)") {
		t.Errorf("qemu-img info:\n%s", out)
	}
	want := pattern(5, tlsSize)
	if _, err := x.d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	back := filepath.Join(medium(t), "back")
	args := creds(dir)
	tool(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, args...), back)...)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
		t.Errorf("qemu-img convert differs: %v", err)
	}
	for name, dir := range map[string]string{
		"of another CA": testpki.NewCA(t, "other").Client().ClientDir(t, x.ca),
		"expired":       x.ca.Client(testpki.Expired).ClientDir(t, x.ca),
	} {
		if out, err := tryTool(t, "qemu-img", append([]string{"info"}, creds(dir)...)...); err == nil {
			t.Errorf("qemu-img info, %s: no error\n%s", name, out)
		}
	}
	if out, err := tryTool(t, "qemu-img", "info", "nbd://"+x.addr+"/disk"); err == nil {
		t.Errorf("qemu-img info without TLS: no error\n%s", out)
	}
}

// TestNbdkitOverTLS: nbdkit's nbd plugin between our server and a client on a Unix socket.
func TestNbdkitOverTLS(t *testing.T) {
	x := newTLSSite(t, Options{})
	want := pattern(6, tlsSize)
	if _, err := x.d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(x.addr)
	back := filepath.Join(medium(t), "back")
	tool(t, "nbdkit", "-U", "-", "nbd", "hostname="+host, "port="+port, "export=disk", "tls=require",
		"tls-certificates="+x.ca.Client().ClientDir(t, x.ca), "--run", "nbdcopy \"$uri\" "+back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
		t.Errorf("through nbdkit: differs: %v", err)
	}
	// It takes a server at its word that TLS is required.
	if _, err := tryTool(t, "nbdkit", "-U", "-", "nbd", "hostname="+host, "port="+port, "export=disk", "tls=off", "--run", "nbdinfo \"$uri\""); err == nil {
		t.Error("nbdkit without TLS: no error")
	}
}

// TestNoDowngrade: a client that demands TLS goes away from a server that has none, and from one
// in the middle that says so.
func TestNoDowngrade(t *testing.T) {
	s, _ := startServer(t, Options{})
	if err := s.AddExport("disk", newTryMem(1<<20), ExportOptions{Network: true}); err != nil {
		t.Fatal(err)
	}
	addr := listenTCP(t, s, "127.0.0.1:0", nil)
	ca := testpki.NewCA(t, "ca")
	if out, err := tryTool(t, "nbdinfo", withCertificates("nbds://"+addr+"/disk", ca.Client().ClientDir(t, ca))); err == nil {
		t.Errorf("a client that demands TLS talked to a plain server:\n%s", out)
	}
	// In the middle: STARTTLS is answered "unsupported", the rest is passed on. Our server goes
	// on demanding TLS.
	x := newTLSSite(t, Options{})
	mid, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mid.Close()
	go func() {
		for {
			c, err := mid.Accept()
			if err != nil {
				return
			}
			go strip(c, x.addr)
		}
	}()
	dir := x.ca.Client().ClientDir(t, x.ca)
	if out, err := tryTool(t, "nbdinfo", withCertificates("nbds://"+mid.Addr().String()+"/disk", dir)); err == nil {
		t.Errorf("nbds:// with STARTTLS stripped: no error\n%s", out)
	}
	if out, err := tryTool(t, "nbdinfo", "nbd://"+mid.Addr().String()+"/disk"); err == nil {
		t.Errorf("nbd:// with STARTTLS stripped: no error\n%s", out)
	}
}

// strip relays a connection and answers STARTTLS itself.
func strip(c net.Conn, server string) {
	defer c.Close()
	s, err := net.DialTimeout("tcp", server, 5*time.Second)
	if err != nil {
		return
	}
	defer s.Close()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := s.Read(b)
			if _, werr := c.Write(b[:n]); err != nil || werr != nil {
				c.Close()
				return
			}
		}
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if i := bytes.Index(b[:n], []byte("IHAVEOPT\x00\x00\x00\x05")); i >= 0 {
			s.Write(b[:i])
			c.Write([]byte("\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x05\x80\x00\x00\x01\x00\x00\x00\x00"))
			s.Write(b[i+16 : n])
			continue
		}
		s.Write(b[:n])
	}
}
