package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"mica/daemon/config"
	"mica/layer"
	"mica/snapshotter"
)

// Sockets in RUN for containerd.
const (
	snapshotterSocket = "snapshotter.sock" // of further ones: snapshotter-NAME.sock
	diffSocket        = "diff.sock"
)

// containerdEnd is what containerd is offered: a socket for each snapshotter, and one for the
// differ.
type containerdEnd struct {
	log      *slog.Logger
	socks    *sockets
	calls    callStats
	contents *snapshotter.Contents
	sns      []*snapshotter.Snapshotter
	servers  []*snapshotter.Server
	wg       sync.WaitGroup
	once     sync.Once
}

// startContainerd listens for containerd.
func startContainerd(run string, c config.Containerd, store *layer.Store, socks *sockets, log *slog.Logger) (_ *containerdEnd, err error) {
	e := &containerdEnd{log: log, socks: socks}
	if !c.Enabled {
		return e, nil
	}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	all := map[string]config.Snapshotter{config.DefaultSnapshotter: {MountOptions: c.MountOptions, GuestOwned: c.GuestOwned}}
	for name, sn := range c.Snapshotters {
		all[name] = sn
	}
	for name, o := range all {
		sn, err := snapshotter.New(snapshotter.Options{Name: name, Store: store, MountOptions: o.MountOptions,
			GuestOwned: o.GuestOwned, ShareLayers: c.ShareLayers, Logger: log.With("snapshotter", name)})
		if err != nil {
			return nil, err
		}
		e.sns = append(e.sns, sn)
		socket := snapshotterSocket
		if name != config.DefaultSnapshotter {
			socket = "snapshotter-" + name + ".sock"
		}
		if err := e.serve(filepath.Join(run, socket), e.server(name, snapshotter.ServerOptions{Snapshotter: sn})); err != nil {
			return nil, fmt.Errorf("snapshotter %s: %w", name, err)
		}
	}
	if e.contents, err = snapshotter.DialContents(c.Address); err != nil {
		return nil, err
	}
	differ := snapshotter.NewDiffer(store, e.contents.Of, log)
	if err := e.serve(filepath.Join(run, diffSocket), e.server("diff", snapshotter.ServerOptions{Diff: differ})); err != nil {
		return nil, fmt.Errorf("diff service: %w", err)
	}
	return e, nil
}

// server makes one whose calls are counted under a name.
func (e *containerdEnd) server(name string, o snapshotter.ServerOptions) *snapshotter.Server {
	o.UID, o.Logger = os.Geteuid(), e.log
	o.Observe = func(method, code string, took time.Duration) { e.calls.observe(name, method, code, took) }
	return snapshotter.NewServer(o)
}

func (e *containerdEnd) serve(path string, srv *snapshotter.Server) error {
	l, err := e.socks.listen(path, "")
	if err != nil {
		return err
	}
	e.servers = append(e.servers, srv)
	e.wg.Go(func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, net.ErrClosed) {
			e.log.Error("socket for containerd", "socket", path, "err", err)
		}
	})
	return nil
}

// close lets calls end that are under way and takes the sockets away.
func (e *containerdEnd) close() {
	e.once.Do(func() {
		var wg sync.WaitGroup
		for _, srv := range e.servers {
			wg.Go(func() { srv.Stop(endRequests) })
		}
		wg.Wait()
		for _, sn := range e.sns {
			sn.Close()
		}
		e.wg.Wait()
		if e.contents != nil {
			e.contents.Close()
		}
	})
}

// snapNodes are the nodes of containerd's snapshots, for a shutdown.
type snapNodes interface {
	SnapNodes() []layer.SnapNode
	DetachSnaps(ctx context.Context) (busy []string, err error)
}

// snapHolders names who still uses the nodes of snapshots at a deadline.
func (s *server) snapHolders(ctx context.Context, deadline time.Time) []string {
	if s.snaps == nil {
		return nil
	}
	var holders []string
	for _, n := range s.snaps.SnapNodes() {
		for _, who := range s.lastingUsers(ctx, n.Node, deadline) {
			holders = append(holders, n.Object+": "+who)
		}
	}
	return holders
}
