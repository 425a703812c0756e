package nbd

import "sync"

// Sizes of pooled buffers, in bytes. All start at a page boundary: the Go runtime allocates
// objects of more than 32 KiB in whole pages.
const (
	inlineMax = 64 << 10  // reads and writes up to this are served inline
	pieceSize = 256 << 10 // longer ones are served in pieces of this
	wholeSize = 2 << 20   // longest read that can be answered in one chunk; see conn.bigRead
)

// A buffer comes from getBuffer and goes back with put, once.
type buffer struct {
	b    []byte
	pool *sync.Pool
}

var pools = [...]struct {
	size int
	pool sync.Pool
}{{size: inlineMax}, {size: pieceSize}, {size: wholeSize}}

// getBuffer returns a buffer of at least n bytes, n <= wholeSize. Its contents are undefined.
func getBuffer(n int) *buffer {
	i := 0
	for n > pools[i].size {
		i++
	}
	p := &pools[i]
	if b, ok := p.pool.Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, p.size), pool: &p.pool}
}

func (b *buffer) put() { b.pool.Put(b) }

// zeros is what write zeroes without a dev.Zeroer writes. Never changed.
var zeros [pieceSize]byte
