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

	"mica/daemon/api"
	"mica/daemon/config"
	"mica/engine/user"
	"mica/export"
	"mica/export/holder"
	"mica/layer"
	"mica/lvm"
)

// Options of Run.
type Options struct {
	Config     config.Config
	ConfigFile string // that was read; empty: none
	Version    string
	// Exe starts this program in another role: Exe followed by "holder SOCKET", "helper",
	// "helper loop" or "helper exports".
	Exe []string
	Log *slog.Logger
	// AcceptPool serves a pool and a catalog that are not of the same moment, because one of them
	// was restored from a copy: see layer.Options.AcceptPool.
	AcceptPool bool
	// HostEnds tells that the host is shutting down; nil: process 1 tells.
	HostEnds func() bool
	// Ready, if not nil, is called when the API answers, with what there is to say about it.
	Ready func(socket string, notes []string)
}

// holderSocket is the holder's socket in RUN.
const holderSocket = "holder.sock"

// Time limits of the end.
const (
	endOperations = 20 * time.Second // for long work to be undone
	endRequests   = 5 * time.Second  // for requests to be answered
)

// A daemon is what Run keeps: the parts from the bottom up, closed in the reverse order.
type daemon struct {
	o       Options
	c       config.Config
	log     *slog.Logger
	started time.Time
	loc     user.Location
	memory  int64 // limit in bytes

	locks    []*os.File
	volume   *lvm.Pool // under the pool, or nil
	pool     *opened
	exporter *export.Auto
	nbd      *nbdServer
	store    *layer.Store
	backups  *backups
	hub      *hub
	ops      *operations
	server   *server

	sockets    *sockets
	containerd *containerdEnd

	ctx    context.Context // of the background; cancelled by close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	quit   chan struct{} // closed by the shutdown request
	once   sync.Once
}

// Run is the daemon's life. It returns nil after ctx was cancelled or a shutdown was asked for
// and everything was closed in order; otherwise the reason why it could not start or end.
func Run(ctx context.Context, o Options) (err error) {
	d := &daemon{o: o, c: o.Config, log: o.Log, started: time.Now(), quit: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	if d.sockets, err = activatedSockets(os.Getenv); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.open(ctx); err != nil {
		return err
	}
	l, err := d.sockets.listen(d.path(api.SocketName), d.c.API.Group)
	if err != nil {
		return err
	}
	for _, path := range d.sockets.close() {
		d.log.Warn("the service manager listens on a socket that is none of ours", "socket", path, "run", d.c.Run)
	}
	return d.serve(ctx, l)
}

// open opens the parts from the bottom up.
func (d *daemon) open(ctx context.Context) error {
	if err := d.directories(); err != nil {
		return err
	}
	if err := d.lock(ctx); err != nil {
		return err
	}
	var err error
	if d.volume, err = openVolume(ctx, &d.c, d.log); err != nil {
		return err
	}
	d.loc = poolLocation(d.c.Root, d.c.Pool)
	if d.pool, err = openPool(ctx, d.loc, d.c, d.log); err != nil {
		return err
	}
	st, err := d.pool.Status(ctx)
	if err != nil {
		return err
	}
	d.memory = limitMemory(d.c.Limits, st.DataBlocks)
	d.hub = newHub(d.c.Limits.Events, time.Now)
	d.ops = newOperations(d.c.Limits.Operations, d.hub)
	helper := append(append([]string{}, d.o.Exe...), "helper")
	if d.exporter, err = newExporter(exportOptions{
		kind: d.c.Exports.Kind, engine: st.Engine, run: d.c.Run, links: d.c.Exports.LinkDir,
		holder: d.path(holderSocket), exe: d.o.Exe, log: d.log,
	}); err != nil {
		return err
	}
	if d.nbd, err = startNBD(d.c.Run, d.c.NBD, d.log); err != nil {
		return err
	}
	d.store, err = layer.Open(ctx, layer.Options{
		Root: d.c.Root, Run: d.c.Run, Pool: d.pool.Pool, Exporter: refuseOutside(d.exporter), NBD: d.nbd,
		BaseSize: int64(d.c.Containers.BaseSize), FSType: d.c.Containers.FileSystem,
		MountOptions: d.c.Containers.MountOptions, Discard: d.c.Containers.Discard,
		HelperCommand: helper, HelperTimeout: time.Duration(d.c.Limits.HelperTimeout), StallTimeout: time.Duration(d.c.Limits.StallTimeout),
		Limits:     layerLimits(d.c.Images),
		AcceptPool: d.o.AcceptPool, Logger: d.log,
	})
	if err != nil {
		return err
	}
	if d.pool.sweep != nil {
		d.pool.sweep()
	}
	d.backups = newBackups(d.pool, d.loc, d.c.Root, d.c.Backup, d.log,
		func(kind, object, detail string) { d.hub.publish(kind, object, detail, time.Time{}) })
	im := &importer{store: d.store, spool: filepath.Join(d.c.Root, "spool"), c: d.c.Images}
	d.server = newServer(parts{
		store: d.store, pool: d.pool.Pool,
		importFile: im.file, importStream: im.stream,
		check:      d.pool.check,
		stall:      time.Duration(d.c.Limits.StallTimeout),
		busy:       nodeUsers,
		addDevices: d.addDevices(),
		describe:   d.describe, describePool: d.describePool, backups: d.backups,
		nbdTCP: func() bool { return d.nbd.address != "" },
		quit:   func() { d.once.Do(func() { close(d.quit) }) },
		snaps:  d.store,
		calls:  func() []callStat { return d.containerd.calls.list() },
	}, d.hub, d.ops, d.log)
	d.background()
	d.containerd, err = startContainerd(d.c.Run, d.c.Containerd, d.store, d.sockets, d.log)
	return err
}

func (d *daemon) path(name string) string { return filepath.Join(d.c.Run, name) }

// lock takes RUN and ROOT for this daemon.
func (d *daemon) lock(ctx context.Context) error {
	me := owner{PID: os.Getpid(), Root: d.c.Root, Run: d.c.Run}
	for _, dir := range []string{d.c.Run, d.c.Root} {
		f, err := lockDir(ctx, dir, me, dying, d.rescue)
		if err != nil {
			return err
		}
		d.locks = append(d.locks, f)
		if d.c.Run == d.c.Root {
			break
		}
	}
	return nil
}

// background starts what runs beside the requests.
func (d *daemon) background() {
	poke := make(chan struct{}, 1)
	d.wg.Go(func() { d.carryPoolEvents(poke) })
	d.wg.Go(d.carryStoreEvents)
	ends := d.o.HostEnds
	if ends == nil {
		ends = hostEnds
	}
	d.wg.Go(func() { d.watchHostEnd(ends) })
	x := &extender{pool: d.pool.Pool, c: d.c.AutoExtend, volume: d.volumeExtender(), log: d.log,
		host: func() (int64, int64, bool) { return hostSpace(d.loc.DataPath()) },
		tell: func(kind, object, detail string) { d.hub.publish(kind, object, detail, time.Time{}) }}
	d.wg.Go(func() { x.run(d.ctx, poke) })
	d.wg.Go(func() { d.backups.run(d.ctx) })
}

// carryPoolEvents brings the pool's events into the hub, and wakes the extender.
func (d *daemon) carryPoolEvents(poke chan<- struct{}) {
	events, cancel := d.pool.Events()
	defer cancel()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return
			}
			d.log.Warn("pool", "event", e.Kind, "detail", e.Detail)
			d.hub.publish(string(e.Kind), "pool", e.Detail, time.Time{})
			select {
			case poke <- struct{}{}:
			default:
			}
		case <-d.ctx.Done():
			return
		}
	}
}

// carryStoreEvents brings the store's events into the hub.
func (d *daemon) carryStoreEvents() {
	events, cancel := d.store.Events(1) // with those of its opening
	defer cancel()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return
			}
			d.hub.publish(e.Kind, e.Object, e.Detail, e.Time)
		case <-d.ctx.Done():
			return
		}
	}
}

// serve answers requests until the end is asked for.
func (d *daemon) serve(ctx context.Context, l net.Listener) error {
	h := newHTTPServer(d.server, d.server.limits, d.log)
	failed := make(chan error, 1)
	go func() { failed <- h.Serve(&fewListener{Listener: l, max: int64(d.server.limits.conns), log: d.log}) }()
	d.hub.publish(api.EventStart, "daemon", fmt.Sprintf("process %d", os.Getpid()), time.Time{})
	if err := notify("READY=1"); err != nil {
		d.log.Warn("the service manager could not be told", "error", err)
	}
	if d.o.Ready != nil {
		d.o.Ready(l.Addr().String(), d.notes())
	}
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	case <-d.quit:
	}
	notify("STOPPING=1")
	d.server.closing.Store(true)
	d.hub.publish(api.EventStop, "daemon", fmt.Sprintf("process %d", os.Getpid()), time.Time{})
	octx, cancel := context.WithTimeout(context.Background(), endOperations)
	defer cancel()
	err = errors.Join(err, d.ops.close(octx))
	d.hub.close()
	hctx, cancel := context.WithTimeout(context.Background(), endRequests)
	defer cancel()
	if h.Shutdown(hctx) != nil {
		h.Close() // what still reads is cut off
	}
	return err
}

// close closes the parts that are open, from the top down. What is attached stays with the
// holder.
func (d *daemon) close() error {
	d.cancel()
	d.wg.Wait()
	var errs []error
	add := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", what, err))
		}
	}
	if d.ops != nil {
		octx, cancel := context.WithTimeout(context.Background(), endOperations)
		defer cancel()
		add("operations", d.ops.close(octx))
	}
	if d.containerd != nil {
		d.containerd.close()
	}
	d.sockets.close()
	select {
	case <-d.quit:
	default:
		d.logHolders()
	}
	if d.store != nil {
		add("store", d.store.Close()) // and what it serves with the two below
	}
	if d.nbd != nil {
		add("nbd server", d.nbd.close())
	}
	if d.exporter != nil {
		add("exports", d.exporter.Close())
	}
	if d.backups != nil {
		d.backups.end()
	}
	if d.pool != nil {
		add("pool", d.pool.Close())
	}
	select {
	case <-d.quit:
		d.endHolder()
	default:
	}
	for _, f := range d.locks {
		f.Close()
	}
	return errors.Join(errs...)
}

// endHolder lets the holder go when everything is detached. It would end by itself a little
// later.
func (d *daemon) endHolder() {
	c, err := holder.Dial(d.path(holderSocket))
	if err != nil {
		return
	}
	defer c.Close()
	if err := c.Quit(false); err != nil && !errors.Is(err, holder.ErrGone) {
		d.log.Warn("the holder goes on", "error", err)
	}
}
