package user

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/journal"
	"mica/thin"
)

// Options are the properties of an opened pool. The zero value is a pool as the kernel opens
// it by default.
type Options struct {
	ReadOnly          bool
	SkipBlockZeroing  bool // a new block shows what the data device held, beside what is written
	NoDiscardPassdown bool // freed blocks are not punched or discarded on the data device
	// ErrorIfNoSpace fails writes that need a block when there is none. Otherwise they wait, at
	// most NoSpaceTimeout (0: 60 s, negative: for ever) and at most MaxWaiters (0: 96) of one
	// device at a time.
	ErrorIfNoSpace bool
	NoSpaceTimeout time.Duration
	MaxWaiters     int
	LowWaterMark   uint64        // free data blocks at which an event is sent; 0: none
	CommitInterval time.Duration // 0: 1 s
	MaxPending     int           // pending mappings that start a commit; 0: 16384
	// TableCacheBytes bounds the lookup tables of all devices (0: 128 MiB); MetaCacheBytes the
	// cache of metadata blocks (0: 32 MiB).
	TableCacheBytes int64
	MetaCacheBytes  int64
	LockWait        time.Duration // how long Open waits for a dying predecessor; 0: 10 s
	Logger          *slog.Logger  // nil: slog.Default

	// A pool opened for writing by Open keeps a journal in memory, so that nothing acknowledged is
	// lost when only the process dies. NoJournal goes without, JournalOptional does so where there
	// is no place for one; what an earlier opener has left is taken over all the same.
	// JournalBytes is its length (0: 4 MiB), JournalDirs are places instead of the usual ones.
	NoJournal       bool
	JournalOptional bool
	JournalBytes    int64
	JournalDirs     []string

	// Exports, if not nil, says where its process leaves devices to its successor. A pool of which
	// another one has left any is refused (ErrExported), unless it is opened read-only.
	Exports *Exports

	step func(name string) // for tests: called between the steps of a commit and of a takeover

	compactAt uint32 // for tests: see makeTime; 0: compactAt
}

// defaultJournal holds twice the changes that may be pending, in each of its two generations.
const defaultJournal = 4 << 20

func (o *Options) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.NoSpaceTimeout, 60*time.Second)
	def(&o.CommitInterval, time.Second)
	def(&o.LockWait, 10*time.Second)
	if o.MaxWaiters == 0 {
		o.MaxWaiters = 96
	}
	if o.JournalBytes == 0 {
		o.JournalBytes = defaultJournal
	}
	if o.MaxPending == 0 {
		o.MaxPending = 16384
	}
	if o.TableCacheBytes == 0 {
		o.TableCacheBytes = 128 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
}

// A Pool is one opened pool, with its data path in this process. It implements engine.Pool.
// Safe for concurrent use; the package comment has the lock order and the goroutines.
type Pool struct {
	opts   Options
	log    *slog.Logger
	meta   *thin.Metadata
	metaD  dev.Device
	data   *data
	bs     int64  // bytes of a data block
	onDone func() // after Close, may be nil

	readOnly bool // nothing may change: opened so, or needs_check

	journal   *journal.Journal // immutable after New; nil: none
	taken     taken            // immutable after New: what became of an earlier opener's journal
	committed journal.State    // the superblock on the medium; of whoever runs a commit
	forget    func() error     // takes the note about exports away; immutable after Open, may be nil

	applyMu sync.Mutex
	dropped []thin.DataBlock // guarded by applyMu: reserved blocks that the next commit lets go

	dirtyMu   sync.Mutex
	dirtyDevs []*device // guarded by dirtyMu: devices with pending entries, and perhaps others

	commits     commits
	release     release
	space       space
	events      engine.Events
	cache       leafCache
	zeroMaps    zeroMaps
	copies      chan []byte  // buffers for preparing blocks; their number is the limit
	pending     atomic.Int64 // changes that are admitted and not in a tree yet
	extentFree  atomic.Int64 // blocks in extents that nobody uses yet
	cursor      atomic.Uint64
	droppedAny  atomic.Bool   // dropped is not empty
	flushes     atomic.Uint64 // asked for, of all devices
	outOfSpace  atomic.Bool
	noMeta      atomic.Bool
	metaFlushes atomic.Uint64

	failOnce sync.Once
	failure  atomic.Pointer[error]
	unmarked atomic.Bool // the pool has failed, and needs_check could not be written

	trimMu sync.Mutex // held while a trim has free blocks reserved
	growMu sync.Mutex // one growth at a time

	compaction compaction

	stop  chan struct{}
	loops sync.WaitGroup

	mu       sync.Mutex
	devices  map[thin.DevID]*device  // guarded by mu: open ones
	deleting map[thin.DevID]struct{} // guarded by mu
	closed   bool                    // guarded by mu
}

var _ engine.Pool = (*Pool)(nil)

// New opens the pool on two devices, which are the pool's from then on, also when New fails.
// The pool must not be open anywhere else: Open takes the locks, New does not.
//
// A pool opened this way has no journal: nobody could find it again.
func New(metadata, dataDev dev.Device, o Options) (*Pool, error) {
	return openOn(metadata, dataDev, o, nil)
}

func openOn(metadata, dataDev dev.Device, o Options, where *journal.Identity) (_ *Pool, err error) {
	o.setDefaults()
	defer func() {
		if err != nil {
			metadata.Close()
			dataDev.Close()
		}
	}()
	m, err := thin.Open(metadata, thin.OpenOptions{CacheBytes: o.MetaCacheBytes, ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	bs := m.DataBlockSize()
	if have := uint64(dataDev.Size() / bs); have < m.DataBlocks() {
		return nil, fmt.Errorf("data device of %d bytes is too short: the pool has %d blocks of %d bytes",
			dataDev.Size(), m.DataBlocks(), bs)
	}
	p := &Pool{
		opts: o, log: o.Logger, meta: m, metaD: metadata, data: newData(dataDev, bs), bs: bs,
		readOnly: o.ReadOnly || m.NeedsCheck(),
		stop:     make(chan struct{}),
		devices:  map[thin.DevID]*device{}, deleting: map[thin.DevID]struct{}{},
	}
	p.commits.init()
	p.release.init()
	p.space.init()
	p.cache.limit = int(max(1, o.TableCacheBytes/leafBytes))
	p.zeroMaps.init(bs)
	p.initCopies()
	if where != nil {
		if err := p.openJournal(*where); err != nil {
			return nil, err
		}
	}
	if !p.readOnly {
		if err := p.data.findZero(0, m.DataBlocks()); err != nil {
			return nil, errors.Join(err, p.closeJournal(true))
		}
	}
	p.loops.Add(2)
	go p.commitLoop()
	go p.releaseLoop()
	return p, nil
}

// Metadata is the pool's metadata, for those who dump or check an open pool. Changes go through
// the pool only.
func (p *Pool) Metadata() *thin.Metadata { return p.meta }

// writable says why the pool does not accept changes, or nil.
func (p *Pool) writable() error {
	if err := p.failed(); err != nil {
		return fmt.Errorf("%w: %w", dev.ErrReadOnly, err)
	}
	if p.readOnly {
		if p.meta.NeedsCheck() {
			return fmt.Errorf("%w: the pool %w", dev.ErrReadOnly, thin.ErrNeedsCheck)
		}
		return fmt.Errorf("%w: the pool was opened read-only", dev.ErrReadOnly)
	}
	return nil
}

// openDevices lists the open devices, in no order.
func (p *Pool) openDevices() []*device {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*device, 0, len(p.devices))
	for _, d := range p.devices {
		list = append(list, d)
	}
	return list
}

// uncommitted reports whether a commit would have anything to do.
func (p *Pool) uncommitted() bool {
	if p.pending.Load() > 0 || p.droppedAny.Load() || p.meta.Changed() {
		return true
	}
	p.dirtyMu.Lock()
	defer p.dirtyMu.Unlock()
	return len(p.dirtyDevs) > 0
}

// Commit makes everything acknowledged so far durable and waits until what was freed can be
// used again.
func (p *Pool) Commit(ctx context.Context) error {
	if p.opts.ReadOnly {
		return nil
	}
	if err := p.commitNow(); err != nil {
		return err
	}
	p.release.wait()
	return nil
}

// Status looks at the pool. Pending mappings are brought into the trees first, in memory, so
// that the counts are those of now.
func (p *Pool) Status(ctx context.Context) (engine.Status, error) {
	if p.failed() == nil && !p.readOnly {
		p.applyMu.Lock()
		_ = p.applyAllLocked() // an error shows in the status
		p.applyMu.Unlock()
	}
	devs, err := p.meta.Devices()
	if err != nil {
		return engine.Status{}, err
	}
	sp := p.meta.Space()
	s := engine.Status{
		Engine: "user", Mode: p.mode().String(), NeedsCheck: p.meta.NeedsCheck(), BlockSize: p.bs,
		DataBlocks: sp.DataTotal, DataUsed: sp.DataUsed, DataReserved: sp.DataReserved, DataFreeing: sp.DataFreeing,
		MetaBlocks: sp.MetaTotal, MetaUsed: sp.MetaUsed,
		TransactionID: p.meta.TransactionID(), Time: p.meta.Time(), HeldRoot: p.meta.HeldRoot(), Devices: len(devs),
		LowWaterMark: p.opts.LowWaterMark, ErrorIfNoSpace: p.opts.ErrorIfNoSpace,
		Commits: p.commits.writes.Load(), DataFlushes: p.data.flushes.Load(), MetaFlushes: p.metaFlushes.Load(),
		HostBytes: -1, Journal: p.journalStatus(),
	}
	if err := p.failed(); err != nil {
		s.FailReason = err.Error()
	}
	p.space.mu.Lock()
	s.WaitingForSpace = p.space.waiting
	p.space.mu.Unlock()
	if h, ok := p.data.Device.(dev.HostByter); ok {
		if n, err := h.HostBytes(); err == nil {
			s.HostBytes = n
		}
	}
	return s, nil
}

func (p *Pool) mode() engine.Mode {
	p.space.mu.Lock()
	defer p.space.mu.Unlock()
	switch {
	case p.unmarked.Load():
		return engine.ModeFail
	case p.failed() != nil || p.readOnly:
		return engine.ModeReadOnly
	case p.noMeta.Load():
		return engine.ModeOutOfMetaSpace
	case p.space.out:
		return engine.ModeOutOfDataSpace
	}
	return engine.ModeWrite
}

// Events returns a channel of events from now on, after those of the open itself for the first who
// asks. It is closed by cancel or with the pool.
func (p *Pool) Events() (<-chan engine.Event, func()) { return p.events.Subscribe() }

// Close commits and closes the pool and its devices. ErrInUse while thin devices are open or
// being deleted. A failed pool closes too, with the reason of its failure.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	if n := len(p.devices) + len(p.deleting); n > 0 {
		p.mu.Unlock()
		return fmt.Errorf("close pool: %d thin devices are open or being deleted: %w", n, engine.ErrInUse)
	}
	p.closed = true
	p.mu.Unlock()

	var err error
	if !p.readOnly {
		if err = p.failed(); err == nil && p.uncommitted() {
			err = p.commitNow()
		}
		p.release.wait()
	}
	close(p.stop)
	p.loops.Wait()
	if p.forget != nil && !p.opts.Exports.Any() { // else they wait for a successor
		err = errors.Join(err, p.forget())
	}
	err = errors.Join(err, p.closeJournal(err == nil), p.meta.Close(), p.data.Close())
	p.events.Close()
	if p.onDone != nil {
		p.onDone()
	}
	return err
}
