package thin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/spacemap"
)

// RestoreOptions override what the dump says, and bound the work.
type RestoreOptions struct {
	TransactionID *uint64
	DataBlockSize int64   // bytes; 0: as in the dump
	DataBlocks    *uint64 // length of the data device in data blocks
	Force         bool    // overwrite what is on the device
	// CacheBytes bounds the block cache; 0: 32 MiB.
	CacheBytes int64
	// Progress, if set, is called now and then with the mappings restored; an error ends the
	// restore with that error.
	Progress func(mappings uint64) error

	step uint64 // for tests; 0: restoreStep
}

// restoreStep is how many mappings are held in memory before they are written out.
const restoreStep = 200000

// Restore writes the pool that an XML dump describes onto a metadata device, which is used up
// to its size: dumps of thin_dump of both generations, with def and ref, and those of Dump.
// Every device gets a tree of its own; data blocks named several times are shared.
//
// The dump is read once, in bounded memory. Refused with element and line is what no pool can
// hold: blocks beyond the data device, virtual blocks twice or out of order, devices twice, ids
// over 24 bits, times of the future, data blocks that a device takes for its own by their time
// although they are mapped elsewhere too. mapped_blocks, flags, version and metadata_snap of the
// dump are not used.
//
// The superblock is written last: after an error block 0 is all zeros and no pool is there.
// Restore refuses (ErrExists) a device whose first block is not all zeros, unless forced; then
// block 0 is zeroed first.
func Restore(r io.Reader, d dev.Device, o RestoreOptions) error {
	first := make([]byte, block.Size)
	if n := d.Size() / block.Size; n < minMetaBlocks {
		return fmt.Errorf("metadata device of %d bytes is too small: at least %d", d.Size(), minMetaBlocks*block.Size)
	}
	if _, err := d.ReadAt(first, 0); err != nil {
		return fmt.Errorf("read metadata block 0: %w", err)
	}
	if !allZero(first) {
		if !o.Force {
			return fmt.Errorf("the first block of the metadata device is not empty: %w", ErrExists)
		}
		clear(first)
		if _, err := d.WriteAt(first, 0); err != nil {
			return fmt.Errorf("clear superblock: %w", err)
		}
		if err := d.Flush(); err != nil {
			return fmt.Errorf("clear superblock: %w", err)
		}
	}
	if o.step == 0 {
		o.step = restoreStep
	}
	late := &lateSuperblock{Device: d}
	b := &restorer{x: newXMLReader(r), d: late, o: o}
	defer b.defs.close()
	if err := b.run(); err != nil {
		if errors.Is(err, spacemap.ErrNoSpace) || errors.Is(err, ErrNoMetaSpace) {
			return fmt.Errorf("restore: the metadata device of %d blocks is too small: %w", d.Size()/block.Size, ErrNoMetaSpace)
		}
		return fmt.Errorf("restore: %w", err)
	}
	return late.finish()
}

// A lateSuperblock keeps block 0 in memory, so that commits leave nothing that looks like a
// pool, and flushes only at the end.
type lateSuperblock struct {
	dev.Device
	sb []byte
}

func (l *lateSuperblock) WriteAt(p []byte, off int64) (int, error) {
	if off == 0 {
		l.sb = append([]byte(nil), p...)
		return len(p), nil
	}
	return l.Device.WriteAt(p, off)
}

func (l *lateSuperblock) Flush() error { return nil }
func (l *lateSuperblock) Close() error { return nil }

// finish makes the pool real.
func (l *lateSuperblock) finish() error {
	if err := l.Device.Flush(); err != nil {
		return fmt.Errorf("restore: flush metadata device: %w", err)
	}
	if _, err := l.Device.WriteAt(l.sb, 0); err != nil {
		l.undo()
		return fmt.Errorf("restore: write superblock: %w", err)
	}
	if err := l.Device.Flush(); err != nil {
		l.undo()
		return fmt.Errorf("restore: flush superblock: %w", err)
	}
	return nil
}

// undo takes a superblock away whose write has failed, as far as the device lets it.
func (l *lateSuperblock) undo() {
	if _, err := l.Device.WriteAt(zeroBlock[:], 0); err == nil {
		l.Device.Flush()
	}
}

// A restorer builds a pool from a dump.
type restorer struct {
	x    *xmlReader
	d    dev.Device
	o    RestoreOptions
	m    *Metadata
	defs defStore

	seen  map[DevID]bool
	known bitset // data blocks that some mapping names
	owned bitset // data blocks that a device takes for its own
	total uint64 // mappings so far
	step  uint64 // since the last commit

	// The device that is being read.
	id   DevID
	dev  *device
	next uint64 // first virtual block that may follow
	full bool   // the last virtual block there is has been mapped
	keys []uint64
	vals []uint64
}

func (b *restorer) run() error {
	t, err := b.x.next()
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the input holds no <superblock>")
	}
	if err != nil {
		return err
	}
	if t.end || t.selfClosing || t.name != "superblock" {
		return b.x.errorf(t.line, "<%s> where <superblock> is expected", t.name)
	}
	if err := b.superblock(); err != nil {
		return err
	}
	b.seen = map[DevID]bool{}
	for {
		t, err := b.x.next()
		if errors.Is(err, io.EOF) {
			return b.x.errorf(b.x.line, "the input ends before </superblock>")
		}
		if err != nil {
			return err
		}
		switch {
		case t.end && t.name == "superblock":
			if t, err := b.x.next(); err == nil {
				return b.x.errorf(t.line, "<%s> after </superblock>", t.name)
			} else if !errors.Is(err, io.EOF) {
				return err
			}
			_, err := b.m.Commit(nil)
			return err
		case !t.end && t.name == "device":
			err = b.device()
		case !t.end && t.name == "def":
			err = b.def()
		default:
			err = b.x.unexpected("superblock")
		}
		if err != nil {
			return err
		}
	}
}

func (x *xmlReader) unexpected(in string) error {
	slash := ""
	if x.tag.end {
		slash = "/"
	}
	return x.errorf(x.tag.line, "<%s%s> inside <%s>", slash, x.tag.name, in)
}

// superblock makes the empty pool that the first element describes.
func (b *restorer) superblock() error {
	x := b.x
	if err := x.only("uuid", "time", "transaction", "flags", "version", "data_block_size", "nr_data_blocks", "metadata_snap"); err != nil {
		return err
	}
	time, err := x.number("time", MaxTime-1)
	if err != nil {
		return err
	}
	trans, err := x.number("transaction", 1<<64-1)
	if b.o.TransactionID != nil {
		trans, err = *b.o.TransactionID, nil
	}
	if err != nil {
		return err
	}
	sectors, err := x.number("data_block_size", MaxBlockSize/sectorSize)
	size := int64(sectors) * sectorSize
	if b.o.DataBlockSize != 0 {
		size, err = b.o.DataBlockSize, nil
	}
	if err != nil {
		return err
	}
	if err := CheckBlockSize(size); err != nil {
		return x.errorf(x.tag.line, "<superblock>: %v", err)
	}
	blocks, err := x.number("nr_data_blocks", 1<<40)
	if b.o.DataBlocks != nil {
		blocks, err = *b.o.DataBlocks, nil
	}
	if err != nil {
		return err
	}
	if b.m, err = create(b.d, b.o.CacheBytes, FormatOptions{DataBlockSize: size, DataBlocks: blocks}); err != nil {
		return err
	}
	b.m.sb.Time, b.m.sb.TransactionID = uint32(time), trans
	b.known, b.owned = newBitset(blocks), newBitset(blocks)
	return nil
}

// device reads one <device> with its mappings.
func (b *restorer) device() error {
	x, closed := b.x, b.x.tag.selfClosing
	line := x.tag.line
	if err := x.only("dev_id", "mapped_blocks", "transaction", "creation_time", "snap_time"); err != nil {
		return err
	}
	id, err := x.number("dev_id", uint64(MaxDevID))
	if err != nil {
		return err
	}
	b.id = DevID(id)
	if b.seen[b.id] {
		return x.errorf(line, "<device>: dev_id %d twice", id)
	}
	b.seen[b.id] = true
	trans, err := x.number("transaction", 1<<64-1)
	if err != nil {
		return err
	}
	now := uint64(b.m.sb.Time)
	snap, err := x.number("snap_time", now)
	if err != nil {
		return err
	}
	created, err := x.number("creation_time", snap)
	if err != nil {
		return err
	}
	root, err := b.m.bottom.Empty()
	if err != nil {
		return err
	}
	b.dev = &device{root: root, Details: Details{TransactionID: trans, CreationTime: uint32(created), SnapshottedTime: uint32(snap)}}
	if err := b.m.addLocked(b.id, b.dev); err != nil {
		return err
	}
	b.next, b.full = 0, false
	for !closed {
		t, err := x.next()
		if errors.Is(err, io.EOF) {
			return x.errorf(x.line, "the input ends before </device>")
		}
		if err != nil {
			return err
		}
		switch {
		case t.end && t.name == "device":
			closed = true
		case !t.end && t.name == "ref":
			err = b.ref()
		case !t.end:
			var r mappingRun
			if r, err = b.mapping("device"); err == nil {
				err = b.add(r, t.line, t.name)
			}
		default:
			err = x.unexpected("device")
		}
		if err != nil {
			return err
		}
	}
	return b.flush()
}

// mapping reads a range_mapping or single_mapping.
func (b *restorer) mapping(in string) (mappingRun, error) {
	x := b.x
	var r mappingRun
	origin, data := "origin_begin", "data_begin"
	switch x.tag.name {
	case "range_mapping":
		n, err := x.number("length", 1<<40)
		if err != nil {
			return r, err
		}
		r.n = n
	case "single_mapping":
		origin, data, r.n = "origin_block", "data_block", 1
	default:
		return r, x.unexpected(in)
	}
	line, name, selfClosing := x.tag.line, x.tag.name, x.tag.selfClosing
	allowed := []string{origin, data, "time", "length"}
	if name == "single_mapping" {
		allowed = allowed[:3]
	}
	if err := x.only(allowed...); err != nil {
		return r, err
	}
	vb, err := x.number(origin, 1<<64-1)
	if err != nil {
		return r, err
	}
	blocks := b.m.data.Space().Total
	begin, err := x.number(data, 1<<40)
	if err != nil {
		return r, err
	}
	time, err := x.number("time", uint64(b.m.sb.Time))
	if err != nil {
		return r, err
	}
	switch {
	case r.n == 0:
		return r, x.errorf(line, "<%s>: length 0", name)
	case begin >= blocks || r.n > blocks-begin:
		return r, x.errorf(line, "<%s>: data blocks [%d, %d) of %d", name, begin, begin+r.n, blocks)
	case vb+(r.n-1) < vb:
		return r, x.errorf(line, "<%s>: %d virtual blocks from %d on", name, r.n, vb)
	}
	r.VBlock, r.Block, r.Time = VBlock(vb), DataBlock(begin), uint32(time)
	if !selfClosing {
		if t, err := x.next(); err != nil || !t.end || t.name != name {
			return r, x.errorf(line, "<%s> does not end", name)
		}
	}
	return r, nil
}

// add maps a run in the current device.
func (b *restorer) add(r mappingRun, line int, name string) error {
	if uint64(r.VBlock) < b.next || b.full {
		return b.x.errorf(line, "<%s>: virtual block %d of device %d is mapped twice or out of order", name, r.VBlock, b.id)
	}
	b.next = uint64(r.VBlock) + r.n
	b.full = b.next == 0
	for i := range r.n {
		m := Mapping{r.Block + DataBlock(i), r.Time}
		own := r.Time >= b.dev.SnapshottedTime
		if k := uint64(m.Block); b.owned.has(k) || own && b.known.has(k) {
			return b.x.errorf(line, "<%s>: data block %d is mapped more than once, but a device's times say that it alone has it: two devices would write the same block", name, k)
		}
		b.known.add(uint64(m.Block))
		if own {
			b.owned.add(uint64(m.Block))
		}
		b.keys = append(b.keys, uint64(r.VBlock)+i)
		b.vals = append(b.vals, m.Pack())
		if len(b.keys) == 4096 {
			if err := b.flush(); err != nil {
				return err
			}
		}
	}
	b.dev.newest, b.dev.newestKnown = max(b.dev.newest, r.Time), true
	return nil
}

// flush inserts the mappings that have gathered, and commits now and then to bound memory.
func (b *restorer) flush() error {
	m := b.m
	for _, v := range b.vals {
		if err := m.data.Refer(v >> 24); err != nil {
			return err
		}
	}
	var v [8]byte
	root, n, err := m.bottom.InsertSorted(b.dev.root, b.keys, func(i int) []byte {
		binary.LittleEndian.PutUint64(v[:], b.vals[i])
		return v[:]
	})
	if err != nil {
		return err
	}
	if err := m.setRootLocked(b.id, b.dev, root); err != nil {
		return err
	}
	m.dirty[b.id] = struct{}{}
	m.changed = true
	b.dev.MappedBlocks += uint64(n)
	b.total += uint64(n)
	b.step += uint64(n) + 100
	b.keys, b.vals = b.keys[:0], b.vals[:0]
	if b.step < b.o.step {
		return nil
	}
	b.step = 0
	if _, err := m.Commit(nil); err != nil {
		return err
	}
	if b.o.Progress != nil {
		return b.o.Progress(b.total)
	}
	return nil
}

// A bitset is a set of small numbers.
type bitset []uint64

func newBitset(n uint64) bitset    { return make(bitset, (n+63)/64) }
func (s bitset) has(i uint64) bool { return s[i/64]&(1<<(i%64)) != 0 }
func (s bitset) add(i uint64)      { s[i/64] |= 1 << (i % 64) }
