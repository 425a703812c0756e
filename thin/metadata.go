package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/btree"
	"mica/pdata/spacemap"
	"mica/pdata/txn"
)

// Metadata is one opened metadata device. Safe for concurrent use.
//
// Durability: nothing is durable before the commit that follows it has written its superblock.
//
// A change that fails half-way (a block that cannot be read, no metadata block left) leaves the
// open transaction undefined: the metadata then refuses every later change and commit, and what
// is on the medium stays as of the last commit. Reads go on.
//
// Lock order, outermost first:
//
//	commitMu    one commit at a time; from Prepare to the end of WriteSuperblock
//	  mu        trees, devices, metadata space map; reads of metadata may happen under it
//	    Data    the data space map has its own lock; no I/O under it
type Metadata struct {
	d     dev.Device
	cache *block.Cache

	mu      sync.RWMutex // guards all down to failed
	tm      *txn.Manager
	meta    *spacemap.Meta
	data    *spacemap.Data
	top     *btree.Tree // device id -> root of its mapping tree; does not count on overwriting
	bottom  *btree.Tree // virtual block -> mapping
	details *btree.Tree
	sb      Superblock // of the open transaction
	devs    map[DevID]*device
	mapped  uint64             // mappings of all devices
	dirty   map[DevID]struct{} // devices whose details differ from the details tree
	changed bool               // the open transaction differs from the last closed one
	failed  error              // why changes are refused
	compact *Compaction        // under way, or nil

	commitMu  sync.Mutex
	committed []byte     // superblock block as it is on the medium; guarded by commitMu for writing, mu for the pointer
	csb       Superblock // decoded committed; guarded by mu

	promised atomic.Int64 // changes of mappings that CanAdmit has said yes to

	readOnly bool
}

type device struct {
	Details
	root block.Loc
	// newest is the highest time of any mapping, where known: it tells whether a snapshot has
	// to raise the pool's time.
	newest      uint32
	newestKnown bool
	compacted   bool // its mappings have the times of the compaction under way
}

// FormatOptions say what pool to make.
type FormatOptions struct {
	DataBlockSize int64  // bytes: 64 KiB to 1 GiB, a multiple of 64 KiB
	DataBlocks    uint64 // length of the data device in data blocks; may grow later
	Force         bool   // overwrite what is there
}

// MaxMetadataBytes is how much of a metadata device is used at most: 15.875 GiB.
const MaxMetadataBytes = spacemap.MaxMetaBlocks * block.Size

// Format writes the metadata of an empty pool. It refuses (ErrExists) a device whose first
// block is not all zeros, unless forced.
func Format(d dev.Device, o FormatOptions) error {
	if err := CheckBlockSize(o.DataBlockSize); err != nil {
		return err
	}
	if n := d.Size() / block.Size; n < minMetaBlocks {
		return fmt.Errorf("metadata device of %d bytes is too small: at least %d", d.Size(), minMetaBlocks*block.Size)
	}
	first := make([]byte, block.Size)
	if _, err := d.ReadAt(first, 0); err != nil {
		return fmt.Errorf("read metadata block 0: %w", err)
	}
	if !o.Force && !allZero(first) {
		return fmt.Errorf("the first block of the metadata device is not empty: %w", ErrExists)
	}
	m, err := create(d, 0, o)
	if err == nil {
		_, err = m.Commit(nil)
	}
	return formatErr(err, uint64(d.Size()/block.Size), o)
}

// minMetaBlocks is the smallest metadata device, in blocks.
const minMetaBlocks = 16

// create makes an empty pool whose first transaction is open.
func create(d dev.Device, cacheBytes int64, o FormatOptions) (*Metadata, error) {
	n := min(uint64(d.Size()/block.Size), spacemap.MaxMetaBlocks)
	m := newMetadata(d, cacheBytes)
	m.sb = Superblock{Magic: superblockMagic, Version: superblockVersion,
		DataBlockSize: uint32(o.DataBlockSize / sectorSize), MetaBlockSize: metaSectors, MetaBlocksThen: n}
	// Two bytes are set aside for every data block: first see that their bitmaps fit.
	if o.DataBlocks/spacemap.EntriesPerBitmap > n {
		return nil, fmt.Errorf("bitmaps of %d data blocks: %w", o.DataBlocks, ErrNoMetaSpace)
	}
	var err error
	if m.meta, err = spacemap.FormatMeta(m.tm, n); err != nil {
		return nil, err
	}
	if m.data, err = spacemap.FormatData(m.tm, o.DataBlocks); err != nil {
		return nil, err
	}
	m.trees()
	if m.sb.MappingRoot, err = m.top.Empty(); err != nil {
		return nil, err
	}
	if m.sb.DetailsRoot, err = m.details.Empty(); err != nil {
		return nil, err
	}
	m.changed = true
	return m, nil
}

func formatErr(err error, n uint64, o FormatOptions) error {
	if errors.Is(err, spacemap.ErrNoSpace) || errors.Is(err, ErrNoMetaSpace) {
		return fmt.Errorf("%d metadata blocks are too few for %d data blocks: %w", n, o.DataBlocks, ErrNoMetaSpace)
	}
	return err
}

func newMetadata(d dev.Device, cacheBytes int64) *Metadata {
	if cacheBytes <= 0 {
		cacheBytes = 32 << 20
	}
	c := block.NewCache(d, cacheBytes)
	return &Metadata{d: d, cache: c, tm: txn.New(d, c), devs: map[DevID]*device{}, dirty: map[DevID]struct{}{},
		committed: make([]byte, block.Size)}
}

func (m *Metadata) trees() {
	loc := func(v []byte) block.Loc { return block.Loc(binary.LittleEndian.Uint64(v)) }
	m.bottom = btree.New(m.tm, btree.ValueType{Size: 8,
		Inc:   func(v []byte) error { return m.data.Inc(binary.LittleEndian.Uint64(v) >> 24) },
		Dec:   func(v []byte) error { return m.data.Dec(binary.LittleEndian.Uint64(v) >> 24) },
		Equal: func(a, b []byte) bool { return binary.LittleEndian.Uint64(a)>>24 == binary.LittleEndian.Uint64(b)>>24 },
	})
	m.top = btree.New(m.tm, btree.ValueType{Size: 8,
		Inc:   func(v []byte) error { return m.tm.Inc(loc(v)) },
		Dec:   func(v []byte) error { return m.bottom.Release(loc(v)) },
		Equal: func(a, b []byte) bool { return true }, // a root is replaced by its own shadow
	})
	m.details = btree.New(m.tm, btree.ValueType{Size: detailsSize})
}

// OpenOptions say how to open.
type OpenOptions struct {
	CacheBytes int64 // bound of the block cache in bytes; 0: 32 MiB
	ReadOnly   bool
}

// Open reads the committed state of a pool. The device is the pool's from then on; Close closes
// it.
func Open(d dev.Device, o OpenOptions) (*Metadata, error) {
	m := newMetadata(d, o.CacheBytes)
	m.readOnly = o.ReadOnly
	if err := readSuperblock(d, m.committed); err != nil {
		return nil, err
	}
	m.sb = DecodeSuperblock(m.committed)
	if err := m.sb.Validate(o.ReadOnly); err != nil {
		return nil, err
	}
	m.csb = m.sb
	var err error
	if m.meta, err = spacemap.OpenMeta(m.tm, m.sb.MetaMap, uint64(d.Size()/block.Size)); err != nil {
		return nil, err
	}
	if n := m.sb.DataMap.NrBlocks; n/spacemap.EntriesPerBitmap > m.meta.Len() {
		return nil, block.Corruptf(superblockAt, "counts %d data blocks, whose bitmaps do not fit %d metadata blocks", n, m.meta.Len())
	}
	if m.data, err = spacemap.OpenData(m.tm, m.sb.DataMap); err != nil {
		return nil, err
	}
	m.trees()
	if err := m.loadDevices(); err != nil {
		return nil, err
	}
	return m, nil
}

// loadDevices reads the two trees of devices, which name the same ids.
func (m *Metadata) loadDevices() error {
	var bad error
	id := func(k uint64) DevID {
		if k > uint64(MaxDevID) && bad == nil {
			bad = fmt.Errorf("device id %d does not fit 24 bits: %w", k, ErrCorrupt)
		}
		return DevID(k)
	}
	roots := map[DevID]block.Loc{}
	if err := m.top.Walk(m.sb.MappingRoot, 0, func(k uint64, v []byte) bool {
		roots[id(k)] = block.Loc(binary.LittleEndian.Uint64(v))
		return bad == nil
	}); err != nil {
		return fmt.Errorf("device tree: %w", err)
	}
	if err := m.details.Walk(m.sb.DetailsRoot, 0, func(k uint64, v []byte) bool {
		root, ok := roots[id(k)]
		if !ok && bad == nil {
			bad = fmt.Errorf("device %d has details but no mapping tree: %w", k, ErrCorrupt)
		}
		d := &device{Details: decodeDetails(v), root: root}
		m.devs[DevID(k)] = d
		m.mapped += d.MappedBlocks
		return bad == nil
	}); err != nil {
		return fmt.Errorf("details tree: %w", err)
	}
	if bad == nil && len(m.devs) != len(roots) {
		bad = fmt.Errorf("details of %d devices for %d mapping trees: %w", len(m.devs), len(roots), ErrCorrupt)
	}
	return bad
}

// Close closes the device. It does not commit.
func (m *Metadata) Close() error {
	m.commitMu.Lock()
	defer m.commitMu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed == nil {
		m.failed = fmt.Errorf("metadata: %w", dev.ErrClosed)
	}
	return m.d.Close()
}

// writableLocked says why a change must be refused.
func (m *Metadata) writableLocked() error {
	switch {
	case m.failed != nil:
		return fmt.Errorf("metadata is read-only after a failure: %w: %w", m.failed, ErrReadOnly)
	case m.readOnly:
		return fmt.Errorf("metadata was opened read-only: %w", ErrReadOnly)
	}
	return nil
}

// failLocked records that the open transaction is lost.
func (m *Metadata) failLocked(err error) error {
	if errors.Is(err, spacemap.ErrNoSpace) {
		err = fmt.Errorf("%w: %w", err, ErrNoMetaSpace)
	}
	if m.failed == nil {
		m.failed = err
	}
	return err
}

// Fail makes every later change and commit fail: the data sync of a commit has failed, say.
func (m *Metadata) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failLocked(err)
}

// Failed returns why changes are refused, or nil.
func (m *Metadata) Failed() error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.failed
}
