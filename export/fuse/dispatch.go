package fuse

import (
	"errors"
	"fmt"
	"time"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// dispatch does or delegates one request. It returns the buffer that the thread goes on with:
// b, or another one if b went with the request. at is the pace of the thread, and alone says that it
// has found nothing to read just before this request.
func (s *server) dispatch(r *request, b *buffer, at *pace, alone bool) (*buffer, error) {
	switch r.op {
	case opRead:
		return s.read(r, b, at, alone)
	case opWrite:
		return s.write(r, b, at, alone)
	case opFsync, opFallocate, opLseek:
		if r.node != diskNode {
			s.reply(b, r.unique, unix.EINVAL, 0)
			return b, nil
		}
		if r.op == opFsync && alone && s.atWork.Load() == 0 && s.flushes.short() {
			s.reply(b, r.unique, errnoOf(s.flush()), 0)
			return b, nil
		}
		return s.delegate(r, b, -1, 0)
	case opForget, opBatchForget, opInterrupt:
		// Nothing to forget; what has begun is finished. None of them has a reply.
		return b, nil
	case opInit:
		return b, s.init(r, b)
	case opDestroy:
		s.reply(b, r.unique, 0, 0)
		return b, nil
	}
	n, errno := s.meta(r, b.mem[room:])
	s.reply(b, r.unique, errno, n)
	return b, nil
}

// clip returns how many of the bytes [off, off+n) lie inside the device.
func (s *server) clip(off uint64, n uint32) int {
	size := uint64(s.size.Load())
	if off >= size {
		return 0
	}
	return int(min(uint64(n), size-off))
}

// here tells whether the thread should try to serve a request of n bytes itself.
func (s *server) here(n int, at *pace, alone bool) bool {
	return s.try != nil && n <= s.inlineMax && at.begin(!alone || s.atWork.Load() > 0)
}

func (s *server) read(r *request, b *buffer, at *pace, alone bool) (*buffer, error) {
	if r.node != diskNode {
		s.reply(b, r.unique, unix.EISDIR, 0)
		return b, nil
	}
	n := s.clip(r.off, r.size)
	if n == 0 {
		s.reply(b, r.unique, 0, 0)
		return b, nil
	}
	if s.here(n, at, alone) {
		err := s.try.TryReadAt(b.payload(n), int64(r.off))
		if err == nil {
			at.served(n)
			s.reply(b, r.unique, 0, n)
			return b, nil
		}
		if !errors.Is(err, dev.ErrWouldBlock) {
			s.reply(b, r.unique, errnoOf(err), 0)
			return b, nil
		}
	}
	r.size = uint32(n)
	return s.delegate(r, b, reads, n)
}

func (s *server) write(r *request, b *buffer, at *pace, alone bool) (*buffer, error) {
	switch {
	case r.node != diskNode:
		s.reply(b, r.unique, unix.EISDIR, 0)
		return b, nil
	case s.readOnly:
		s.reply(b, r.unique, unix.EROFS, 0)
		return b, nil
	case s.clip(r.off, r.size) != len(r.data):
		s.reply(b, r.unique, unix.ENOSPC, 0) // the file does not grow
		return b, nil
	}
	if s.here(len(r.data), at, alone) {
		err := s.try.TryWriteAt(r.data, int64(r.off))
		if err == nil {
			at.served(len(r.data))
			s.replyWritten(b, r.unique, r.size)
			return b, nil
		}
		if !errors.Is(err, dev.ErrWouldBlock) {
			s.reply(b, r.unique, errnoOf(err), 0)
			return b, nil
		}
	}
	return s.delegate(r, b, writes, len(r.data))
}

// delegate gives a request to a goroutine of its own and returns the buffer to go on with. The
// longest writes take b with them, others are copied out of it: b is 1 MiB of locked memory.
func (s *server) delegate(r *request, b *buffer, kind, bytes int) (*buffer, error) {
	sl, refuse := s.slot(kind, bytes, false)
	if refuse {
		// Many wait, maybe for space: if this one would have to, it needs a place among the late.
		_, err := s.noWait.WriteAtNoWait(r.data, int64(r.off))
		if errors.Is(err, dev.ErrNoSpace) {
			sl, refuse = s.slot(kind, bytes, true)
		}
		if refuse {
			s.written(r, b, err)
			return b, nil
		}
	}
	next := b
	var err error
	if kind == writes && bytes > classes[1] {
		if next, err = s.bufs.get(maxIO); err == nil {
			sl.buf = b
		}
	} else {
		if sl.buf, err = s.bufs.get(bytes); err == nil && kind == writes {
			p := sl.buf.payload(bytes)
			copy(p, r.data)
			r.data = p
		}
	}
	if err != nil {
		s.release(sl)
		s.log.Error("fuse request", "op", r.op, "error", err)
		s.reply(b, r.unique, unix.ENOMEM, 0)
		return b, nil
	}
	sl.req = *r
	s.workers.Add(1)
	s.atWork.Add(1)
	go sl.run()
	return next, nil
}

// slot takes a place for a request that may wait, and waits for one if there is none. refuse:
// the request is a write and the device can refuse; and half of the places are taken by writes, or
// they hold too much payload.
//
// late: the request is a write that the device has refused for want of space. Its payload counts
// against what the exporter holds for all such writes.
func (s *server) slot(kind, bytes int, late bool) (sl *slot, refuse bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		fits := kind < 0 || late || s.held[kind]+bytes <= waiterBytes
		if kind == writes && s.noWait != nil && (s.waiting[writes] >= maxBackground/2 || !fits) {
			return nil, true
		}
		if fits && len(s.slots) > 0 {
			sl = s.slots[len(s.slots)-1]
			s.slots = s.slots[:len(s.slots)-1]
			break
		}
		if fits && s.made < maxBackground {
			s.made++
			sl = &slot{}
			sl.run = func() { s.work(sl) }
			break
		}
		s.cond.Wait()
	}
	if late && s.crew.late.Add(int64(bytes)) > lateBytes {
		s.crew.late.Add(-int64(bytes))
		s.slots = append(s.slots, sl)
		return nil, true
	}
	sl.kind, sl.bytes, sl.late = kind, bytes, late
	if kind >= 0 {
		s.waiting[kind]++
	}
	if kind >= 0 && !late {
		s.held[kind] += bytes
	}
	return sl, false
}

func (s *server) release(sl *slot) {
	s.mu.Lock()
	if sl.kind >= 0 {
		s.waiting[sl.kind]--
	}
	if sl.late {
		s.crew.late.Add(-int64(sl.bytes))
	} else if sl.kind >= 0 {
		s.held[sl.kind] -= sl.bytes
	}
	sl.buf, sl.req = nil, request{}
	s.slots = append(s.slots, sl)
	s.mu.Unlock()
	s.cond.Broadcast()
}

// work does one delegated request.
func (s *server) work(sl *slot) {
	defer s.workers.Done()
	defer s.atWork.Add(-1)
	r, b := &sl.req, sl.buf
	switch r.op {
	case opRead:
		n, err := s.d.ReadAt(b.payload(int(r.size)), int64(r.off))
		if n == int(r.size) {
			err = nil // io.EOF may come with a full read
		}
		if err != nil {
			n = 0
		}
		s.reply(b, r.unique, errnoOf(err), n)
	case opWrite:
		_, err := s.d.WriteAt(r.data, int64(r.off))
		s.written(r, b, err)
	case opFsync:
		s.reply(b, r.unique, errnoOf(s.flush()), 0)
	case opFallocate:
		s.reply(b, r.unique, errnoOf(s.fallocate(r)), 0)
	case opLseek:
		off, err := s.seek(int64(r.off), r.flags)
		ne.PutUint64(b.mem[room:], uint64(off))
		if errno := errnoOf(err); errno != 0 {
			s.reply(b, r.unique, errno, 0)
		} else {
			s.reply(b, r.unique, 0, 8)
		}
	}
	s.bufs.put(b)
	s.release(sl)
}

// written answers a write.
func (s *server) written(r *request, b *buffer, err error) {
	if err != nil {
		s.reply(b, r.unique, errnoOf(err), 0)
		return
	}
	s.replyWritten(b, r.unique, r.size)
}

// init answers INIT and notes what the kernel can do.
func (s *server) init(r *request, b *buffer) error {
	if r.major != protoMajor || r.minor < minMinor {
		s.reply(b, r.unique, unix.EPROTO, 0)
		return fmt.Errorf("kernel speaks FUSE %d.%d: want %d.%d or later (Linux 5.4): %w", r.major, r.minor, protoMajor, minMinor, errEnded)
	}
	caps := r.caps & (capAsyncRead | capBigWrites | capAsyncDIO | capParallelDirop | capMaxPages | capInitExt | capHasResend)
	if caps&capAsyncDIO == 0 {
		s.log.Warn("kernel without FUSE_ASYNC_DIO: requests of a device are served one by one")
	}
	out := b.mem[room : room+initOutLen]
	clear(out)
	minor := min(r.minor, protoMinor)
	ne.PutUint32(out, protoMajor)
	ne.PutUint32(out[4:], minor)
	ne.PutUint32(out[8:], maxIO) // max_readahead
	ne.PutUint32(out[12:], uint32(caps))
	ne.PutUint16(out[16:], maxBackground)
	ne.PutUint16(out[18:], maxBackground*3/4) // congestion threshold
	ne.PutUint32(out[20:], maxIO)             // max_write
	ne.PutUint32(out[24:], 1)                 // time granularity, ns
	ne.PutUint16(out[28:], maxIO/4096)        // max_pages
	ne.PutUint32(out[32:], uint32(caps>>32))
	s.kernel = features{Minor: r.minor, Resend: caps&capHasResend != 0}
	s.reply(b, r.unique, 0, initOutLen)
	if !s.initialised() {
		close(s.ready)
	}
	return nil
}

// forever is the time in seconds for which the kernel may believe names and attributes. They
// change only by resized, which tells it.
const forever = uint64(10 * 365 * 24 * time.Hour / time.Second)

// meta does the requests about names and attributes. It writes the reply to out and returns its
// length.
func (s *server) meta(r *request, out []byte) (int, unix.Errno) {
	switch r.op {
	case opLookup:
		if r.node != rootNode || string(r.name) != diskName {
			return 0, unix.ENOENT
		}
		clear(out[:entryOutLen])
		ne.PutUint64(out, diskNode)
		ne.PutUint64(out[16:], forever) // entry
		ne.PutUint64(out[24:], forever) // attributes
		s.attr(out[40:], diskNode)
		return entryOutLen, 0
	case opGetattr:
		if r.node != rootNode && r.node != diskNode {
			return 0, unix.ENOENT
		}
		clear(out[:attrOutLen])
		ne.PutUint64(out, forever)
		s.attr(out[16:], r.node)
		return attrOutLen, 0
	case opSetattr:
		return 0, unix.EPERM
	case opOpen:
		if r.node != diskNode {
			return 0, unix.EISDIR
		}
		if s.readOnly && r.flags&unix.O_ACCMODE != unix.O_RDONLY {
			return 0, unix.EROFS
		}
		clear(out[:16])
		ne.PutUint32(out[8:], openDirectIO|openParallelWrites)
		return 16, 0
	case opOpendir:
		if r.node != rootNode {
			return 0, unix.ENOTDIR
		}
		clear(out[:16])
		return 16, 0
	case opReaddir:
		return readdir(out, r.off, int(r.size)), 0
	case opRelease, opReleasedir, opFlush:
		return 0, 0
	case opStatfs:
		clear(out[:statfsOutLen])
		bs := uint64(s.blockSize)
		ne.PutUint64(out, (uint64(s.size.Load())+bs-1)/bs)
		ne.PutUint64(out[24:], 2) // files
		ne.PutUint32(out[40:], s.blockSize)
		ne.PutUint32(out[44:], 255)
		ne.PutUint32(out[48:], s.blockSize)
		return statfsOutLen, 0
	}
	return 0, unix.ENOSYS
}

// attr writes the 88 bytes of attributes of a node.
func (s *server) attr(out []byte, node uint64) {
	mode, nlink, size := uint32(unix.S_IFDIR|0o500), uint32(2), uint64(0)
	if node == diskNode {
		mode, nlink, size = unix.S_IFREG|0o600, 1, uint64(s.size.Load())
		if s.readOnly {
			mode = unix.S_IFREG | 0o400
		}
	}
	ne.PutUint64(out, node)
	ne.PutUint64(out[8:], size)
	ne.PutUint64(out[16:], (size+511)/512)
	for i := range 3 { // atime, mtime, ctime
		ne.PutUint64(out[24+8*i:], uint64(s.epoch.Unix()))
		ne.PutUint32(out[48+4*i:], uint32(s.epoch.Nanosecond()))
	}
	ne.PutUint32(out[60:], mode)
	ne.PutUint32(out[64:], nlink)
	ne.PutUint32(out[80:], 4096) // block size for stat
}

// readdir lists the root directory from entry off into at most size bytes.
func readdir(out []byte, off uint64, size int) int {
	entries := []struct {
		name string
		node uint64
		kind uint32
	}{{".", rootNode, unix.DT_DIR}, {"..", rootNode, unix.DT_DIR}, {diskName, diskNode, unix.DT_REG}}
	n := 0
	for i := off; i < uint64(len(entries)); i++ {
		e := entries[i]
		l := 24 + (len(e.name)+7)&^7
		if n+l > size {
			break
		}
		clear(out[n : n+l])
		ne.PutUint64(out[n:], e.node)
		ne.PutUint64(out[n+8:], i+1)
		ne.PutUint32(out[n+16:], uint32(len(e.name)))
		ne.PutUint32(out[n+20:], e.kind)
		copy(out[n+24:], e.name)
		n += l
	}
	return n
}
