package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
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
	var socket, file, origin string
	var readOnly bool
	c := &cobra.Command{
		Use:   "export POOL ID --size N --nbd SOCKET | --fuse FILE",
		Short: "Serve a thin device until interrupted",
		Long: `Serve a thin device until interrupted: as a network block device on a Unix socket, or as a
file under FUSE, on which losetup or a virtual machine can work. With --origin, blocks that
are not mapped are read from another file or device, which must not change.

The device is flushed when the command ends.`,
		Example: `  mica thin export /srv/pool 7 --size 10G --nbd /tmp/seven.sock
  nbdcopy 'nbd+unix:///?socket=/tmp/seven.sock' seven.img
  mica thin export /srv/pool 7 --size 10G --fuse /tmp/seven`,
		Args: p.args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (socket == "") == (file == "") {
				return usagef("give one of --nbd SOCKET and --fuse FILE")
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
					if socket != "" {
						return exportNBD(cmd, t, socket, readOnly)
					}
					return exportFile(cmd, t, file, readOnly)
				})
			})(cmd, args)
		},
	}
	p.add(c)
	sizeVar(c, &length, "size", 0, "length of the device, which the pool does not store")
	c.Flags().StringVar(&socket, "nbd", "", "serve NBD on this Unix socket")
	c.Flags().StringVar(&file, "fuse", "", "serve this file under FUSE")
	c.Flags().StringVar(&origin, "origin", "", "external origin: read where nothing is mapped")
	c.Flags().BoolVar(&readOnly, "read-only", false, "refuse writes")
	c.MarkFlagRequired("size")
	return c
}

// exportNBD serves d as the default export of a socket until the command is interrupted.
func exportNBD(cmd *cobra.Command, d dev.Device, socket string, readOnly bool) error {
	socket, err := filepath.Abs(socket)
	if err != nil {
		return err
	}
	s := nbd.NewServer(nbd.Options{})
	if err := s.AddExport("", d, nbd.ExportOptions{ReadOnly: readOnly}); err != nil {
		return err
	}
	ln, err := s.Listen(socket)
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
