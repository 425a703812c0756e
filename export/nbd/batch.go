package nbd

// A batch collects the replies to requests that were served inline, until they are sent
// together. Only the connection's reader uses it.
//
//	hdr   |h0|h1|h2|...       headers, back to back
//	slab  |data0   |data1|    data of reads, each at a multiple of 4096
//	bufs  h0 data0 h1 data1 h2+h3
type batch struct {
	bufs [][]byte
	hdr  [batchMax * dataChunkSize]byte
	hn   int
	last int // start of the last header-only entry of bufs that may be extended, or -1
	slab *buffer
	sn   int
	n    int // replies
}

// batchMax bounds the replies in a batch, so that the client need not wait for too many.
const batchMax = 32

func (b *batch) full() bool { return b.n == batchMax }

// data returns memory for the data of one read of n <= inlineMax bytes, or nil if the batch
// must be sent first. It is part of the batch only once addRead was called.
func (b *batch) data(n int) []byte {
	if b.slab == nil {
		b.slab, b.sn = getBuffer(batchSize), 0
	}
	if b.sn+n > batchSize {
		return nil
	}
	return b.slab.b[b.sn : b.sn+n]
}

// header returns memory for a header of n <= dataChunkSize bytes and adds it to the batch.
func (b *batch) header(n int) []byte {
	h := b.hdr[b.hn : b.hn+n]
	if b.last >= 0 && len(b.bufs) > 0 {
		b.bufs[len(b.bufs)-1] = b.hdr[b.last : b.hn+n]
	} else {
		b.last = b.hn
		b.bufs = append(b.bufs, h)
	}
	b.hn += n
	b.n++
	return h
}

// addData adds what data returned, after its header.
func (b *batch) addData(p []byte) {
	b.bufs = append(b.bufs, p)
	b.sn += (len(p) + 4095) &^ 4095
	b.last = -1
}

// reset empties the batch after it was sent.
func (b *batch) reset() {
	clear(b.bufs)
	b.bufs, b.hn, b.last, b.sn, b.n = b.bufs[:0], 0, -1, 0, 0
}

// release gives the memory back; the batch is empty.
func (b *batch) release() {
	if b.slab != nil {
		b.slab.put()
		b.slab = nil
	}
}
