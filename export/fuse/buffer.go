package fuse

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// maxIO is the longest READ and WRITE in bytes: max_write, and 256 pages.
const maxIO = 1 << 20

// room is the space before the payload of a buffer: headers end where the payload begins, so
// that the payload is page-aligned and header and payload are one piece of memory.
const room = 4096

// payload sizes of the buffers that hold requests which wait.
var classes = [...]int{16 << 10, 128 << 10, maxIO}

// A buffer is memory outside the Go heap for one request and its reply. It belongs to one
// request from the read of /dev/fuse until its reply is written, and is never shared.
type buffer struct {
	mem   []byte // room + payload
	class int
}

// in is where a request is read to: a WRITE's data lands at room.
func (b *buffer) in() []byte { return b.mem[room-inHeaderLen-writeInLen:] }

// payload is the part for n bytes of data.
func (b *buffer) payload(n int) []byte { return b.mem[room : room+n : room+n] }

// spareBuffers is how many unused buffers of each class are kept while some device is busy.
var spareBuffers = [len(classes)]int{64, 32, 16}

// spareSmall is how many of the smallest are kept for ever: attaching a device needs one.
const spareSmall = 4

// buffers hands out the buffers of a crew. When no device is busy the unused ones are given back to
// the system. Safe for concurrent use.
type buffers struct {
	mu   sync.Mutex
	free [len(classes)][]*buffer // guarded by mu
	out  int                     // guarded by mu; buffers handed out, for tests
}

// get returns a buffer for n bytes of payload.
func (p *buffers) get(n int) (*buffer, error) {
	class := 0
	for classes[class] < n {
		class++
	}
	p.mu.Lock()
	p.out++
	if l := p.free[class]; len(l) > 0 {
		b := l[len(l)-1]
		p.free[class] = l[:len(l)-1]
		p.mu.Unlock()
		return b, nil
	}
	p.mu.Unlock()
	mem, err := unix.Mmap(-1, 0, room+classes[class], unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil && classes[class] == maxIO {
		populate(mem)
	}
	if err != nil {
		p.mu.Lock()
		p.out--
		p.mu.Unlock()
		return nil, fmt.Errorf("request buffer of %d bytes: %w", room+classes[class], err)
	}
	return &buffer{mem: mem, class: class}, nil
}

// populate brings all of a buffer that requests are read to into memory, and keeps it there. If a
// page had to be faulted in while the kernel copies a request to it, and the process were killed
// just then, the kernel would answer the request with EIO: a successor could not serve it.
func populate(mem []byte) {
	if unix.Mlock(mem) == nil {
		return
	}
	for i := 0; i < len(mem); i += 4096 { // no permission to lock: without swap this is as good
		mem[i] = 0
	}
}

func (p *buffers) put(b *buffer) {
	p.mu.Lock()
	p.out--
	keep := len(p.free[b.class]) < spareBuffers[b.class]
	if keep {
		p.free[b.class] = append(p.free[b.class], b)
	}
	p.mu.Unlock()
	if !keep {
		unix.Munmap(b.mem)
	}
}

// trim gives the memory of unused buffers back to the system, but for a few of the small ones.
func (p *buffers) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c, l := range p.free {
		keep := 0
		if c == 0 {
			keep = min(len(l), spareSmall)
		}
		for _, b := range l[keep:] {
			unix.Munmap(b.mem)
		}
		clear(l[keep:])
		p.free[c] = l[:keep]
	}
}
