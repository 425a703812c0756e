package catalog

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// Conditions that callers branch on.
var (
	// ErrNoRecord: there is no record of that name.
	ErrNoRecord = errors.New("no such record")
	// ErrReadOnly: the catalog was opened read-only, or a write of it failed for good.
	ErrReadOnly = dev.ErrReadOnly
	// ErrClosed: the catalog was closed.
	ErrClosed = errors.New("catalog closed")
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("catalog is open in another process")
)

// FirstID is the lowest device id that is handed out.
const FirstID thin.DevID = 1 << 16

// reserveBatch is how many ids one reservation takes at least.
const reserveBatch = 64

// A Pool is what the catalog asks of the pool. Every call is durable when it returns.
type Pool interface {
	CreateThin(ctx context.Context, id thin.DevID) error
	CreateSnaps(ctx context.Context, pairs []engine.SnapPair) error
	Delete(ctx context.Context, id thin.DevID) error
	SetTransactionID(ctx context.Context, old, next uint64) error
	Devices(ctx context.Context) ([]thin.DeviceInfo, error)
	Status(ctx context.Context) (engine.Status, error)
}

// A stepPool makes snapshots and sets the transaction id in one commit, all or nothing.
type stepPool interface {
	CreateSnapsAt(ctx context.Context, pairs []engine.SnapPair, old, next uint64) error
}

// Options say how a catalog is opened.
type Options struct {
	Path string
	Pool Pool
	// LockWait is how long to wait for another process that has the file open (10 s if 0).
	LockWait time.Duration
	// AcceptPool takes over the pool's transaction id whatever it is; intents are dropped and
	// nothing is deleted.
	AcceptPool bool
	// HoldDeletes: the background queue deletes nothing before StartDeletes.
	HoldDeletes bool
	Logger      *slog.Logger
	// OnDeleted is told of every removal that is through. It must not call the catalog.
	OnDeleted func(Removal)
	// Fault, if not nil, is called at named points. An error there is a crash: the catalog does
	// nothing more, as if the process had died. For tests.
	Fault func(point string) error

	lastID thin.DevID // the last id that may be handed out, for tests; 0: thin.MaxDevID
}

// A Catalog is one open catalog. Safe for concurrent use.
//
// Goroutines: commitLoop makes all changes of the file; deleteLoop and its workers delete
// devices. Close stops both and waits.
type Catalog struct {
	db      *bbolt.DB
	pool    Pool
	o       Options
	log     *slog.Logger
	storeID string
	room    room

	ctx    context.Context // background work; cancelled by Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // commitLoop has work
	delete chan struct{} // deleteLoop has work

	mu       sync.Mutex
	readOnly error                    // why nothing may change; guarded by mu
	closed   bool                     // guarded by mu
	txid     uint64                   // as committed in the file and set in the pool; guarded by mu
	next     thin.DevID               // where the search for free ids goes on; guarded by mu
	taken    map[thin.DevID]struct{}  // records, intents, reservations, foreign devices; guarded by mu
	free     []thin.DevID             // reserved, not in use; guarded by mu
	held     map[thin.DevID]struct{}  // reserved, in use by an operation; guarded by mu
	broken   map[string]string        // ref -> why; guarded by mu
	queue    []*request               // guarded by mu
	dels     map[thin.DevID]*deletion // guarded by mu
	delDone  *sync.Cond               // a deletion changed its state; uses mu
	// holdDeletes: see Options; guarded by mu
	holdDeletes bool
	resMu       chan struct{} // one reservation at a time

	coming  int           // steps that Expect told of and that are not in the queue yet; guarded by mu
	arrived chan struct{} // one of them is, or will not come
	// gatherLimit is the constant, but in tests; guarded by mu
	gatherLimit time.Duration
}

// Open opens the catalog at o.Path, or makes one, and brings it into step with the pool. Where
// the two are not of the same moment it opens read-only (see ReadOnly).
func Open(ctx context.Context, o Options) (*Catalog, error) {
	if o.LockWait == 0 {
		o.LockWait = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.lastID == 0 {
		o.lastID = thin.MaxDevID
	}
	if err := makeFile(o.Path); err != nil {
		return nil, fmt.Errorf("catalog %s: %w", o.Path, err)
	}
	var file *os.File
	db, err := bbolt.Open(o.Path, 0o600, &bbolt.Options{
		Timeout: o.LockWait, InitialMmapSize: 64 << 20, FreelistType: bbolt.FreelistMapType,
		OpenFile: func(path string, _ int, _ os.FileMode) (f *os.File, err error) {
			file, err = openFile(path, o.LockWait)
			return file, err
		},
	})
	if err != nil {
		return nil, fmt.Errorf("catalog %s: %w", o.Path, err)
	}
	dropUnfinished(o.Path)
	c := &Catalog{
		db: db, pool: o.Pool, o: o, log: o.Logger, room: room{f: file},
		wake: make(chan struct{}, 1), delete: make(chan struct{}, 1),
		taken: map[thin.DevID]struct{}{}, held: map[thin.DevID]struct{}{},
		broken: map[string]string{}, dels: map[thin.DevID]*deletion{},
		resMu: make(chan struct{}, 1), holdDeletes: o.HoldDeletes, arrived: make(chan struct{}, 1), gatherLimit: gatherLimit,
	}
	c.delDone = sync.NewCond(&c.mu)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := c.recover(ctx); err != nil {
		c.cancel()
		db.Close()
		return nil, err
	}
	if err := c.makeRoom(); err != nil {
		c.log.Warn("no room for a new object in the catalog", "catalog", o.Path, "err", err)
	}
	c.wg.Add(2)
	go c.commitLoop()
	go c.deleteLoop()
	return c, nil
}

// initialize makes the buckets of a new file. The pool's transaction id is taken as it is.
func initialize(tx *bbolt.Tx, txid uint64) error {
	var id [8]byte
	if _, err := rand.Read(id[:]); err != nil {
		return err
	}
	for _, b := range [][]byte{bucketObjects, bucketReserved, bucketRemovals, bucketMeta} {
		if _, err := tx.CreateBucket(b); err != nil {
			return err
		}
	}
	m := tx.Bucket(bucketMeta)
	for k, v := range map[string]uint64{string(keyTxID): txid, string(keyNext): uint64(FirstID), string(keySeq): 0} {
		if err := putUint(m, []byte(k), v); err != nil {
			return err
		}
	}
	if err := m.Put(keyStoreID, []byte(hex.EncodeToString(id[:]))); err != nil {
		return err
	}
	return m.Put(keySchema, []byte(schemaVersion))
}

// StoreID names this catalog: 16 hex digits, another for every file ever made.
func (c *Catalog) StoreID() string { return c.storeID }

// TransactionID is the last committed one.
func (c *Catalog) TransactionID() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.txid
}

// ReadOnly returns why the catalog does not accept changes, or nil. The error is ErrReadOnly.
func (c *Catalog) ReadOnly() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.readOnly
}

// Broken returns why a record cannot be used: its device, or one that it was made from, is
// missing. Empty if it can.
func (c *Catalog) Broken(ref string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken[ref]
}

// AllBroken returns all broken records with the reasons.
func (c *Catalog) AllBroken() map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := make(map[string]string, len(c.broken))
	for k, v := range c.broken {
		m[k] = v
	}
	return m
}

// Reserved counts ids that are reserved for the next objects.
func (c *Catalog) Reserved() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.free) + len(c.held)
}

// View reads records as of one commit. fn must not block: it holds back the reuse of pages.
func (c *Catalog) View(fn func(*Tx) error) error {
	err := c.db.View(func(tx *bbolt.Tx) error { return fn(&Tx{tx: tx}) })
	if errors.Is(err, bberrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// Foreign lists the pool's devices that no record and no intent names.
func (c *Catalog) Foreign(ctx context.Context) ([]thin.DeviceInfo, error) {
	devs, err := c.pool.Devices(ctx)
	if err != nil {
		return nil, err
	}
	known := map[thin.DevID]bool{}
	err = c.db.View(func(tx *bbolt.Tx) error { return collectKnown(tx, known) })
	if err != nil {
		return nil, err
	}
	var out []thin.DeviceInfo
	for _, d := range devs {
		if !known[d.ID] {
			out = append(out, d)
		}
	}
	return out, nil
}

// collectKnown collects the devices that records and intents name.
func collectKnown(tx *bbolt.Tx, known map[thin.DevID]bool) error {
	t := &Tx{tx: tx}
	if err := t.all(func(r Record) error {
		if r.Device != 0 {
			known[r.Device] = true
		}
		return nil
	}); err != nil {
		return err
	}
	for _, b := range [][]byte{bucketReserved, bucketRemovals} {
		err := tx.Bucket(b).ForEach(func(k, _ []byte) error {
			id, err := parseID(k)
			known[id] = true
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// setReadOnly stops all changes for good; the first reason stays.
func (c *Catalog) setReadOnly(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readOnly == nil {
		c.readOnly = fmt.Errorf("catalog %s: %w: %w", c.o.Path, ErrReadOnly, err)
		c.delDone.Broadcast()
	}
}

// fault is a named point at which a test may crash the catalog.
func (c *Catalog) fault(point string) error {
	if c.o.Fault == nil {
		return nil
	}
	if err := c.o.Fault(point); err != nil {
		c.setReadOnly(fmt.Errorf("%s: %w", point, err))
		return err
	}
	return nil
}

// Close stops background work and closes the file. Ids that are reserved and not in use are
// given back, so that nothing made by others while the catalog is closed can have an id that
// an intent names. Operations must be over.
func (c *Catalog) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.delDone.Broadcast()
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
	var err error
	if c.ReadOnly() == nil {
		err = c.closeClean()
	}
	if e := c.db.Close(); err == nil {
		err = e
	}
	return err
}

func (c *Catalog) closeClean() error {
	c.mu.Lock()
	free := append([]thin.DevID(nil), c.free...)
	c.mu.Unlock()
	return c.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketReserved)
		for _, id := range free {
			if err := b.Delete(idKey(id)); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keyClean, []byte("1"))
	})
}
