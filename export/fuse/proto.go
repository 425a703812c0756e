package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The FUSE protocol, as far as a file system with one file of fixed size needs it. Every message
// starts with a header in the machine's byte order:
//
//	request                          reply and notification
//	offset  size  field              offset  size  field
//	0       4     len, all bytes     0       4     len, all bytes
//	4       4     opcode             4       4     error: 0 or -errno; notification: its code
//	8       8     unique             8       8     unique of the request; notification: 0
//	16      8     nodeid
//	24      12    uid, gid, pid
//	36      2     total_extlen
//	38      2     padding
//
// Source: the kernel's uapi header linux/fuse.h, protocol 7.31 (kernel 5.4) to 7.45.

type opcode uint32

const (
	opLookup      opcode = 1
	opForget      opcode = 2 // no reply
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opOpendir     opcode = 27
	opReaddir     opcode = 28
	opReleasedir  opcode = 29
	opInterrupt   opcode = 36 // no reply
	opDestroy     opcode = 38
	opBatchForget opcode = 42 // no reply
	opFallocate   opcode = 43
	opLseek       opcode = 46
)

func (o opcode) String() string {
	if s, ok := map[opcode]string{
		opLookup: "LOOKUP", opForget: "FORGET", opGetattr: "GETATTR", opSetattr: "SETATTR", opOpen: "OPEN",
		opRead: "READ", opWrite: "WRITE", opStatfs: "STATFS", opRelease: "RELEASE", opFsync: "FSYNC",
		opFlush: "FLUSH", opInit: "INIT", opOpendir: "OPENDIR", opReaddir: "READDIR", opReleasedir: "RELEASEDIR",
		opInterrupt: "INTERRUPT", opDestroy: "DESTROY", opBatchForget: "BATCH_FORGET", opFallocate: "FALLOCATE",
		opLseek: "LSEEK",
	}[o]; ok {
		return s
	}
	return fmt.Sprintf("opcode %d", uint32(o))
}

const (
	protoMajor = 7
	protoMinor = 40 // the newest that we speak; HAS_RESEND came with it
	minMinor   = 31 // kernel 5.4

	inHeaderLen  = 40
	outHeaderLen = 16
	writeInLen   = 40
	initOutLen   = 64
	attrOutLen   = 104
	entryOutLen  = 128
	statfsOutLen = 80

	// initFlags of INIT. The upper half travels in flags2 when capInitExt is set.
	capAsyncRead     = 1 << 0
	capBigWrites     = 1 << 5
	capAsyncDIO      = 1 << 15
	capParallelDirop = 1 << 18
	capMaxPages      = 1 << 22
	capInitExt       = 1 << 30
	capHasResend     = 1 << 39

	openDirectIO       = 1 << 0 // FOPEN_DIRECT_IO
	openParallelWrites = 1 << 6 // FOPEN_PARALLEL_DIRECT_WRITES

	notifyInvalInode = 2
	notifyResend     = 7
)

// Node ids of the two inodes.
const (
	rootNode = 1
	diskNode = 2
	diskName = "disk"
)

var errMalformed = errors.New("malformed request")

// A request is one parsed request. Which fields mean something depends on op.
type request struct {
	op     opcode
	unique uint64
	node   uint64

	off   uint64 // READ, WRITE, FALLOCATE, LSEEK, READDIR: bytes
	size  uint32 // READ, WRITE, READDIR: bytes, bounded by maxIO
	n     uint64 // FALLOCATE: bytes
	flags uint32 // OPEN: open flags; FALLOCATE: mode; LSEEK: whence

	name  []byte // LOOKUP; a part of the message
	data  []byte // WRITE; a part of the message
	major uint32 // INIT
	minor uint32 // INIT
	caps  uint64 // INIT
}

var ne = binary.NativeEndian

// parse reads one message of the kernel. Lengths inside it are checked against the message and
// against maxIO before they are used. r.name and r.data point into msg.
func (r *request) parse(msg []byte) error {
	*r = request{}
	if len(msg) < inHeaderLen {
		return fmt.Errorf("message of %d bytes, header needs %d: %w", len(msg), inHeaderLen, errMalformed)
	}
	r.op = opcode(ne.Uint32(msg[4:]))
	r.unique = ne.Uint64(msg[8:])
	r.node = ne.Uint64(msg[16:])
	if n := ne.Uint32(msg); uint64(n) != uint64(len(msg)) {
		return fmt.Errorf("%v: length field %d in a message of %d bytes: %w", r.op, n, len(msg), errMalformed)
	}
	arg := msg[inHeaderLen:]
	if want := argLen(r.op); len(arg) < want {
		return fmt.Errorf("%v: %d bytes of arguments, want %d: %w", r.op, len(arg), want, errMalformed)
	}
	switch r.op {
	case opRead, opReaddir:
		r.off = ne.Uint64(arg[8:])
		r.size = ne.Uint32(arg[16:])
		if r.op == opReaddir {
			r.size = min(r.size, maxIO)
		}
		if r.size > maxIO {
			return fmt.Errorf("%v: %d bytes, at most %d: %w", r.op, r.size, maxIO, errMalformed)
		}
	case opWrite:
		r.off = ne.Uint64(arg[8:])
		r.size = ne.Uint32(arg[16:])
		if r.size > maxIO || int(r.size) > len(arg)-writeInLen {
			return fmt.Errorf("WRITE: %d bytes, %d in the message, at most %d: %w", r.size, len(arg)-writeInLen, maxIO, errMalformed)
		}
		r.data = arg[writeInLen : writeInLen+int(r.size)]
	case opFallocate:
		r.off = ne.Uint64(arg[8:])
		r.n = ne.Uint64(arg[16:])
		r.flags = ne.Uint32(arg[24:])
	case opLseek:
		r.off = ne.Uint64(arg[8:])
		r.flags = ne.Uint32(arg[16:])
	case opOpen:
		r.flags = ne.Uint32(arg)
	case opLookup:
		for i, c := range arg {
			if c == 0 {
				r.name = arg[:i]
				return nil
			}
		}
		return fmt.Errorf("LOOKUP: name of %d bytes without an end: %w", len(arg), errMalformed)
	case opInit:
		r.major = ne.Uint32(arg)
		r.minor = ne.Uint32(arg[4:])
		r.caps = uint64(ne.Uint32(arg[12:]))
		if r.caps&capInitExt != 0 && len(arg) >= 20 {
			r.caps |= uint64(ne.Uint32(arg[16:])) << 32
		}
	}
	return nil
}

// argLen is the least number of argument bytes that parse reads.
func argLen(op opcode) int {
	switch op {
	case opRead, opReaddir:
		return 40
	case opWrite:
		return writeInLen
	case opFallocate:
		return 32
	case opLseek:
		return 24
	case opOpen:
		return 8
	case opLookup:
		return 1
	case opInit:
		return 16
	}
	return 0
}

// putHeader writes a reply header for a message of total bytes.
func putHeader(b []byte, total int, errno int32, unique uint64) {
	ne.PutUint32(b, uint32(total))
	ne.PutUint32(b[4:], uint32(errno))
	ne.PutUint64(b[8:], unique)
}
