package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export/fuse"
	"mica/export/nbd"
	"mica/thin"
)

func newThinExportCmd() *cobra.Command {
	var p poolFlags
	var length int64
	var x nbdFlags
	var file, origin string
	var readOnly bool
	c := &cobra.Command{
		Use:   "export POOL ID --size N --nbd SOCKET|IP:PORT | --fuse FILE",
		Short: "Serve a thin device until interrupted",
		Long: `Serve a thin device until interrupted: as a network block device on a Unix socket or over TCP,
or as a file under FUSE, on which losetup or a virtual machine can work. With --origin, blocks
that are not mapped are read from another file or device, which must not change.

Over TCP the address must be a loopback one, which every user of this host can connect to,
unless the three --tls options are given: then clients must use TLS and show a certificate
that the CA signed. A name without a colon, or with a slash, is a socket's.

The device is flushed when the command ends.`,
		Example: `  mica thin export /srv/pool 7 --size 10G --nbd /tmp/seven.sock
  nbdcopy 'nbd+unix:///?socket=/tmp/seven.sock' seven.img
  mica thin export /srv/pool 7 --size 10G --nbd 127.0.0.1:10809
  mica thin export /srv/pool 7 --size 10G --nbd 0.0.0.0:10809 --tls-certificate server.pem \
    --tls-key server.key --tls-client-ca ca.pem
  mica thin export /srv/pool 7 --size 10G --fuse /tmp/seven`,
		Args: p.args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (x.address == "") == (file == "") {
				return usagef("give one of --nbd SOCKET|IP:PORT and --fuse FILE")
			}
			if err := x.check(); err != nil {
				return err
			}
			return p.onDevices(readOnly, func(cmd *cobra.Command, pool *user.Pool, ids []thin.DevID) error {
				o := engine.OpenOptions{SizeBytes: length, ReadOnly: readOnly}
				if origin != "" {
					d, err := dev.Open(origin, dev.OpenOptions{ReadOnly: true})
					if err != nil {
						return err
					}
					defer d.Close()
					o.ExternalOrigin = d
				}
				return onThin(cmd.Context(), pool, ids[0], o, func(t engine.Thin) error {
					if x.address != "" {
						return x.export(cmd, t, readOnly)
					}
					return exportFile(cmd, t, file, readOnly)
				})
			})(cmd, args)
		},
	}
	p.add(c)
	sizeVar(c, &length, "size", 0, "length of the device, which the pool does not store")
	x.add(c)
	c.Flags().StringVar(&file, "fuse", "", "serve this file under FUSE")
	c.Flags().StringVar(&origin, "origin", "", "external origin: read where nothing is mapped")
	c.Flags().BoolVar(&readOnly, "read-only", false, "refuse writes")
	c.MarkFlagRequired("size")
	return c
}

// nbdFlags say where NBD is served, and with which certificates.
type nbdFlags struct {
	address string // a socket, or IP:PORT
	tls     nbd.TLSFiles
}

func (x *nbdFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&x.address, "nbd", "", "serve NBD on `SOCKET|IP:PORT`: a Unix socket, or TCP")
	c.Flags().StringVar(&x.tls.Certificate, "tls-certificate", "", "over TCP: certificate of the server, a PEM `FILE`")
	c.Flags().StringVar(&x.tls.Key, "tls-key", "", "its key, a PEM `FILE`")
	c.Flags().StringVar(&x.tls.ClientCA, "tls-client-ca", "", "who signs the clients' certificates, a PEM `FILE`")
}

// tcp tells an address from the path of a socket.
func (x *nbdFlags) tcp() bool {
	return strings.Contains(x.address, ":") && !strings.Contains(x.address, "/")
}

func (x *nbdFlags) secure() bool { return x.tls.Certificate+x.tls.Key+x.tls.ClientCA != "" }

// check refuses what cannot work before the pool is opened.
func (x *nbdFlags) check() error {
	if x.secure() && !x.tcp() {
		return usagef("--tls-certificate, --tls-key and --tls-client-ca go with --nbd IP:PORT")
	}
	if x.tcp() {
		return nbd.CheckTCP(x.address, x.secure())
	}
	return nil
}

func (x *nbdFlags) listen(s *nbd.Server) (net.Listener, error) {
	if !x.tcp() {
		socket, err := filepath.Abs(x.address)
		if err != nil {
			return nil, err
		}
		return s.Listen(socket)
	}
	var t *nbd.TLS
	if x.secure() {
		var err error
		if t, err = nbd.LoadTLS(x.tls, nil); err != nil {
			return nil, err
		}
	}
	return s.ListenTCP(x.address, t)
}

// export serves d as the default export until the command is interrupted.
func (x *nbdFlags) export(cmd *cobra.Command, d dev.Device, readOnly bool) error {
	s := nbd.NewServer(nbd.Options{})
	if err := s.AddExport("", d, nbd.ExportOptions{ReadOnly: readOnly, Network: true}); err != nil {
		return err
	}
	ln, err := x.listen(s)
	if err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), s.URI(""))
	stop := context.AfterFunc(cmd.Context(), func() { s.Close() })
	defer stop()
	err = s.Serve(ln)
	if cmd.Context().Err() != nil && (err == nil || errors.Is(err, net.ErrClosed)) {
		err = nil
	}
	return errors.Join(err, s.Close())
}

// detachWait bounds how long the end of an export waits for whoever has the file open.
const detachWait = 10 * time.Second

// exportFile serves d as a file until the command is interrupted.
func exportFile(cmd *cobra.Command, d dev.Device, file string, readOnly bool) error {
	f, err := fuse.ServeFile(file, d, readOnly)
	if err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), file)
	<-cmd.Context().Done()
	ctx, cancel := context.WithTimeout(context.Background(), detachWait)
	defer cancel()
	return f.Close(ctx)
}
