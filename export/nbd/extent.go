package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"mica/dev"
)

// A run is a piece of the export of one state, a multiple of minBlock bytes long.
type run struct {
	n     int64
	flags uint32 // stateHole, stateZero
}

// Bounds of what one request may make the server collect.
const (
	maxStatusRuns = 4096
	maxReadRuns   = 16   // more than that are answered with data
	minHole       = 4096 // bytes; shorter ones are answered with data
)

// runs describes [off, off+n), multiples of minBlock, from the device's extents; at most limit
// runs of different state, and at least one. It may end before off+n.
func (e *export) runs(off, n int64, limit int) ([]run, error) {
	var out []run
	var part uint32 // state of the sector that the extents so far end within
	pos := off      // extents cover [off, pos)
	end := off + n
	for pos < end {
		exts, err := e.extenter.Extents(pos, end-pos)
		if err != nil {
			return nil, err
		}
		if len(exts) == 0 {
			return nil, fmt.Errorf("extents of [%d, +%d): none", pos, end-pos)
		}
		for _, x := range exts {
			if x.Off != pos || x.Len <= 0 {
				return nil, fmt.Errorf("extents of [%d, +%d): got [%d, +%d)", pos, end-pos, x.Off, x.Len)
			}
			x.Len = min(x.Len, end-pos)
			f := stateOf(x)
			if r := pos % minBlock; r != 0 { // inside a sector: it is what all its bytes are
				f2 := part & f
				k := min(x.Len, minBlock-r)
				part = f2
				pos += k
				x.Len -= k
				if pos%minBlock != 0 {
					continue
				}
				out = addRun(out, minBlock, f2)
			}
			if k := x.Len &^ (minBlock - 1); k > 0 {
				out = addRun(out, k, f)
				pos += k
				x.Len -= k
			}
			if x.Len > 0 {
				part = f
				pos += x.Len
			}
			if len(out) > limit {
				return out[:limit], nil
			}
			if pos == end {
				break
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("extents of [%d, +%d): none", off, n)
	}
	return out, nil
}

func stateOf(x dev.Extent) (f uint32) {
	if x.Hole {
		f |= stateHole
	}
	if x.Zero {
		f |= stateZero
	}
	return f
}

func addRun(out []run, n int64, f uint32) []run {
	if k := len(out); k > 0 && out[k-1].flags == f {
		out[k-1].n += n
		return out
	}
	return append(out, run{n, f})
}

// serveStatus answers BLOCK_STATUS with one BLOCK_STATUS chunk: context id, then length and
// state of each run.
func (c *conn) serveStatus(t *task) {
	limit := maxStatusRuns
	if t.req.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	runs, err := c.e.runs(t.off, int64(t.req.n), limit)
	if errors.Is(err, dev.ErrUnsupported) {
		runs, err = []run{{n: int64(t.req.n)}}, nil // "allocated" is always a safe answer
	}
	if err != nil {
		c.sendError(t, err)
		return
	}
	b := make([]byte, chunkSize, chunkSize+4+8*len(runs))
	putChunk(b, chunkFlagDone, chunkBlockStatus, t.req.cookie, uint32(4+8*len(runs)))
	b = binary.BigEndian.AppendUint32(b, contextAllocationID)
	for _, r := range runs {
		b = binary.BigEndian.AppendUint32(b, uint32(r.n))
		b = binary.BigEndian.AppendUint32(b, r.flags)
	}
	t.bufs[0] = b
	c.sendMu.Lock()
	c.sendLocked(t.bufs[:1])
	c.sendMu.Unlock()
}

// readHoles serves a READ, or a piece of one, of a range with holes in it, and tells whether it
// did; if not, nothing was done.
func (c *conn) readHoles(t *task) bool {
	n := int64(len(t.data))
	runs, err := c.e.runs(t.off, n, maxReadRuns)
	if err != nil {
		return false // the read will tell
	}
	runs = readRuns(runs, n)
	if len(runs) == 1 && runs[0].flags == 0 || len(runs) > 1 && t.req.flags&cmdFlagDF != 0 {
		return false
	}
	pos := int64(0)
	for _, r := range runs {
		if r.flags == 0 {
			if err := readFull(c.e, t.data[pos:pos+r.n], t.off+pos); err != nil {
				c.endRead(t, err)
				return true
			}
		}
		pos += r.n
	}
	c.sendMu.Lock()
	last, err := c.pieceDoneLocked(t, nil)
	if err == nil {
		c.sendLocked(chunksOf(t, runs, last))
	}
	c.sendMu.Unlock()
	if err != nil {
		c.sendError(t, err)
	}
	return true
}

// readRuns keeps zeros of some length (flags stateZero) and makes everything else data
// (flags 0), up to n bytes.
func readRuns(runs []run, n int64) []run {
	var out []run
	for _, r := range runs {
		f := r.flags & stateZero
		if r.n < minHole {
			f = 0
		}
		out = addRun(out, r.n, f)
		n -= r.n
	}
	if n > 0 { // the runs stopped early
		out = addRun(out, n, 0)
	}
	return out
}

// chunksOf makes the chunks of a reply, or a piece of one; the last gets the flags.
func chunksOf(t *task, runs []run, last uint16) [][]byte {
	var bufs [][]byte
	pos := int64(0)
	for i, r := range runs {
		flags := uint16(0)
		if i == len(runs)-1 {
			flags = last
		}
		off := uint64(t.off + pos)
		h := make([]byte, holeChunkSize)
		if r.flags != 0 {
			putHoleChunk(h, flags, t.req.cookie, off, int(r.n))
			bufs = append(bufs, h)
		} else {
			putDataChunk(h, flags, t.req.cookie, off, int(r.n))
			bufs = append(bufs, h[:dataChunkSize], t.data[pos:pos+r.n])
		}
		pos += r.n
	}
	return bufs
}
