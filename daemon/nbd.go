package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	"mica/daemon/config"
	"mica/dev"
	"mica/export/nbd"
	"mica/layer"
)

// nbdSocket is the socket in RUN that NBD clients connect to.
const nbdSocket = "nbd.sock"

// An nbdServer serves devices on one Unix socket, and over TCP those that are meant to be. It is the layer store's NBDServer.
type nbdServer struct {
	s       *nbd.Server
	path    string
	address string     // over TCP, "tls " before it with TLS; empty: none
	serving int        // calls of Serve
	done    chan error // their results
	log     *slog.Logger
}

// maxNBDClients is how many clients there may be; half of them over TCP.
const maxNBDClients = 4096

func startNBD(run string, c config.NBD, log *slog.Logger) (_ *nbdServer, err error) {
	n := &nbdServer{s: nbd.NewServer(nbd.Options{MaxConnections: maxNBDClients, Log: log}), path: filepath.Join(run, nbdSocket), done: make(chan error, 2), log: log}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("nbd: %w", err), n.close())
		}
	}()
	l, err := n.s.Listen(n.path)
	if err != nil {
		return nil, err
	}
	n.serve(l)
	if c.Listen == "" {
		return n, nil
	}
	var secure *nbd.TLS
	if c.TLS() {
		secure, err = nbd.LoadTLS(nbd.TLSFiles{Certificate: c.TLSCertificate, Key: c.TLSKey, ClientCA: c.TLSClientCA, Clients: c.TLSClients}, log)
		if err != nil {
			return nil, err
		}
	}
	if l, err = n.s.ListenTCP(c.Listen, secure); err != nil {
		return nil, err
	}
	n.address = l.Addr().String()
	if secure != nil {
		n.address = "tls " + n.address
	}
	n.serve(l)
	return n, nil
}

func (n *nbdServer) serve(l net.Listener) {
	n.serving++
	go func() { n.done <- n.s.Serve(l) }()
}

func (n *nbdServer) close() error {
	err := n.s.Close()
	for range n.serving {
		<-n.done
	}
	return err
}

// Serve exports d under a name. One that was attached for TCP when there was a listener, and
// comes back after a restart without, is on the socket only.
func (n *nbdServer) Serve(_ context.Context, name string, d dev.Device, o layer.NBDOptions) (layer.NBDExport, error) {
	if o.TCP && n.address == "" {
		n.log.Warn("an attachment is for TCP, and nbd.listen is not set: it is on the socket only", "attachment", name)
	}
	if err := n.s.AddExport(name, d, nbd.ExportOptions{ReadOnly: o.ReadOnly, Network: o.TCP}); err != nil {
		return nil, err
	}
	return &nbdExport{n, name, d}, nil
}

type nbdExport struct {
	n    *nbdServer
	name string
	d    dev.Device
}

func (e *nbdExport) URI() string { return e.n.s.URI(e.name) }

func (e *nbdExport) Clients() int {
	for _, i := range e.n.s.Exports() {
		if i.Name == e.name {
			return i.Connections
		}
	}
	return 0
}

// Close disconnects the clients; the device is flushed after the last of their requests.
func (e *nbdExport) Close(ctx context.Context) error {
	if err := e.n.s.RemoveExport(ctx, e.name); err != nil {
		return err
	}
	return e.d.Flush()
}
