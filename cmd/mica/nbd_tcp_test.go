package main

import (
	"bytes"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/internal/testpki"
)

// configure gives the daemon a configuration.
func (b *box) configure(text string) {
	b.Helper()
	b.config = filepath.Join(b.dir, "config.toml")
	b.write(b.config, text)
}

// refusesToStart runs the daemon, which must say why it does not start.
func (b *box) refusesToStart(want ...string) {
	b.Helper()
	msg := b.fails("serve", "--root", b.root, "--run", b.run, "--config", b.config)
	for _, w := range want {
		if !strings.Contains(msg, w) {
			b.Errorf("serve: %q does not contain %q", msg, w)
		}
	}
}

// A tlsPlace is a server's files in a box, and a client's.
type tlsPlace struct {
	ca                    *testpki.CA
	cert, key, clientCA   string
	config                string // the [nbd] table
	client, other, nobody string // directories for libnbd: a good client, of another CA, none
}

func newTLSPlace(b *box, listen string) tlsPlace {
	ca := testpki.NewCA(b, "ca")
	x := tlsPlace{ca: ca, cert: filepath.Join(b.dir, "server.pem"), key: filepath.Join(b.dir, "server.key"), clientCA: filepath.Join(b.dir, "ca.pem")}
	ca.Server().Write(b, x.cert, x.key)
	ca.WriteCA(x.clientCA)
	x.config = fmt.Sprintf("[nbd]\nlisten = %q\ntls_certificate = %q\ntls_key = %q\ntls_client_ca = %q\n", listen, x.cert, x.key, x.clientCA)
	x.client = ca.Client().ClientDir(b, ca)
	x.other = testpki.NewCA(b, "other").Client().ClientDir(b, ca)
	x.nobody = b.TempDir()
	ca.WriteCA(filepath.Join(x.nobody, "ca-cert.pem"))
	return x
}

// freePort is a port that nobody has at this moment.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (b *box) nbdinfo(uri string) (string, error) {
	b.Helper()
	tool, err := exec.LookPath("nbdinfo")
	if err != nil {
		b.Skip("nbdinfo (libnbd-bin) is not installed: TCP is NOT tested with another project's client")
	}
	c := exec.Command(tool, uri)
	c.WaitDelay = time.Second
	timer := time.AfterFunc(time.Minute, func() { c.Process.Kill() })
	defer timer.Stop()
	out, err := c.CombinedOutput()
	return string(out), err
}

// TestAttachOverTCP: nothing is on the network unless the configuration says where and the
// container is attached so; other containers cannot be seen there; after a restart it is as before.
func TestAttachOverTCP(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	for _, n := range []string{"near", "far"} {
		b.mica("create", "test:1", n)
	}
	if msg := b.fails("attach", "far", "--as", "nbd", "--tcp"); !strings.Contains(msg, "nbd.listen") {
		t.Errorf("attach --tcp without a listener: %s", msg)
	}
	if list := asJSON[api.Status](b, "status").Store.Attachments; len(list) != 0 {
		t.Errorf("the refused attach left it attached: %+v", list)
	}
	if _, stderr, code := b.try("attach", "far", "--tcp"); code != 2 || !strings.Contains(stderr, "--as nbd") {
		t.Errorf("attach --tcp as a block device: exit status %d, %s", code, stderr)
	}
	b.stop(syscall.SIGTERM)

	b.configure("[nbd]\nlisten = \"0.0.0.0:0\"\n")
	b.refusesToStart("nbd.listen", "only with TLS", "127.0.0.1")

	addr := "127.0.0.1:" + freePort(t)
	b.configure("[nbd]\nlisten = \"" + addr + "\"\n")
	b.start()
	near, far := b.mica("attach", "near", "--as", "nbd"), b.mica("attach", "far", "--as", "nbd", "--tcp")
	if !strings.HasPrefix(near, "nbd+unix:///") {
		t.Errorf("attach --as nbd: %s", near)
	}
	if !strings.HasPrefix(far, "nbd://"+addr+"/") {
		t.Errorf("attach --as nbd --tcp: %s", far)
	}
	st := asJSON[api.Status](b, "status")
	if st.Exports.NBDAddress != addr || !strings.Contains(strings.Join(st.Notes, "\n"), "without TLS") {
		t.Errorf("status: address %q, notes %q", st.Exports.NBDAddress, st.Notes)
	}
	look := func() {
		t.Helper()
		if out, err := b.nbdinfo(far); err != nil || !strings.Contains(out, "export-size: 10737418240") {
			t.Errorf("nbdinfo of what is attached with --tcp: %v\n%s", err, out)
		}
		u, err := url.Parse(near)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := b.nbdinfo("nbd://" + addr + u.EscapedPath()); err == nil {
			t.Errorf("what is attached without --tcp can be reached over TCP:\n%s", out)
		}
	}
	look()
	if msg := b.fails("attach", "near", "--as", "nbd", "--tcp"); !strings.Contains(msg, "detach it first") {
		t.Errorf("attach with and without --tcp: %s", msg)
	}
	b.stop(syscall.SIGKILL)
	b.start()
	look()
	if got := b.mica("attach", "far", "--as", "nbd", "--tcp"); got != far {
		t.Errorf("after a kill: %s, want %s", got, far)
	}
	// Without a listener it is on the socket only, and nowhere else.
	b.stop(syscall.SIGTERM)
	b.configure("")
	b.start()
	for _, a := range asJSON[api.Status](b, "status").Store.Attachments {
		if !strings.HasPrefix(a.URI, "nbd+unix:///") {
			t.Errorf("%s without a listener: %s", a.Container, a.URI)
		}
	}
	if c, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
		c.Close()
		t.Error("without a listener somebody answers at", addr)
	}
	if !strings.Contains(b.logText(), "nbd.listen is not set") {
		t.Errorf("the log does not say why it is on the socket only:\n%s", b.logText())
	}
}

// TestAttachOverTLS: with certificates, and with nothing less.
func TestAttachOverTLS(t *testing.T) {
	b := newBox(t)
	port := freePort(t)
	x := newTLSPlace(b, "0.0.0.0:"+port)
	b.configure(x.config)
	if err := os.Chmod(x.key, 0o644); err != nil {
		t.Fatal(err)
	}
	b.refusesToStart("server.key", "0644")
	if err := os.Chmod(x.key, 0o600); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "vm")
	uri := b.mica("attach", "vm", "--as", "nbd", "--tcp")
	if !strings.HasPrefix(uri, "nbds://") || !strings.Contains(uri, ":"+port+"/") {
		t.Fatalf("attach --as nbd --tcp: %s", uri)
	}
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	at := func(scheme, dir string) string {
		s := scheme + "://127.0.0.1:" + port + u.EscapedPath()
		if dir != "" {
			s += "?tls-certificates=" + url.QueryEscape(dir)
		}
		return s
	}
	if out, err := b.nbdinfo(at("nbds", x.client)); err != nil || !strings.Contains(out, "TLS") || !strings.Contains(out, "export-size: 10737418240") {
		t.Errorf("a client with a certificate: %v\n%s", err, out)
	}
	for name, uri := range map[string]string{"plain": at("nbd", ""), "no certificate": at("nbds", x.nobody), "of another CA": at("nbds", x.other)} {
		if out, err := b.nbdinfo(uri); err == nil || strings.Contains(out, "export-size") {
			t.Errorf("%s: served\n%s", name, out)
		}
	}
	if st := asJSON[api.Status](b, "status"); st.Exports.NBDAddress != "tls 0.0.0.0:"+port {
		t.Errorf("status: address %q", st.Exports.NBDAddress)
	}
	if log := b.logText(); !strings.Contains(log, "connection over TCP refused") {
		t.Errorf("the log does not tell of the refused ones:\n%s", log)
	}
}

// TestThinExportOverTLS: the same for a device of a closed pool.
func TestThinExportOverTLS(t *testing.T) {
	b := newBox(t)
	x := newTLSPlace(b, "")
	b.mica("pool", "create", "pool", "--size", "64M", "--metadata-size", "2M")
	b.mica("thin", "create", "pool", "1")
	c := b.command("thin", "export", "pool", "1", "--size", "32M", "--nbd", "0.0.0.0:0",
		"--tls-certificate", x.cert, "--tls-key", x.key, "--tls-client-ca", x.clientCA)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Process.Kill()
	line := make([]byte, 4096)
	n, err := out.Read(line)
	if err != nil {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	u, err := url.Parse(strings.TrimSpace(string(line[:n])))
	if err != nil || u.Scheme != "nbds" {
		t.Fatalf("printed %q: %v", line[:n], err)
	}
	at := func(scheme, dir string) string {
		return scheme + "://127.0.0.1:" + u.Port() + "/?tls-certificates=" + url.QueryEscape(dir)
	}
	if out, err := b.nbdinfo(at("nbds", x.client)); err != nil || !strings.Contains(out, "export-size: 33554432") {
		t.Errorf("a client with a certificate: %v\n%s", err, out)
	}
	if out, err := b.nbdinfo(at("nbds", x.other)); err == nil {
		t.Errorf("a client of another CA was served\n%s", out)
	}
	c.Process.Signal(os.Interrupt)
	if err := c.Wait(); err != nil {
		t.Errorf("end: %v\n%s", err, errs.String())
	}
}
