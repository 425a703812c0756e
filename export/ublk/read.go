package ublk

import (
	"errors"

	"mica/dev"

	"golang.org/x/sys/unix"
)

// Reads of what is not in the page cache. A thread that waited for the disk would make all others
// wait, a worker for each costs more changes of threads than the read itself. So the thread of the
// queue takes what is there at once, and lets its ring read the rest.

// maxReading bounds the bytes in buffers of a queue's reads under way; others go to workers, which
// have their own bounds.
const maxReading = 4 << 20

// After so many reads in a row that the page cache did not have, it is asked only now and then: the
// ring begins many reads with one call, and the disk gets them together.
const (
	missesFor = 4
	lookEvery = 15
)

// tryPlaced serves a read whose place on the medium is known, or begins it.
func (q *queue) tryPlaced(t *task) error {
	s := q.s
	if s.noNowait.Load() {
		return dev.ErrWouldBlock
	}
	place, ok := s.place.PlaceRead(t.off, t.n)
	if !ok {
		return dev.ErrWouldBlock
	}
	if q.misses >= missesFor && q.unlooked < lookEvery {
		q.unlooked++
		return q.beginRead(t, place)
	}
	q.unlooked = 0
	p := q.own(t.n)
	if p == nil {
		place.Release()
		return dev.ErrWouldBlock
	}
	n, errno := sysPreadNow(place.FD, p, place.Off)
	if errno == 0 && n == len(p) {
		q.misses = 0
		place.Release()
		err := s.copyOut(t, p)
		q.pace.start()
		return err
	}
	switch errno {
	case 0, unix.EAGAIN, unix.EINTR:
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL: // a file system in memory has nothing to wait for
		s.noNowait.Store(true)
		place.Release()
		return dev.ErrWouldBlock
	default:
		place.Release()
		return dev.ErrWouldBlock // ReadAt says what is wrong
	}
	q.misses = min(q.misses+1, missesFor)
	return q.beginRead(t, place)
}

// beginRead lets the ring read.
func (q *queue) beginRead(t *task, place dev.Place) error {
	b, err := q.s.bufs.get(int(t.n))
	if err == nil && q.reading+len(b.mem) > maxReading {
		q.s.bufs.put(b)
		err = errors.New("too many bytes")
	}
	if err != nil {
		place.Release()
		return dev.ErrWouldBlock
	}
	t.buf, t.place = b, place
	q.reading += len(b.mem)
	q.submit(func() error { return q.ring.Read(place.FD, b.mem[:t.n], place.Off, readData|uint64(t.tag)) })
	q.s.ringReads.Add(1)
	return errLater
}

// read is the completion of a read.
func (q *queue) read(t *task, res int32) {
	err := error(dev.ErrWouldBlock) // what failed or is short is repeated by a worker
	if int64(res) == t.n {
		err = q.s.copyOut(t, t.buf.mem[:t.n])
	}
	q.endRead(t)
	q.end(t, err)
}

// endRead gives back what a read under way holds.
func (q *queue) endRead(t *task) {
	if t.buf == nil {
		return
	}
	t.place.Release()
	q.reading -= len(t.buf.mem)
	q.s.bufs.put(t.buf)
	t.buf = nil
}
