package nbd

import "sync"

// Sizes of pooled buffers, in bytes. All start at a multiple of 4096: the Go runtime aligns
// objects of these sizes to their pages.
const (
	smallSize = 8 << 10   // small requests at workers
	inlineMax = 64 << 10  // reads and writes up to this are served inline
	batchSize = 128 << 10 // receive buffers, and data of replies that go out together
	pieceSize = 1 << 20   // longer requests are served in pieces of this
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
}{{size: smallSize}, {size: inlineMax}, {size: batchSize}, {size: pieceSize}, {size: wholeSize}}

// getBuffer returns a buffer of at least n bytes, n <= wholeSize. Its contents are undefined.
func getBuffer(n int) *buffer {
	p := &pools[sizeClass(n)]
	if b, ok := p.pool.Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, p.size), pool: &p.pool}
}

// sizeClass is the index in pools of the smallest buffers that hold n bytes.
func sizeClass(n int) int {
	i := 0
	for n > pools[i].size {
		i++
	}
	return i
}

// bufferSize is what getBuffer(n) really takes, 0 for 0.
func bufferSize(n int) int {
	if n == 0 {
		return 0
	}
	return pools[sizeClass(n)].size
}

func (b *buffer) put() { b.pool.Put(b) }

// zeros is what write zeroes without a dev.Zeroer writes. Never changed.
var zeros [256 << 10]byte

// A budget bounds the bytes that the tasks of all connections hold in buffers. A connection
// that holds none may always take some, so that one that stalls starves no other.
//
// Lock order: budget.mu, then workers.mu.
type budget struct {
	mu   sync.Mutex
	room sync.Cond // bytes were given back
	used int
	max  int
}

func newBudget(max int) *budget {
	b := &budget{max: max}
	b.room.L = &b.mu
	return b
}

// take waits until n more bytes fit, or the caller holds no others.
func (b *budget) take(n int, holdsOthers func() bool) {
	b.mu.Lock()
	for b.used+n > b.max && holdsOthers() {
		b.room.Wait()
	}
	b.used += n
	b.mu.Unlock()
}

func (b *budget) give(n int) {
	b.mu.Lock()
	b.used -= n
	b.room.Broadcast()
	b.mu.Unlock()
}
