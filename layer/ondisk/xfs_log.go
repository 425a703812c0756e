package ondisk

import (
	"encoding/binary"
	"errors"
	"io"

	"mica/dev"
)

// The log is a ring of records, each of which begins at a 512-byte sector with a header. No other
// sector can begin with the header's magic: the first four bytes of every other one are replaced by
// the number of the log's round.
//
//	0       4     magic      0xfeedbabe
//	8       4     version    1 or 2
//	16      8     lsn        round << 32 | sector: the newest record has the highest
//	40      4     num_ops
//	320     4     size       of the buffer that it was written from, bytes; the header has one sector for
//	                         each 32 KiB of it (version 2)
//
// An operation's header is behind that, its flags in byte 9. An unmount writes a record of one operation
// with flag 0x20; if that is the newest record, there is nothing to replay.
//
// The first four bytes of a sector are the number of the round in which it was written; of a header
// they are its magic, and the next four the number. So the place where the newest record ends is where
// the number goes down by one, and can be found without reading all of the log. Around it there may be
// holes: records are written several at a time (at most 8 of 256 KiB), and as many sectors ahead are
// cleared by a mount.
//
// Source: "XFS Algorithms & Data Structures", chapter on the journaling log.
const (
	xfsRecord    = 0xfeedbabe
	xfsUnmounted = 0x20
	xfsHeaderFor = 32 << 10 // bytes of a record for which its header has one sector
	xfsMaxLog    = 2 << 30
	xfsAround    = 4 << 20 // bytes before and behind the end that are looked through
)

// An xfsLog is length bytes of a device from at.
type xfsLog struct {
	d          dev.Device
	at, length int64
}

// clean tells whether the newest record is that of an unmount.
func (l xfsLog) clean() (bool, error) {
	newest, err := l.newest()
	if err != nil || newest.off < 0 {
		return false, err
	}
	be, rec := binary.BigEndian, make([]byte, xfsSector)
	if _, err := l.d.ReadAt(rec, l.at+newest.off); err != nil {
		return false, err
	}
	if be.Uint32(rec[40:]) != 1 {
		return false, nil
	}
	sectors := int64(1)
	if size := int64(be.Uint32(rec[320:])); be.Uint32(rec[8:])&2 != 0 && size > xfsHeaderFor {
		sectors = (size + xfsHeaderFor - 1) / xfsHeaderFor
	}
	op := (newest.off + sectors*xfsSector) % l.length // the log is a ring
	if _, err := l.d.ReadAt(rec[:16], l.at+op); err != nil {
		return false, err
	}
	return rec[9]&xfsUnmounted != 0, nil
}

// An xfsFound is a record: its position in the log, -1 if there is none, and its lsn.
type xfsFound struct {
	off int64
	lsn uint64
}

// newest finds the newest record, near the place where the rounds meet. Where that does not look as it
// should, it looks through all of the log.
func (l xfsLog) newest() (xfsFound, error) {
	found := xfsFound{off: -1}
	if l.length > 4*xfsAround {
		first, err := l.round(0)
		if err != nil {
			return found, err
		}
		end, err := l.end(first)
		if err != nil {
			return found, err
		}
		for off := end - xfsAround; off < end+xfsAround; { // around the end of the ring in two pieces
			at := (off + l.length) % l.length
			n := min(end+xfsAround-off, l.length-at)
			if err := l.scan(at, n, &found); err != nil {
				return found, err
			}
			off += n
		}
		if found.off >= 0 && uint32(found.lsn>>32) == first {
			return found, nil
		}
	}
	found = xfsFound{off: -1}
	return found, l.scan(0, l.length, &found)
}

// end is where the sectors that were written in round first end, which is that of the first one.
func (l xfsLog) end(first uint32) (int64, error) {
	low, high := int64(0), l.length/xfsSector // low is of that round, high is not, or is the end
	for high-low > 1 {
		mid := (low + high) / 2
		n, err := l.round(mid * xfsSector)
		if err != nil {
			return 0, err
		}
		if n == first {
			low = mid
		} else {
			high = mid
		}
	}
	return high * xfsSector, nil
}

// scan looks for the newest record in a part of the log, and puts it into found if it is newer than what
// is there. It reads what is allocated.
func (l xfsLog) scan(off, n int64, found *xfsFound) error {
	be := binary.BigEndian
	return eachAllocated(l.d, l.at+off, n, func(p []byte, at int64) {
		for i := 0; i+xfsSector <= len(p); i += xfsSector {
			if be.Uint32(p[i:]) != xfsRecord {
				continue
			}
			if lsn := be.Uint64(p[i+16:]); found.off < 0 || lsn >= found.lsn {
				*found = xfsFound{off: at + int64(i) - l.at, lsn: lsn}
			}
		}
	})
}

// round is the number of the round in which a sector was written; 0: never.
func (l xfsLog) round(off int64) (uint32, error) {
	var b [8]byte
	if _, err := l.d.ReadAt(b[:], l.at+off); err != nil {
		return 0, err
	}
	if n := binary.BigEndian.Uint32(b[:]); n != xfsRecord {
		return n, nil
	}
	return binary.BigEndian.Uint32(b[4:8]), nil
}

// eachAllocated calls fn with the contents of what is allocated in a range, in pieces.
func eachAllocated(d dev.Device, off, n int64, fn func(p []byte, off int64)) error {
	buf := make([]byte, 1<<20)
	ext, _ := d.(dev.Extenter)
	for end := off + n; off < end; {
		step := min(int64(len(buf)), end-off)
		if ext != nil {
			list, err := ext.Extents(off, end-off)
			if err != nil {
				return err
			}
			if len(list) > 0 && list[0].Off <= off {
				left := list[0].Off + list[0].Len - off
				if list[0].Hole || list[0].Zero {
					off += left
					continue
				}
				step = min(step, left)
			}
		}
		if _, err := d.ReadAt(buf[:step], off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		fn(buf[:step], off)
		off += step
	}
	return nil
}
