package journal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"mica/thin"
)

// The file, in the byte order of the machine (nobody else ever reads it):
//
//	offset  size  field
//	0       8     magic           "micajrnl"
//	8       4     version         1
//	12      4     csum            CRC-32C of bytes 16..4095
//	16      8     size            of the file in bytes
//	24      16    boot            boot id of the kernel
//	40      8     kind            1: metadata file, 2: block device
//	48      8     dev             of the file system, or the number of the block device
//	56      8     ino             of the metadata file
//	64      8     born            its creation, ns since 1970; 0: unknown
//	72      4     pid             of the process that made the journal
//	76      4     length of path
//	80      3880  path            of the metadata device
//	3960    4     type of handle
//	3964    4     length of handle
//	3968    128   handle          of the metadata file (name_to_handle_at), see sweep
//	4096    8     failed          not 0: the pool has failed, nothing may be taken over
//	4160    128   done            record: the superblock that a reader's own commit will write
//	8192    128   follows         record of area 0
//	8320    128   to come         record of area 0
//	8448    8     written         number of the generation: the superblock to come is written
//	12288         the same for area 1
//	16384         slots of area 0, then as many of area 1
//
// A record is 16 words: check, number, and the 13 words of a State, one unused. A slot is 4:
//
//	word  bits    field
//	0     32..63  number of the generation, cut to 31 bits, and bit 31 set
//	      0..31   CRC-32C over the number and words 1..3
//	1     40..63  device id
//	      0..39   first virtual block
//	2     48..63  how many neighbouring blocks
//	      0..47   first data block; 0 when mappings are removed
//	3     56..63  1: set, 2: removed
//	      0..55   number of the slot in its area
//
// The blocks of a slot do not cross a multiple of GroupBlocks (TestSlotWorkedExample).
const (
	magic        = "micajrnl"
	version      = 1
	pageBytes    = 4096
	failedAt     = pageBytes
	doneAt       = pageBytes + 64
	generationAt = 2 * pageBytes // and one page on for area 1
	toComeAt     = 128           // in the page of a generation
	writtenAt    = 256           // in the page of a generation
	slotsAt      = 4 * pageBytes
	slotBytes    = 32
	recordBytes  = 128
	stateWords   = 13
	maxPath      = handleAt - 80
	handleAt     = 3960
	maxHandle    = 128

	kindFile  = 1
	kindBlock = 2

	opSet    = 1
	opRemove = 2

	blockBits = 40 // of a virtual block
	dataBits  = 48 // of a data block
)

// GroupBlocks is how many virtual blocks one slot can be about at most: those between two
// multiples of it.
const GroupBlocks = 512

// Marks of records, so that one is never taken for another.
const (
	markFollows = 0xF0110005
	markToCome  = 0x70C03E00
	markDone    = 0xD0D0D0D0
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var order = binary.NativeEndian

// A State names a superblock: what of it changes from one commit to the next.
type State struct {
	Time          uint32
	TransactionID uint64
	HeldRoot      uint64
	DataMap       [4]uint64
	MetaMap       [4]uint64
	MappingRoot   uint64
	DetailsRoot   uint64
}

// StateOf is the name of a superblock.
func StateOf(s thin.Superblock) State {
	d, m := s.DataMap, s.MetaMap
	return State{Time: s.Time, TransactionID: s.TransactionID, HeldRoot: uint64(s.HeldRoot),
		DataMap:     [4]uint64{d.NrBlocks, d.NrAllocated, uint64(d.BitmapRoot), uint64(d.Overflow)},
		MetaMap:     [4]uint64{m.NrBlocks, m.NrAllocated, uint64(m.BitmapRoot), uint64(m.Overflow)},
		MappingRoot: uint64(s.MappingRoot), DetailsRoot: uint64(s.DetailsRoot)}
}

func (s State) words() (w [stateWords]uint64) {
	w[0], w[1], w[2] = uint64(s.Time), s.TransactionID, s.HeldRoot
	copy(w[3:7], s.DataMap[:])
	copy(w[7:11], s.MetaMap[:])
	w[11], w[12] = s.MappingRoot, s.DetailsRoot
	return w
}

func stateFrom(w [stateWords]uint64) State {
	return State{Time: uint32(w[0]), TransactionID: w[1], HeldRoot: w[2], DataMap: [4]uint64(w[3:7]),
		MetaMap: [4]uint64(w[7:11]), MappingRoot: w[11], DetailsRoot: w[12]}
}

// String shows what people know of a superblock.
func (s State) String() string {
	return fmt.Sprintf("transaction id %d, time %d, mapping root %d, %d data blocks used", s.TransactionID, s.Time, s.MappingRoot, s.DataMap[1])
}

// putRecord stores a state with a number. Whoever is killed in between leaves a record that is
// not valid.
func putRecord(b []byte, mark uint32, number uint64, s State) {
	word(b, 0).Store(0)
	order.PutUint64(b[8:], number)
	for i, w := range s.words() {
		order.PutUint64(b[16+8*i:], w)
	}
	word(b, 0).Store(recordCheck(b, mark))
}

func recordCheck(b []byte, mark uint32) uint64 {
	return uint64(mark)<<32 | uint64(crc32.Update(mark, castagnoli, b[8:recordBytes]))
}

// readRecord returns a record if it is valid.
func readRecord(b []byte, mark uint32) (number uint64, s State, ok bool) {
	if order.Uint64(b) != recordCheck(b, mark) {
		return 0, State{}, false
	}
	var w [stateWords]uint64
	for i := range w {
		w[i] = order.Uint64(b[16+8*i:])
	}
	return order.Uint64(b[8:]), stateFrom(w), true
}

// An Entry is one change of mappings: Len neighbouring virtual blocks from VBlock on were mapped
// to neighbouring data blocks from Block on, or, if Removed, unmapped.
type Entry struct {
	ID      thin.DevID
	VBlock  thin.VBlock
	Len     uint64
	Block   thin.DataBlock
	Removed bool
}

// valid reports whether an entry can be stored.
func (e *Entry) valid() bool {
	return e.ID <= thin.MaxDevID && e.VBlock < 1<<blockBits && e.Block < 1<<dataBits &&
		e.Len > 0 && e.Len <= GroupBlocks-uint64(e.VBlock)%GroupBlocks
}

// putSlot stores an entry in slot i of a generation.
func putSlot(b []byte, number, i uint64, e Entry) {
	w := word(b, 0)
	w.Store(0)
	op, block := uint64(opSet), uint64(e.Block)
	if e.Removed {
		op, block = opRemove, 0
	}
	order.PutUint64(b[8:], uint64(e.ID)<<blockBits|uint64(e.VBlock))
	order.PutUint64(b[16:], e.Len<<dataBits|block)
	order.PutUint64(b[24:], op<<56|i)
	w.Store(slotCheck(b, number))
}

func slotCheck(b []byte, number uint64) uint64 {
	return (number|1<<31)<<32 | uint64(crc32.Update(uint32(number)^uint32(number>>32), castagnoli, b[8:slotBytes]))
}

// readSlot returns the entry of slot i if it is valid.
func readSlot(b []byte, number, i uint64) (e Entry, ok bool) {
	if w := order.Uint64(b); w == 0 || w != slotCheck(b, number) {
		return Entry{}, false
	}
	w1, w2, w3 := order.Uint64(b[8:]), order.Uint64(b[16:]), order.Uint64(b[24:])
	e = Entry{ID: thin.DevID(w1 >> blockBits), VBlock: thin.VBlock(w1 & (1<<blockBits - 1)), Len: w2 >> dataBits,
		Block: thin.DataBlock(w2 & (1<<dataBits - 1)), Removed: w3>>56 == opRemove}
	if op := w3 >> 56; op != opSet && op != opRemove || w3&(1<<56-1) != i || !e.valid() {
		return Entry{}, false
	}
	return e, true
}

// slotsPer is how many slots each area of a file of size bytes has.
func slotsPer(size int64) uint64 { return uint64(size-slotsAt) / 2 / slotBytes }

// A header says which pool a journal belongs to.
type header struct {
	size   int64
	boot   [16]byte
	id     Identity
	pid    int
	handle handle
}

// A handle names a file for its file system, and nothing once the file is gone.
type handle struct {
	kind int32
	data []byte // empty: none
}

func (h *header) encode(b []byte) {
	clear(b[:pageBytes])
	copy(b, magic)
	order.PutUint32(b[8:], version)
	order.PutUint64(b[16:], uint64(h.size))
	copy(b[24:], h.boot[:])
	kind := uint64(kindFile)
	if h.id.Block {
		kind = kindBlock
	}
	order.PutUint64(b[40:], kind)
	order.PutUint64(b[48:], h.id.Dev)
	order.PutUint64(b[56:], h.id.Ino)
	order.PutUint64(b[64:], uint64(h.id.Born))
	order.PutUint32(b[72:], uint32(h.pid))
	n := copy(b[80:80+maxPath], h.id.Path)
	order.PutUint32(b[76:], uint32(n))
	order.PutUint32(b[handleAt:], uint32(h.handle.kind))
	n = copy(b[handleAt+8:pageBytes], h.handle.data)
	order.PutUint32(b[handleAt+4:], uint32(n))
	order.PutUint32(b[12:], crc32.Checksum(b[16:pageBytes], castagnoli))
}

// decodeHeader reads a header of this version.
func decodeHeader(b []byte) (h header, err error) {
	if got, want := crc32.Checksum(b[16:pageBytes], castagnoli), order.Uint32(b[12:]); got != want {
		return h, fmt.Errorf("header checksum %#08x, want %#08x: %w", got, want, ErrDamaged)
	}
	h.size = int64(order.Uint64(b[16:]))
	h.boot = [16]byte(b[24:40])
	kind := order.Uint64(b[40:])
	h.id = Identity{Block: kind == kindBlock, Dev: order.Uint64(b[48:]), Ino: order.Uint64(b[56:]), Born: int64(order.Uint64(b[64:]))}
	h.pid = int(order.Uint32(b[72:]))
	n := order.Uint32(b[76:])
	m := order.Uint32(b[handleAt+4:])
	if kind != kindFile && kind != kindBlock || n > maxPath || m > maxHandle || h.size < slotsAt {
		return h, fmt.Errorf("header with kind %d, path of %d bytes, handle of %d, size %d: %w", kind, n, m, h.size, ErrDamaged)
	}
	h.id.Path = string(b[80 : 80+n])
	h.handle = handle{int32(order.Uint32(b[handleAt:])), bytes.Clone(b[handleAt+8 : handleAt+8+m])}
	return h, nil
}

// isJournal tells a journal, of any version, from something else.
func isJournal(b []byte) (ver uint32, ok bool) {
	if len(b) < slotsAt || !bytes.HasPrefix(b, []byte(magic)) {
		return 0, false
	}
	return order.Uint32(b[8:]), true
}
