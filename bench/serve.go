package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export"
	"mica/export/fuse"
	"mica/export/nbd"
	"mica/thin"
)

// Serve is what a process serves that is measured: a plain file, or a thin device of a pool, as
// a network or as a local block device.
type Serve struct {
	File string // or
	Pool string
	IDs  []thin.DevID // one for NBD
	Size int64        // of each thin device, bytes

	NBD   string   // Unix socket, or
	Block string   // a directory for the mount point of FUSE and loop
	Loop  []string // command that changes loop devices for this process

	Profile string // where a profile of the processor time goes; ""
}

// Run serves until ctx ends or in is closed. When it serves it prints the addresses, one a line.
func (s Serve) Run(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		io.Copy(io.Discard, in)
		cancel()
	}()
	if s.Profile != "" {
		f, err := os.Create(s.Profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	list, closing, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closing()) }()
	if s.NBD != "" {
		return s.serveNBD(ctx, list[0], out)
	}
	return s.serveBlock(ctx, list, out)
}

func (s Serve) open(ctx context.Context) (list []dev.Device, closing func() error, err error) {
	closing = func() error {
		var errs []error
		for _, d := range list {
			errs = append(errs, d.Close())
		}
		return errors.Join(errs...)
	}
	if s.File != "" {
		d, err := dev.Open(s.File, dev.OpenOptions{})
		if err != nil {
			return nil, nil, err
		}
		list = append(list, inline{d})
		return list, closing, nil
	}
	p, err := user.Open(ctx, user.Location{Dir: s.Pool}, user.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, nil, err
	}
	closeDevices := closing
	closing = func() error { return errors.Join(closeDevices(), p.Close()) }
	for _, id := range s.IDs {
		t, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: s.Size})
		if err != nil {
			return nil, nil, errors.Join(err, closing())
		}
		list = append(list, t)
	}
	return list, closing, nil
}

func (s Serve) serveNBD(ctx context.Context, d dev.Device, out io.Writer) error {
	srv := nbd.NewServer(nbd.Options{})
	if err := srv.AddExport("", d, nbd.ExportOptions{}); err != nil {
		return err
	}
	ln, err := srv.Listen(s.NBD)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, srv.URI(""))
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err = srv.Serve(ln)
	if ctx.Err() != nil && (err == nil || errors.Is(err, net.ErrClosed)) {
		err = nil
	}
	return errors.Join(err, srv.Close())
}

// detachWait bounds the wait for whoever has the node open at the end.
const detachWait = 10 * time.Second

func (s Serve) serveBlock(ctx context.Context, list []dev.Device, out io.Writer) error {
	run, err := filepath.Abs(s.Block)
	if err != nil {
		return err
	}
	e, err := fuse.New(fuse.Options{RunDir: run, HelperCommand: s.Loop, DetachWait: detachWait})
	if err != nil {
		return err
	}
	var attached []export.Attachment
	var nodes strings.Builder
	for i, d := range list {
		a, err := e.Attach(ctx, "bench"+strconv.Itoa(i), d, export.AttachOptions{})
		if err != nil {
			return errors.Join(err, e.Close())
		}
		attached = append(attached, a)
		fmt.Fprintln(&nodes, a.Node())
	}
	io.WriteString(out, nodes.String())
	<-ctx.Done()
	end, cancel := context.WithTimeout(context.Background(), 2*detachWait)
	defer cancel()
	var errs []error
	for _, a := range attached {
		errs = append(errs, a.Detach(end))
	}
	return errors.Join(append(errs, e.Close())...)
}

// inline is a plain file as our servers serve it best: on the thread that has read the request. It
// has no holes to tell of, as asking the host's file system for them costs more than a read.
type inline struct{ d dev.Device }

func (f inline) Size() int64                              { return f.d.Size() }
func (f inline) Flush() error                             { return f.d.Flush() }
func (f inline) Close() error                             { return f.d.Close() }
func (f inline) ReadAt(p []byte, off int64) (int, error)  { return f.d.ReadAt(p, off) }
func (f inline) WriteAt(p []byte, off int64) (int, error) { return f.d.WriteAt(p, off) }

func (f inline) TryReadAt(p []byte, off int64) error {
	_, err := f.d.ReadAt(p, off)
	return err
}

func (f inline) TryWriteAt(p []byte, off int64) error {
	_, err := f.d.WriteAt(p, off)
	return err
}
