package nbd

// An inbuf holds received bytes that were not consumed yet: b[r:w]. It has memory only while
// the connection is busy.
type inbuf struct {
	buf  *buffer // nil while nothing is held
	r, w int
}

// inbufSize bounds one receive; it holds dozens of small requests, or one of the largest that
// is served from here (header and inlineMax of payload).
const inbufSize = batchSize

func (in *inbuf) buffered() int     { return in.w - in.r }
func (in *inbuf) bytes() []byte     { return in.buf.b[in.r:in.w] }
func (in *inbuf) peek(n int) []byte { return in.buf.b[in.r : in.r+n] }
func (in *inbuf) take(n int) []byte { in.r += n; return in.buf.b[in.r-n : in.r] }
func (in *inbuf) space() []byte     { return in.buf.b[in.w:inbufSize] }
func (in *inbuf) received(n int)    { in.w += n }

// prepare makes room for a receive after which want bytes can be in the buffer in one piece.
func (in *inbuf) prepare(want int) {
	if in.buf == nil {
		in.buf = getBuffer(inbufSize)
	}
	if in.r == in.w {
		in.r, in.w = 0, 0
	} else if in.r+want > inbufSize {
		copy(in.buf.b, in.buf.b[in.r:in.w])
		in.r, in.w = 0, in.w-in.r
	}
}

// release gives the memory back if nothing is in it.
func (in *inbuf) release() {
	if in.buf != nil && in.r == in.w {
		in.buf.put()
		*in = inbuf{}
	}
}
