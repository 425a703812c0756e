package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"
)

// TLSFiles name what TLS needs, all in PEM. Every client must have a certificate for client
// authentication that the CA signed; there is no way without.
type TLSFiles struct {
	Certificate string // of the server, with what leads to the clients' root, if anything
	Key         string // of the certificate; others than owner and group must not be able to read it
	ClientCA    string // certificates of the authorities that sign the clients'
	// Clients are the names that may connect: one must be the common name, or a DNS, mail or URI
	// name, of the client's certificate. Empty: every client of the CA.
	Clients []string
}

// A TLS is the server side of TLS: version 1.2 or later, certificates of both sides (X.509). The
// files are read again when one has changed; if they are broken then, the old ones go on being
// used and Log says so. Revocation lists are not supported: a certificate is good until it
// expires, the CA changes, or its name is taken out of Clients. Safe for concurrent use.
type TLS struct {
	files TLSFiles
	log   *slog.Logger

	mu     sync.Mutex
	config *tls.Config // guarded by mu
	stamp  [3]stamp    // of the files it was made from; guarded by mu
	looked time.Time   // guarded by mu
}

// A stamp tells whether a file was changed or replaced.
type stamp struct {
	modTime time.Time
	size    int64
}

// LoadTLS reads the files. log is for what is found when they change; nil: slog.Default().
func LoadTLS(f TLSFiles, log *slog.Logger) (*TLS, error) {
	if f.Certificate == "" || f.Key == "" || f.ClientCA == "" {
		return nil, errors.New("TLS needs three files: certificate, key, and the CA of the clients")
	}
	if log == nil {
		log = slog.Default()
	}
	t := &TLS{files: f, log: log}
	var err error
	if t.stamp, err = t.stamps(); err != nil {
		return nil, err
	}
	if t.config, err = t.load(); err != nil {
		return nil, err
	}
	t.looked = time.Now()
	return t, nil
}

func (t *TLS) stamps() (out [3]stamp, err error) {
	for i, p := range []string{t.files.Certificate, t.files.Key, t.files.ClientCA} {
		st, err := os.Stat(p)
		if err != nil {
			return out, fmt.Errorf("TLS: %w", err)
		}
		if st.Size() > maxPEM {
			return out, fmt.Errorf("TLS: %s: %d bytes, at most %d", p, st.Size(), maxPEM)
		}
		if i == 1 && st.Mode()&0o007 != 0 {
			return out, fmt.Errorf("TLS: key %s: mode %04o: everybody on this host can use it; chmod o= it first", p, st.Mode().Perm())
		}
		out[i] = stamp{st.ModTime(), st.Size()}
	}
	return out, nil
}

// maxPEM bounds each file, in bytes.
const maxPEM = 4 << 20

func (t *TLS) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(t.files.Certificate, t.files.Key)
	if err != nil {
		return nil, fmt.Errorf("TLS: certificate %s with key %s: %w", t.files.Certificate, t.files.Key, err)
	}
	pem, err := os.ReadFile(t.files.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS: CA of the clients %s: there is no certificate in it", t.files.ClientCA)
	}
	if leaf := cert.Leaf; leaf != nil && time.Now().After(leaf.NotAfter) {
		t.log.Warn("the server's certificate has expired: clients will not accept it", "file", t.files.Certificate, "expired", leaf.NotAfter)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              pool,
		VerifyConnection:       t.verify,
		SessionTicketsDisabled: true, // every connection shows its certificate anew
		// Replies are large or go out together: small first records would cost more than they save.
		DynamicRecordSizingDisabled: true,
	}, nil
}

// lookAgain is how long files count as unchanged after they were looked at.
const lookAgain = time.Second

// current is the configuration for one handshake, with files that have changed read again.
func (t *TLS) current() *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.looked) < lookAgain {
		return t.config
	}
	t.looked = time.Now()
	st, err := t.stamps()
	if err == nil && st == t.stamp {
		return t.config
	}
	var c *tls.Config
	if err == nil {
		c, err = t.load()
	}
	if err != nil {
		t.log.Warn("certificates changed and cannot be used; the old ones go on", "error", err)
		return t.config
	}
	t.config, t.stamp = c, st
	t.log.Info("certificates were read again", "certificate", t.files.Certificate)
	return c
}

// verify checks the name in a client's certificate, whose chain was checked before.
func (t *TLS) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("no client certificate") // RequireAndVerifyClientCert has seen to that
	}
	if len(t.files.Clients) == 0 {
		return nil
	}
	names := certNames(cs.PeerCertificates[0])
	for _, n := range names {
		if slices.Contains(t.files.Clients, n) {
			return nil
		}
	}
	return fmt.Errorf("client certificate of %q: none of its names may connect", names)
}

func certNames(c *x509.Certificate) []string {
	var names []string
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	names = append(names, c.DNSNames...)
	names = append(names, c.EmailAddresses...)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return names
}
