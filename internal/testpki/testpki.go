// Package testpki makes certificates for tests: authorities, servers, clients, good and bad ones.
package testpki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A CA signs certificates.
type CA struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// A Cert is a certificate with its key.
type Cert struct {
	DER []byte
	Key *ecdsa.PrivateKey
}

// An Option changes a certificate before it is signed.
type Option func(*x509.Certificate)

// Expired is a certificate of last year.
func Expired(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().AddDate(-1, 0, 0), time.Now().Add(-time.Hour)
}

// Usage replaces what the certificate is for.
func Usage(u ...x509.ExtKeyUsage) Option {
	return func(c *x509.Certificate) { c.ExtKeyUsage = u }
}

// Name replaces the common name and adds DNS names.
func Name(common string, dns ...string) Option {
	return func(c *x509.Certificate) {
		c.Subject.CommonName = common
		c.DNSNames = append(c.DNSNames, dns...)
	}
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// NewCA makes an authority.
func NewCA(t testing.TB, name string) *CA {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{SerialNumber: serial(t), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &CA{t, cert, key}
}

// PEM is the authority's certificate.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// Pool is the authority as what to trust.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.cert)
	return p
}

// Server makes a certificate for localhost, 127.0.0.1 and ::1.
func (ca *CA) Server(opts ...Option) Cert {
	ca.t.Helper()
	return ca.sign(append([]Option{Usage(x509.ExtKeyUsageServerAuth), Name("server", "localhost"), func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	}}, opts...))
}

// Client makes a certificate for a client.
func (ca *CA) Client(opts ...Option) Cert {
	ca.t.Helper()
	return ca.sign(append([]Option{Usage(x509.ExtKeyUsageClientAuth), Name("client")}, opts...))
}

func (ca *CA) sign(opts []Option) Cert {
	ca.t.Helper()
	tmpl := &x509.Certificate{SerialNumber: serial(ca.t), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 1, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment} // qemu wants the second
	for _, o := range opts {
		o(tmpl)
	}
	key := newKey(ca.t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return Cert{der, key}
}

// TLS is the certificate as crypto/tls wants it.
func (c Cert) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{c.DER}, PrivateKey: c.Key}
}

// Write writes the certificate and its key (mode 0600), in PEM.
func (c Cert) Write(t testing.TB, certFile, keyFile string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.Key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.DER}))
	write(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// ClientDir makes a directory as libnbd, nbdkit and qemu read it: ca-cert.pem, client-cert.pem,
// client-key.pem.
func (c Cert) ClientDir(t testing.TB, trust *CA) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca-cert.pem"), trust.PEM())
	c.Write(t, filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	return dir
}

// WriteCA writes an authority's certificate.
func (ca *CA) WriteCA(file string) { write(ca.t, file, ca.PEM()) }

func write(t testing.TB, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
