// Package uring is the part of io_uring that a ublk server needs: passthrough commands
// (IORING_OP_URING_CMD), reads, and a poll on a descriptor, on rings that belong to one thread.
//
// A ring is used by one goroutine that stays on one OS thread from New to Close
// (runtime.LockOSThread): the kernel runs a ring's completions on the thread that submitted the
// requests, and takes requests from no other one.
//
//	r, err := uring.New(uring.Options{Entries: 64})
//	r.Command(fd, op, tag, cmd)         // fills a submission entry
//	err = r.Enter(1)                    // submits, waits for one completion
//	r.Reap(func(c uring.Completion) {}) // takes all completions that are there
//
// Source of the layouts and numbers: include/uapi/linux/io_uring.h (MIT).
package uring

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrFull: the submission queue has no free entry; Enter makes room.
var ErrFull = errors.New("submission queue full")

// Options of a ring.
type Options struct {
	// Entries is the length of the submission queue, rounded up to a power of two.
	Entries int
	// Completions is the length of the completion queue; 0 is twice Entries.
	Completions int
	// Wide makes submission entries of 128 bytes, for commands of up to 80 bytes. Otherwise a
	// command has at most 16.
	Wide bool
}

// A Completion is the end of a request.
type Completion struct {
	Data  uint64 // as given with the request
	Res   int32  // result, or a negative errno
	Flags uint32
}

// More says that the request goes on and will complete again (a poll with many shots).
func (c Completion) More() bool { return c.Flags&cqeMore != 0 }

// A Ring is an io_uring. It is not safe for concurrent use; see the package comment.
type Ring struct {
	fd   int
	wide bool

	ring, entries []byte // mappings

	// Of the submission queue. The kernel moves head, we move tail.
	sqHead, sqTail *uint32
	sqMask         uint32
	tail           uint32 // ours, not yet published
	pending        uint32 // entries filled since the last Enter
	calls          atomic.Uint64

	// Of the completion queue. The kernel moves tail, we move head.
	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           int // offset in ring
}

const (
	opPollAdd  = 6
	opRead     = 22
	opUringCmd = 46

	setupCQSize       = 1 << 3
	setupCoopTaskrun  = 1 << 8
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1

	enterGetEvents = 1 << 0

	offRing = 0
	offSQEs = 0x10000000

	cqeMore = 1 << 1

	pollAddMulti = 1 << 0
)

// New makes a ring. Errors name what to do: io_uring may be switched off on the host, or the kernel
// may be too old (6.1 is needed for completions that run only where they are waited for; before
// that the ring works without).
func New(o Options) (*Ring, error) {
	p := params{sqEntries: uint32(max(o.Entries, 1)), flags: setupCQSize | setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun}
	p.cqEntries = uint32(max(o.Completions, 2*o.Entries))
	if o.Wide {
		p.flags |= setupSQE128
	}
	ask := p
	fd, errno := setup(&ask)
	if errno == unix.EINVAL { // before Linux 6.1
		ask = p
		ask.flags &^= setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun
		fd, errno = setup(&ask)
	}
	switch errno {
	case 0:
	case unix.ENOSYS:
		return nil, fmt.Errorf("io_uring_setup: %w: this kernel is built without io_uring", errno)
	case unix.EPERM, unix.EACCES:
		return nil, fmt.Errorf("io_uring_setup: %w: io_uring is not allowed here (sysctl kernel.io_uring_disabled, or a seccomp filter)", errno)
	default:
		return nil, fmt.Errorf("io_uring_setup of %d entries: %w", o.Entries, errno)
	}
	r := &Ring{fd: fd, wide: o.Wide}
	if ask.features&(featSingleMmap|featNoDrop) != featSingleMmap|featNoDrop {
		unix.Close(fd)
		return nil, fmt.Errorf("io_uring has features 0x%x: want one mapping and no lost completions (Linux 5.5)", ask.features)
	}
	if err := r.mmap(&ask); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return r, nil
}

// mmap maps what ring and kernel share.
func (r *Ring) mmap(p *params) (err error) {
	size := max(int(p.sqOff.array)+4*int(p.sqEntries), int(p.cqOff.cqes)+cqeSize*int(p.cqEntries))
	r.ring, err = unix.Mmap(r.fd, offRing, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	r.entries, err = unix.Mmap(r.fd, offSQEs, r.entrySize()*int(p.sqEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		unix.Munmap(r.ring)
		return fmt.Errorf("map io_uring's entries: %w", err)
	}
	r.sqHead, r.sqTail = r.word(p.sqOff.head), r.word(p.sqOff.tail)
	r.cqHead, r.cqTail = r.word(p.cqOff.head), r.word(p.cqOff.tail)
	r.sqMask, r.cqMask = *r.word(p.sqOff.ringMask), *r.word(p.cqOff.ringMask)
	r.cqes = int(p.cqOff.cqes)
	for i := range p.sqEntries { // entries are used in order
		*r.word(p.sqOff.array + 4*i) = i
	}
	r.tail = *r.sqTail
	return nil
}

func (r *Ring) entrySize() int {
	if r.wide {
		return 128
	}
	return 64
}

// Close ends the ring. Requests that are under way are cancelled by the kernel, in its own time.
// Closing twice is fine.
func (r *Ring) Close() error {
	if r.fd < 0 {
		return nil
	}
	unix.Munmap(r.entries)
	unix.Munmap(r.ring)
	err := unix.Close(r.fd)
	r.fd = -1
	return err
}

// next returns a cleared submission entry.
func (r *Ring) next() ([]byte, error) {
	if r.tail-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil, ErrFull
	}
	n := r.entrySize()
	e := r.entries[int(r.tail&r.sqMask)*n:][:n]
	clear(e)
	r.tail++
	r.pending++
	return e, nil
}

// Command queues a passthrough command for the driver behind fd. It is copied.
func (r *Ring) Command(fd int, op uint32, data uint64, cmd []byte) error {
	if limit := r.entrySize() - 48; len(cmd) > limit {
		return fmt.Errorf("command of %d bytes, at most %d", len(cmd), limit)
	}
	e, err := r.next()
	if err != nil {
		return err
	}
	e[0] = opUringCmd
	ne.PutUint32(e[4:], uint32(fd))
	ne.PutUint32(e[8:], op)
	ne.PutUint64(e[32:], data)
	copy(e[48:], cmd)
	return nil
}

// Poll queues a poll that completes each time fd becomes ready for events (unix.POLLIN), for as
// long as its completions say More.
func (r *Ring) Poll(fd int, events uint32, data uint64) error {
	e, err := r.next()
	if err != nil {
		return err
	}
	e[0] = opPollAdd
	ne.PutUint32(e[4:], uint32(fd))
	ne.PutUint32(e[24:], pollAddMulti)
	ne.PutUint32(e[28:], events) // words are swapped on big-endian machines; this is built for none
	ne.PutUint64(e[32:], data)
	return nil
}

// Read queues a read into p, which lies outside the Go heap and stays where it is until the
// completion, whose result is the number of bytes.
func (r *Ring) Read(fd int, p []byte, off int64, data uint64) error {
	e, err := r.next()
	if err != nil {
		return err
	}
	e[0] = opRead
	ne.PutUint32(e[4:], uint32(fd))
	ne.PutUint64(e[8:], uint64(off))
	ne.PutUint64(e[16:], Address(p))
	ne.PutUint32(e[24:], uint32(len(p)))
	ne.PutUint64(e[32:], data)
	return nil
}

// Pending is how many requests wait for Enter.
func (r *Ring) Pending() int { return int(r.pending) }

// Calls is how often the ring has called the kernel (io_uring_enter). Any goroutine may ask.
func (r *Ring) Calls() uint64 { return r.calls.Load() }

// Enter submits what was queued and waits until at least wait completions are there. It returns
// early, with nil, when the thread gets a signal.
func (r *Ring) Enter(wait int) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	for {
		r.calls.Add(1)
		n, errno := enter(r.fd, r.pending, uint32(wait), enterGetEvents, wait > 0)
		switch errno {
		case 0:
			r.pending -= min(n, r.pending)
			if r.pending == 0 || n == 0 {
				return nil
			}
			// The kernel took a part: the next one failed to be submitted and has completed with
			// its error, or there was no memory. Go on with the rest.
			wait = 0
		case unix.EINTR:
			r.pending = r.tail - atomic.LoadUint32(r.sqHead)
			if r.pending == 0 {
				return nil
			}
		case unix.EAGAIN, unix.EBUSY:
			// No memory for requests, or completions have to be taken first.
			r.pending = r.tail - atomic.LoadUint32(r.sqHead)
			return nil
		default:
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
}

// Ready is how many completions can be taken.
func (r *Ring) Ready() int { return int(atomic.LoadUint32(r.cqTail) - *r.cqHead) }

// Reap takes the completions that are there and returns their number. fn may queue requests.
func (r *Ring) Reap(fn func(Completion)) int {
	head, tail := *r.cqHead, atomic.LoadUint32(r.cqTail)
	n := int(tail - head)
	for ; head != tail; head++ {
		e := r.ring[r.cqes+int(head&r.cqMask)*cqeSize:][:cqeSize]
		c := Completion{Data: ne.Uint64(e), Res: int32(ne.Uint32(e[8:])), Flags: ne.Uint32(e[12:])}
		atomic.StoreUint32(r.cqHead, head+1)
		fn(c)
	}
	return n
}
