package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"mica/dev"
	"mica/export/nbd"
	"mica/layer"
)

// nbdSocket is the socket in RUN that NBD clients connect to.
const nbdSocket = "nbd.sock"

// An nbdServer serves devices on one Unix socket. It is the layer store's NBDServer.
type nbdServer struct {
	s    *nbd.Server
	path string
	done chan error // result of Serve
}

func startNBD(run string, log *slog.Logger) (*nbdServer, error) {
	n := &nbdServer{s: nbd.NewServer(nbd.Options{MaxConnections: 4096, Log: log}), path: filepath.Join(run, nbdSocket), done: make(chan error, 1)}
	l, err := n.s.Listen(n.path)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	go func() { n.done <- n.s.Serve(l) }()
	return n, nil
}

func (n *nbdServer) close() error {
	err := n.s.Close()
	<-n.done
	return err
}

// Serve exports d under a name.
func (n *nbdServer) Serve(_ context.Context, name string, d dev.Device, readOnly bool) (layer.NBDExport, error) {
	if err := n.s.AddExport(name, d, nbd.ExportOptions{ReadOnly: readOnly}); err != nil {
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
