package ublk

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// maxIO is the longest read and write in bytes.
const maxIO = 1 << 20

// classes are the sizes of buffers.
var classes = [...]int{16 << 10, 128 << 10, maxIO}

// A buffer is page-aligned memory outside the Go heap for the data of one request.
type buffer struct {
	mem   []byte
	class int
}

// buffers hands out buffers. Those of a device that is idle are given back to the system. Safe
// for concurrent use.
type buffers struct {
	mu   sync.Mutex
	free [len(classes)][]*buffer // guarded by mu
	out  int                     // guarded by mu; handed out, for tests
}

// get returns a buffer for n bytes.
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
	mem, err := unix.Mmap(-1, 0, classes[class], unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		p.mu.Lock()
		p.out--
		p.mu.Unlock()
		return nil, fmt.Errorf("request buffer of %d bytes: %w", classes[class], err)
	}
	return &buffer{mem: mem, class: class}, nil
}

func (p *buffers) put(b *buffer) {
	p.mu.Lock()
	p.out--
	p.free[b.class] = append(p.free[b.class], b)
	p.mu.Unlock()
}

// trim gives the memory of all unused buffers back to the system.
func (p *buffers) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c, l := range p.free {
		for _, b := range l {
			unix.Munmap(b.mem)
		}
		p.free[c] = nil
	}
}
