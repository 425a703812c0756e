package ublk

import (
	"encoding/binary"
	"fmt"
)

// The driver's interface. Source: include/uapi/linux/ublk_cmd.h (MIT), Documentation/block/ublk.rst.

var ne = binary.NativeEndian

// Commands to /dev/ublk-control, as ioctl numbers: direction, size of ctrlCmd, 'u', number.
const (
	dirRead = 2 << 30
	dirBoth = 3 << 30

	ctrlCode = ctrlCmdLen<<16 | 'u'<<8
	ioCode   = ioCmdLen<<16 | 'u'<<8

	cmdGetDevInfo    = dirRead | ctrlCode | 0x02
	cmdAddDev        = dirBoth | ctrlCode | 0x04
	cmdDelDev        = dirBoth | ctrlCode | 0x05
	cmdStartDev      = dirBoth | ctrlCode | 0x06
	cmdStopDev       = dirBoth | ctrlCode | 0x07
	cmdSetParams     = dirBoth | ctrlCode | 0x08
	cmdStartRecovery = dirBoth | ctrlCode | 0x10
	cmdEndRecovery   = dirBoth | ctrlCode | 0x11
	cmdGetFeatures   = dirRead | ctrlCode | 0x13
	cmdDelDevAsync   = dirRead | ctrlCode | 0x14 // Linux 6.9
	cmdUpdateSize    = dirBoth | ctrlCode | 0x15

	// Commands to /dev/ublkcN.
	ioFetch          = dirBoth | ioCode | 0x20
	ioCommitAndFetch = dirBoth | ioCode | 0x21
)

var commandNames = map[uint32]string{
	cmdGetDevInfo: "GET_DEV_INFO", cmdAddDev: "ADD_DEV", cmdDelDev: "DEL_DEV", cmdStartDev: "START_DEV", cmdStopDev: "STOP_DEV",
	cmdSetParams: "SET_PARAMS", cmdStartRecovery: "START_USER_RECOVERY", cmdEndRecovery: "END_USER_RECOVERY",
	cmdGetFeatures: "GET_FEATURES", cmdDelDevAsync: "DEL_DEV_ASYNC", cmdUpdateSize: "UPDATE_SIZE",
}

// Features of a device, and of the driver.
const (
	featRecovery        = 1 << 3  // the device outlives its server
	featReissue         = 1 << 4  // and what the server had not answered is given to the next one
	featIoctlEncode     = 1 << 6  // the numbers above
	featUserCopy        = 1 << 7  // data is read and written at /dev/ublkcN
	featUpdateSize      = 1 << 10 // UPDATE_SIZE (Linux 6.16)
	featNoPartitionScan = 1 << 18 // nothing reads the device when it is started

	featNeeded = featRecovery | featReissue | featIoctlEncode | featUserCopy
)

var featNames = []struct {
	bit         uint64
	what, since string
}{
	{featRecovery, "user recovery", "6.1"}, {featReissue, "reissue of unanswered requests", "6.1"},
	{featIoctlEncode, "ioctl encoding", "6.4"}, {featUserCopy, "user copy", "6.5"},
}

// States of a device.
const (
	stateDead     = 0
	stateLive     = 1
	stateQuiesced = 2 // its server is gone, requests wait
	stateFailIO   = 3
)

// noQueue is the queue of a command that is for none.
const noQueue = 0xffff

// anyID lets the driver choose a device's number.
const anyID = 0xffffffff

const ctrlCmdLen = 32

// A ctrlCmd is struct ublksrv_ctrl_cmd:
//
//	offset  size  field
//	0       4     dev_id
//	4       2     queue_id   0xffff if the command is for none
//	6       2     len        of the buffer
//	8       8     addr       of the buffer
//	16      8     data
//	24      8     path of the device, for unprivileged ones: zero
type ctrlCmd struct {
	id   uint32
	buf  []byte // in or out; must not lie on a stack
	data uint64
}

func (c *ctrlCmd) encode(addr uint64) []byte {
	b := make([]byte, ctrlCmdLen)
	ne.PutUint32(b, c.id)
	ne.PutUint16(b[4:], noQueue)
	ne.PutUint16(b[6:], uint16(len(c.buf)))
	ne.PutUint64(b[8:], addr)
	ne.PutUint64(b[16:], c.data)
	return b
}

const devInfoLen = 64

// A devInfo is struct ublksrv_ctrl_dev_info:
//
//	offset  size  field
//	0       2     nr_hw_queues
//	2       2     queue_depth
//	4       2     state
//	8       4     max_io_buf_bytes
//	12      4     dev_id
//	16      4     ublksrv_pid
//	24      8     flags
//	32      8     ublksrv_flags   the server's own
//	40      8     owner's uid and gid
type devInfo struct {
	queues, depth, state uint16
	maxIO, id            uint32
	pid                  int32
	flags, cookie        uint64
}

func (i *devInfo) encode() []byte {
	b := make([]byte, devInfoLen)
	ne.PutUint16(b, i.queues)
	ne.PutUint16(b[2:], i.depth)
	ne.PutUint32(b[8:], i.maxIO)
	ne.PutUint32(b[12:], i.id)
	ne.PutUint64(b[24:], i.flags)
	ne.PutUint64(b[32:], i.cookie)
	return b
}

func (i *devInfo) decode(b []byte) {
	i.queues, i.depth, i.state = ne.Uint16(b), ne.Uint16(b[2:]), ne.Uint16(b[4:])
	i.maxIO, i.id, i.pid = ne.Uint32(b[8:]), ne.Uint32(b[12:]), int32(ne.Uint32(b[16:]))
	i.flags, i.cookie = ne.Uint64(b[24:]), ne.Uint64(b[32:])
}

// Attributes of a device.
const (
	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2 // without it the kernel sends no flushes
	attrFUA           = 1 << 3

	paramBasic   = 1 << 0
	paramDiscard = 1 << 1
)

// paramsLen is as much of struct ublk_params as is used here: up to the discard part.
const paramsLen = 60

// params are struct ublk_params.
//
//	offset  size  field
//	0       4     len
//	4       4     types               which parts are there
//	8       4     attrs
//	12      4x1   shifts of the logical and physical block, optimal and least I/O
//	16      4     max_sectors         of 512 bytes, as all that follow
//	20      4     chunk_sectors
//	24      8     dev_sectors
//	32      8     virt_boundary_mask
//	40      4     discard_alignment
//	44      4     discard_granularity bytes
//	48      4     max_discard_sectors
//	52      4     max_write_zeroes_sectors
//	56      2     max_discard_segments
type params struct {
	attrs                                uint32
	logicalShift, physicalShift, optimal uint8
	maxSectors                           uint32
	sectors                              uint64
	granularity                          uint32 // of discards, bytes; 0: none
}

// maxRange is the longest discard or write-zeroes in sectors: what a bio can say.
const maxRange = (1<<32 - 1) >> 9

func (p *params) encode() []byte {
	b := make([]byte, paramsLen)
	ne.PutUint32(b, paramsLen)
	ne.PutUint32(b[4:], paramBasic|paramDiscard)
	ne.PutUint32(b[8:], p.attrs)
	b[12], b[13], b[14], b[15] = p.logicalShift, p.physicalShift, p.optimal, p.physicalShift
	ne.PutUint32(b[16:], p.maxSectors)
	ne.PutUint64(b[24:], p.sectors)
	ne.PutUint32(b[44:], max(p.granularity, 1<<p.logicalShift))
	if p.granularity > 0 {
		ne.PutUint32(b[48:], maxRange)
	}
	if p.attrs&attrReadOnly == 0 {
		ne.PutUint32(b[52:], maxRange)
	}
	ne.PutUint16(b[56:], 1)
	return b
}

// Operations and flags of a request.
const (
	opRead        = 0
	opWrite       = 1
	opFlush       = 2
	opDiscard     = 3
	opWriteZeroes = 5

	flagFUA     = 1 << 13
	flagNoUnmap = 1 << 15
)

func opName(op uint8) string {
	switch op {
	case opRead:
		return "read"
	case opWrite:
		return "write"
	case opFlush:
		return "flush"
	case opDiscard:
		return "discard"
	case opWriteZeroes:
		return "write zeroes"
	}
	return fmt.Sprintf("operation %d", op)
}

const ioDescLen = 24

// An ioDesc is struct ublksrv_io_desc, which the driver writes for each request:
//
//	offset  size  field
//	0       4     operation (bits 0-7) and flags
//	4       4     nr_sectors
//	8       8     start_sector
//	16      8     addr
type ioDesc struct {
	op    uint8
	flags uint32
	off   int64 // bytes
	n     int64
}

func decodeIODesc(b []byte) ioDesc {
	f := ne.Uint32(b)
	return ioDesc{op: uint8(f), flags: f &^ 0xff, off: int64(ne.Uint64(b[8:]) << 9), n: int64(ne.Uint32(b[4:])) << 9}
}

const ioCmdLen = 16

// encodeIOCmd writes struct ublksrv_io_cmd: queue, tag, result, address (unused).
func encodeIOCmd(b *[ioCmdLen]byte, queue, tag uint16, result int32) {
	ne.PutUint16(b[0:], queue)
	ne.PutUint16(b[2:], tag)
	ne.PutUint32(b[4:], uint32(result))
	ne.PutUint64(b[8:], 0)
}

// descsOffset is where the descriptors of a queue are in /dev/ublkcN, for mmap: room for the
// largest depth of each.
func descsOffset(queue int) int64 { return int64(queue) * 4096 * ioDescLen }

// dataOffset is where the data of a request is read and written in /dev/ublkcN.
func dataOffset(queue, tag uint16) int64 { return 1<<31 + int64(queue)<<41 + int64(tag)<<25 }
