package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mica/engine"
	"mica/layer/archive"
	"mica/layer/catalog"
	"mica/layer/helper"
	"mica/thin"
)

// A Store is one opened layer store. It implements API. Safe for concurrent use.
//
// Goroutines, all ended by Close: the catalog's; expireLoop (containers whose time is over, and
// detaches that wait for somebody); baseLoop until the base is made; one for each attachment,
// which notices when its node is taken away; short ones that put away what an operation made.
//
// Lock order: the names of locks, then Store.mu, a leaf under which nothing waits.
type Store struct {
	o       Options
	log     *slog.Logger
	pool    engine.Pool
	cat     *catalog.Catalog
	files   fileSystems
	locks   locks
	hub     *hub
	block   int64  // data block size in bytes
	boot    string // boot id
	freezes string // directory of freeze records

	ctx    context.Context // background work; cancelled by Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // expireLoop has work

	base baseState

	mu       sync.Mutex
	closed   bool                 // guarded by mu
	live     map[string]*live     // attachment id -> what is exported; guarded by mu
	views    map[thin.DevID]*view // read-only exports for diffs; guarded by mu
	refs     map[string]int       // ref -> how many records were made from it; guarded by mu
	leases   map[string]int       // chain id -> imports and operations that need it; guarded by mu
	children map[string]int       // container -> snapshots; guarded by mu
	expiries map[string]expiry    // container -> when; guarded by mu
	leaving  map[thin.DevID]*leaving
	viewers  map[thin.DevID]int      // device -> views that share its export; guarded by mu
	idle     map[thin.DevID]*leaving // shared exports without views, still in use; guarded by mu
	workSeq  uint64                  // guarded by mu
	tasks    int                     // background work that WaitQueue waits for; guarded by mu
}

var _ API = (*Store)(nil)

// fileSystems is the work that is done by helpers.
type fileSystems interface {
	Mkfs(ctx context.Context, node, fstype, uuid string) error
	Apply(ctx context.Context, node, fstype string, trim bool, r io.Reader) (helper.Stats, error)
	Diff(ctx context.Context, lower, upper, fstype string, changed []archive.InodeRange, w io.Writer) (helper.Stats, error)
	Replay(ctx context.Context, node, fstype string) error
	Grow(ctx context.Context, node, fstype string) error
	Trim(ctx context.Context, node, fstype string) (int64, error)
	Thaw(ctx context.Context, node, fstype string) (helper.State, error)
	FreezeNode(ctx context.Context, node, fstype, record string) (*helper.Frozen, error)
}

// Open opens the store of a pool: it brings catalog and pool into step, goes on serving what a
// predecessor left attached, thaws what it left frozen, deletes what unfinished operations and
// removals left, and makes the base in the background if there is none.
//
// If catalog and pool are not of the same moment, the store opens read-only (Status.ReadOnly).
func Open(ctx context.Context, o Options) (*Store, error) {
	return open(ctx, o, nil, nil)
}

func open(ctx context.Context, o Options, files fileSystems, fault func(string) error) (_ *Store, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	s := &Store{
		o: o, log: o.Logger, pool: o.Pool, files: files, hub: newHub(), wake: make(chan struct{}, 1),
		live: map[string]*live{}, views: map[thin.DevID]*view{}, refs: map[string]int{},
		leases: map[string]int{}, children: map[string]int{}, expiries: map[string]expiry{},
		leaving: map[thin.DevID]*leaving{}, viewers: map[thin.DevID]int{}, idle: map[thin.DevID]*leaving{},
		boot: bootID(),
	}
	s.base.ready = make(chan struct{})
	st, err := o.Pool.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	s.block = st.BlockSize
	mounts := filepath.Join(o.Run, "mnt")
	s.freezes = filepath.Join(o.Run, "freeze")
	for _, dir := range []string{o.Root, mounts, s.freezes} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("layer store: %w", err)
		}
	}
	if s.files == nil {
		s.files = &helper.Client{Command: o.HelperCommand, Dir: mounts, Timeout: o.HelperTimeout, Stall: o.StallTimeout, Limits: o.Limits}
	}
	s.cat, err = catalog.Open(ctx, catalog.Options{
		Path: o.Catalog, Pool: o.Pool, AcceptPool: o.AcceptPool, HoldDeletes: true, Logger: o.Logger,
		OnDeleted: s.onDeleted, Fault: fault,
	})
	if err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if err := s.index(); err != nil {
		return nil, err
	}
	if _, err := s.findBase(); errors.Is(err, ErrNotFound) {
		if err := checkBase(o.FSType, o.BaseSize); err != nil {
			return nil, err
		}
	}
	if err := s.reattach(ctx); err != nil {
		return nil, err
	}
	if s.cat.ReadOnly() == nil {
		s.cat.StartDeletes()
		s.collectAll()
		s.wg.Add(2)
		go s.baseLoop()
		go s.expireLoop()
	} else {
		s.base.fail(s.cat.ReadOnly())
	}
	return s, nil
}

func (o *Options) check() error {
	if o.Pool == nil || o.Exporter == nil {
		return errors.New("layer store: no pool or no exporter")
	}
	if o.Root == "" || o.Run == "" {
		return errors.New("layer store: no root or run directory")
	}
	if o.Catalog == "" {
		o.Catalog = filepath.Join(o.Root, "catalog.db")
	}
	if o.BaseSize == 0 {
		o.BaseSize = DefaultBaseSize
	}
	if err := checkSize(o.BaseSize); err != nil {
		return fmt.Errorf("base: %w", err)
	}
	if o.FSType == "" {
		o.FSType = "ext4"
	}
	if o.FSType != "ext4" && o.FSType != "xfs" {
		return fmt.Errorf("%w file system %q: want ext4 or xfs", ErrInvalid, o.FSType)
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// bootID tells one boot of the host from another.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// index reads from the catalog what is kept in memory.
func (s *Store) index() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cat.View(func(tx *catalog.Tx) error {
		for _, kind := range []string{kindLayer, kindImage, kindContainer, kindSnapshot} {
			err := tx.Each(kind, "", "", func(r catalog.Record) (bool, error) {
				s.refs[r.Parent]++
				switch kind {
				case kindContainer:
					c, err := decode[containerBody](r)
					if err != nil {
						return false, err
					}
					if c.body.Expires != nil {
						s.expiries[r.Key] = expiry{at: *c.body.Expires}
					}
				case kindSnapshot:
					name, _, _ := strings.Cut(r.Key, "/")
					s.children[name]++
				}
				return true, nil
			})
			if err != nil {
				return err
			}
		}
		return s.indexSnapsLocked(tx)
	})
}

// wrap gives errors of the catalog this package's sentinels.
func (s *Store) wrap(err error) error {
	if errors.Is(err, catalog.ErrClosed) {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w for the catalog: %w", ErrNoSpace, err)
	}
	return err
}

// step carries out one change of pool and catalog. created and dropped are the records that come
// and go, for what is counted in memory.
func (s *Store) step(ctx context.Context, st catalog.Step, created, dropped []catalog.Record) error {
	if err := s.cat.Do(ctx, st); err != nil {
		return s.wrap(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range created {
		if r.Parent != "" {
			s.refs[r.Parent]++
		}
		if name, _, ok := strings.Cut(r.Key, "/"); ok && r.Kind == kindSnapshot {
			s.children[name]++
		}
	}
	for _, r := range dropped {
		if r.Parent != "" {
			if s.refs[r.Parent]--; s.refs[r.Parent] <= 0 {
				delete(s.refs, r.Parent)
			}
		}
		if name, _, ok := strings.Cut(r.Key, "/"); ok && r.Kind == kindSnapshot {
			if s.children[name]--; s.children[name] <= 0 {
				delete(s.children, name)
			}
		}
		if r.Kind == kindContainer {
			delete(s.expiries, r.Key)
		}
	}
	return nil
}

// writable returns why the store does not accept changes.
func (s *Store) writable() error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return ErrClosed
	}
	return s.cat.ReadOnly()
}

// newID makes an id for an object and its attachment, inside a step: the store's id and a number
// that never comes again.
func (s *Store) newID(tx *catalog.Tx) (string, error) {
	n, err := tx.Seq()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s-%d", s.prefix(), n), nil
}

// prefix begins the names of this store's attachments; other stores on the host have others.
func (s *Store) prefix() string { return s.cat.StoreID()[:8] }

// Close stops background work and closes the exporter, then the devices: requests must be over
// before their device closes. Attachments stay with the exporter's holder for a successor. The
// pool is the caller's to close.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	if s.cancel != nil {
		s.cancel()
	}
	s.wg.Wait()
	err := s.closeExports()
	if e := s.cat.Close(); err == nil {
		err = e
	}
	s.hub.close()
	return err
}

// short is a context for putting things away: the caller's may be over.
func (s *Store) short(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
}

// onDeleted hears of every device whose removal is through.
func (s *Store) onDeleted(m catalog.Removal) { s.hub.emit(EventDeleted, m.Object, "") }
