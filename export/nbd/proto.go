package nbd

import (
	"encoding/binary"
	"fmt"
)

// Numbers of the NBD protocol. All integers on the wire are big-endian.
// Source: doc/proto.md of the NetworkBlockDevice project (public domain).
const (
	magicServer      = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicChunk       = 0x668e33ef
)

// Handshake flags of the server, and the client's answers to them (the same bits).
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options of the handshake.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options; errors have bit 31 set.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsup    = 1<<31 + 1
	repErrInvalid  = 1<<31 + 3
	repErrTLSReqd  = 1<<31 + 5
	repErrUnknown  = 1<<31 + 6
	repErrShutdown = 1<<31 + 7
	repErrTooBig   = 1<<31 + 9
)

// Information items of INFO and GO.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags: what an export can do.
const (
	flagHasFlags     = 1 << 0
	flagReadOnly     = 1 << 1
	flagSendFlush    = 1 << 2
	flagSendFUA      = 1 << 3
	flagSendTrim     = 1 << 5
	flagSendZeroes   = 1 << 6
	flagSendDF       = 1 << 7
	flagMultiConn    = 1 << 8
	flagSendFastZero = 1 << 11
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Structured reply chunks.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// The base:allocation context: its name, the id we give it, and its flags.
const (
	contextAllocation   = "base:allocation"
	contextAllocationID = 1

	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Sizes in bytes.
const (
	requestSize     = 28
	simpleSize      = 16
	chunkSize       = 20            // header of a chunk
	dataChunkSize   = chunkSize + 8 // header and offset of OFFSET_DATA
	holeChunkSize   = chunkSize + 12
	optionSize      = 16
	optionReplySize = 20

	minBlock      = 512      // smallest request, and unit of offsets and lengths
	maxPayload    = 32 << 20 // longest read or write
	maxOption     = 64 << 10 // longest option data; anything longer ends the connection
	maxPlain      = 8 << 10  // the same, before the TLS that a client must start
	maxString     = 4096     // longest export name, description, query, message
	maxMetaQuery  = 64       // queries of one LIST/SET_META_CONTEXT
	legacyPadding = 124      // zeros after the reply to EXPORT_NAME without NO_ZEROES
)

// A request is the header of one command:
//
//	offset  size  field
//	0       4     magic   0x25609513
//	4       2     flags
//	6       2     type
//	8       8     cookie  echoed in the reply
//	16      8     offset  bytes
//	24      4     length  bytes; of the payload that follows, for a write
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	n      uint32
}

// decodeRequest reads a header from the first requestSize bytes of b.
func decodeRequest(b []byte) (request, error) {
	_ = b[requestSize-1]
	if m := binary.BigEndian.Uint32(b); m != magicRequest {
		return request{}, fmt.Errorf("request magic 0x%08x, want 0x%08x", m, uint32(magicRequest))
	}
	return request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		n:      binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// putSimple writes a simple reply, simpleSize bytes: magic, error, cookie. The data of a read
// follows it.
func putSimple(b []byte, cookie uint64, e Errno) {
	_ = b[simpleSize-1]
	binary.BigEndian.PutUint32(b, magicSimple)
	binary.BigEndian.PutUint32(b[4:], uint32(e))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// putChunk writes the header of a structured reply chunk, chunkSize bytes:
//
//	offset  size  field
//	0       4     magic   0x668e33ef
//	4       2     flags   bit 0: last chunk of this reply
//	6       2     type
//	8       8     cookie
//	16      4     length  of the payload that follows
func putChunk(b []byte, flags, typ uint16, cookie uint64, length uint32) {
	_ = b[chunkSize-1]
	binary.BigEndian.PutUint32(b, magicChunk)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], typ)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], length)
}

// putDataChunk writes the header of an OFFSET_DATA chunk, dataChunkSize bytes; n bytes of data
// follow it.
func putDataChunk(b []byte, flags uint16, cookie, off uint64, n int) {
	putChunk(b, flags, chunkOffsetData, cookie, uint32(8+n))
	binary.BigEndian.PutUint64(b[chunkSize:], off)
}

// putHoleChunk writes an OFFSET_HOLE chunk, holeChunkSize bytes: n bytes of zeros at off.
func putHoleChunk(b []byte, flags uint16, cookie, off uint64, n int) {
	putChunk(b, flags, chunkOffsetHole, cookie, 12)
	binary.BigEndian.PutUint64(b[chunkSize:], off)
	binary.BigEndian.PutUint32(b[chunkSize+8:], uint32(n))
}

// appendErrorChunk appends a final ERROR chunk: error, length of the message, message (cut at
// 256 bytes, which all clients take).
func appendErrorChunk(b []byte, cookie uint64, e Errno, msg string) []byte {
	if len(msg) > 256 {
		msg = msg[:256]
	}
	var h [chunkSize + 6]byte
	putChunk(h[:], chunkFlagDone, chunkError, cookie, uint32(6+len(msg)))
	binary.BigEndian.PutUint32(h[chunkSize:], uint32(e))
	binary.BigEndian.PutUint16(h[chunkSize+4:], uint16(len(msg)))
	return append(append(b, h[:]...), msg...)
}

// commandName is for errors and logs.
func commandName(cmd uint16) string {
	switch cmd {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdDisc:
		return "disconnect"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdWriteZeroes:
		return "write zeroes"
	case cmdBlockStatus:
		return "block status"
	}
	return fmt.Sprintf("command %d", cmd)
}
