package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"mica/dev"
	"mica/internal/mutate"
)

// A memLink is a link whose client has sent in and takes everything.
type memLink struct {
	in    []byte
	step  int    // bytes per receive, at most
	idled func() // called after the connection was told to be idle

	mu   sync.Mutex
	out  []byte
	full bool // the client has had enough
}

func (l *memLink) recv(p func() []byte, idle func()) (int, error) {
	if len(l.in) == 0 {
		idle()
		if l.idled != nil {
			l.idled()
		}
		return 0, io.EOF
	}
	b := p()
	if len(b) == 0 {
		panic("receive into nothing")
	}
	n := copy(b[:min(len(b), l.step)], l.in)
	l.in = l.in[n:]
	return n, nil
}

func (l *memLink) send(bufs [][]byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full = l.full || len(l.out) > 8<<20; l.full {
		return io.ErrClosedPipe
	}
	for _, b := range bufs {
		l.out = append(l.out, b...)
	}
	return nil
}

func (l *memLink) interrupt() {}
func (l *memLink) resume()    {}
func (l *memLink) abort()     {}

// requestSeeds are streams of requests: good, bad, cut short.
func requestSeeds() [][]byte {
	page := bytes.Repeat([]byte{7}, 4096)
	join := func(bs ...[]byte) []byte { return bytes.Join(bs, nil) }
	seeds := [][]byte{
		nil,
		rawRequest(0, cmdRead, 1, 0, 4096, nil),
		rawRequest(cmdFlagDF, cmdRead, 1, 0, 1<<20, nil),
		rawRequest(0, cmdWrite, 1, 512, 4096, page),
		rawRequest(cmdFlagFUA, cmdWrite, 1, 0, 1<<19, bytes.Repeat(page, 128)),
		join(rawRequest(0, cmdWrite, 1, 0, 4096, page), rawRequest(0, cmdRead, 2, 0, 8192, nil), rawRequest(0, cmdFlush, 3, 0, 0, nil),
			rawRequest(0, cmdTrim, 4, 0, 4096, nil), rawRequest(cmdFlagNoHole, cmdWriteZeroes, 5, 4096, 4096, nil),
			rawRequest(cmdFlagReqOne, cmdBlockStatus, 6, 0, 1<<20, nil), rawRequest(0, cmdBlockStatus, 7, 0, 1<<20, nil), rawRequest(0, cmdDisc, 8, 0, 0, nil)),
		rawRequest(0, cmdWrite, 1, 0, 1<<32-1, nil),
		rawRequest(0, cmdWrite, 1, 0, maxPayload+512, page),
		rawRequest(0, cmdWrite, 1, 0, 8192, page),
		rawRequest(0, cmdRead, 1, 0, 4096, nil)[:20],
		join(rawRequest(0, cmdWrite, 1, 0, 512, page[:512]), rawRequest(0, cmdRead, 2, 64<<10, 512, nil), []byte("no request, and long enough.")),
		bytes.Repeat(rawRequest(0, cmdRead, 1, 0, 4096, nil), 40),
		bytes.Repeat(rawRequest(0, cmdWrite, 1, 4096, 512, page[:512]), 40),
	}
	for _, structured := range []bool{false, true} {
		for _, r := range badRequests(1<<20, structured) {
			var p []byte
			if r.cmd == cmdWrite && r.n < 10000 {
				p = make([]byte, r.n)
			}
			seeds = append(seeds, join(rawRequest(r.flags, r.cmd, 9, r.off, r.n, p), rawRequest(0, cmdRead, 10, 0, 512, nil)))
		}
	}
	return seeds
}

// FuzzRequests plays a stream of requests to a connection. It must end without a panic, having
// sent well-formed replies: exactly one final one for each request, in either kind of reply.
func FuzzRequests(f *testing.F) {
	for i, s := range requestSeeds() {
		f.Add(s, uint16(1+i*7919), true)
		f.Add(s, uint16(65535), false)
	}
	f.Fuzz(playRequests)
}

func playRequests(t *testing.T, stream []byte, step uint16, structured bool) {
	if len(stream) > 600<<10 {
		return // longer streams say nothing new
	}
	m := newTryMem(1 << 20)
	if _, err := m.WriteAt(bytes.Repeat([]byte{3}, 300<<10), 64<<10); err != nil {
		t.Fatal(err)
	}
	e, err := newExport("", m, ExportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tm := e.terms(structured)
	tm.allocation = structured
	l := &memLink{in: stream, step: int(step) + 1}
	c := newConn(e, tm, l, 6, newBudget(1<<20), quiet)
	c.run()
	if l.full {
		return
	}
	if err := checkReplies(stream, l.out, structured); err != nil {
		t.Error(err)
	}
}

// TestRequestsMutated is FuzzRequests for a moment. A connection holds some MiB of buffers
// whatever it is sent; replies may be as long as the reads that are asked for.
func TestRequestsMutated(t *testing.T) {
	n := uint16(0)
	mutate.Test(t, "FuzzRequests", requestSeeds(), mutate.Options{Inputs: 1500, MaxBytes: 600 << 10}, func(t *testing.T, b []byte) {
		n += 7919
		playRequests(t, b, n|1, n&2 != 0)
	})
}

// checkReplies compares the replies with the requests of a stream, up to where the stream ends
// or breaks the protocol.
func checkReplies(in, out []byte, structured bool) error {
	want := map[uint64]int{}     // replies by cookie
	reads := map[uint64]uint32{} // length of a read by cookie
	clear := true                // cookies of reads are unique, so that simple replies can be parsed
	for len(in) >= 28 && binary.BigEndian.Uint32(in) == 0x25609513 {
		cmd, cookie, n := binary.BigEndian.Uint16(in[6:]), binary.BigEndian.Uint64(in[8:]), binary.BigEndian.Uint32(in[24:])
		if cmd == cmdDisc {
			break
		}
		in = in[28:]
		if cmd == cmdWrite {
			if n > maxPayload || int(n) > len(in) {
				break
			}
			in = in[n:]
		}
		if _, dup := reads[cookie]; dup || cmd == cmdRead && want[cookie] > 0 {
			clear = false
		}
		if cmd == cmdRead {
			reads[cookie] = n
		}
		want[cookie]++
	}
	if !structured && !clear {
		return nil
	}
	covered := map[uint64]uint64{}
	failed := map[uint64]bool{}
	for len(out) > 0 {
		if len(out) < 16 {
			return fmt.Errorf("%d bytes after the last reply", len(out))
		}
		cookie := binary.BigEndian.Uint64(out[8:])
		done := true
		switch m := binary.BigEndian.Uint32(out); m {
		case 0x67446698:
			n, read := reads[cookie]
			if structured && read && clear {
				return fmt.Errorf("simple reply to read %d", cookie)
			}
			skip := 16
			if binary.BigEndian.Uint32(out[4:]) == 0 && read && !structured {
				skip += int(n)
			}
			if skip > len(out) {
				return fmt.Errorf("reply of %d bytes, %d are there", skip, len(out))
			}
			out = out[skip:]
		case 0x668e33ef:
			if !structured {
				return fmt.Errorf("chunk without structured replies")
			}
			n := binary.BigEndian.Uint32(out[16:])
			if uint64(n) > uint64(len(out)-20) {
				return fmt.Errorf("chunk of %d bytes, %d are there", n, len(out)-20)
			}
			p := out[20 : 20+n]
			done = binary.BigEndian.Uint16(out[4:])&1 != 0
			switch typ := binary.BigEndian.Uint16(out[6:]); typ {
			case 1:
				covered[cookie] += uint64(n - 8)
			case 2:
				covered[cookie] += uint64(binary.BigEndian.Uint32(p[8:]))
			case 5:
			case 1<<15 + 1:
				failed[cookie] = true
			default:
				return fmt.Errorf("chunk type %d", typ)
			}
			out = out[20+n:]
		default:
			return fmt.Errorf("reply magic %#x", m)
		}
		if done {
			if want[cookie]--; want[cookie] < 0 {
				return fmt.Errorf("too many replies to %d", cookie)
			}
		}
	}
	for cookie, n := range want {
		if n != 0 {
			return fmt.Errorf("%d replies to request %d are missing", n, cookie)
		}
	}
	if structured && clear {
		for cookie, n := range reads {
			if !failed[cookie] && covered[cookie] != uint64(n) {
				return fmt.Errorf("read %d of %d bytes: chunks cover %d", cookie, n, covered[cookie])
			}
		}
	}
	return nil
}

// fixedTable is a table of exports that never changes.
type fixedTable map[string]*export

func (f fixedTable) lookup(name string) *export { return f[name] }
func (f fixedTable) enter(name string) *export  { return f[name] }
func (f fixedTable) closing() bool              { return false }
func (f fixedTable) list() (out []ExportInfo) {
	for n, e := range f {
		out = append(out, ExportInfo{Name: n, Description: e.description})
	}
	return out
}

// pipe reads what the fuzzer made up and counts what is written.
type pipe struct {
	io.Reader
	n int
}

func (p *pipe) Write(b []byte) (int, error) { p.n += len(b); return len(b), nil }

func handshakeSeeds() [][]byte {
	option := func(opt uint32, data []byte) []byte {
		b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), opt)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
	}
	join := func(flags uint32, opts ...[]byte) []byte {
		return append(binary.BigEndian.AppendUint32(nil, flags), bytes.Join(opts, nil)...)
	}
	return [][]byte{
		nil,
		join(3),
		join(4, option(3, nil)),
		join(3, option(1, []byte("a"))),
		join(0, option(1, nil)),
		join(3, option(2, nil)),
		join(3, option(3, nil), option(3, []byte("x"))),
		join(3, option(8, nil), option(9, metaData("a")), option(9, metaData("a", "base:")), option(10, metaData("a", "base:allocation")), option(7, goData("a", 0, 1, 2, 3))),
		join(3, option(6, goData("", 3)), option(7, goData("nope")), option(7, goData("b"))),
		join(3, option(7, []byte{255, 255, 255, 255, 0, 0})),
		join(3, option(8, nil), option(10, append(str32("a"), 255, 255, 255, 255))),
		join(3, option(8, nil), option(10, append(str32("a"), 0, 0, 0, 1, 255, 255, 255, 255))),
		append(join(3), append([]byte("IHAVEOPT"), 0, 0, 0, 7, 255, 255, 255, 255)...),
		join(3, bytes.Repeat(option(99, nil), 300)),
		join(3, option(5, nil), option(8, nil), option(7, goData("a"))),
		join(3, option(5, []byte("x")), option(5, nil), option(5, nil), option(7, goData("a"))),
		join(3, option(3, nil), option(7, goData("a")), option(1, []byte("a"))),
		join(3, option(7, make([]byte, maxPlain+1)), option(5, nil)),
	}
}

// FuzzHandshake plays a client's part of a handshake, with and without TLS forced. It ends in an
// export or an error, what the server sends is in proportion to what it got, and where TLS is
// forced there is no export before it.
func FuzzHandshake(f *testing.F) {
	for _, s := range handshakeSeeds() {
		f.Add(s)
	}
	f.Fuzz(playHandshake(f))
}

// TestHandshakeMutated is FuzzHandshake for a moment.
func TestHandshakeMutated(t *testing.T) {
	words := []string{"IHAVEOPT\x00\x00\x00\x07", "IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00", "\x00\x00\x00\x01a", "base:allocation", "base:"}
	mutate.Test(t, "FuzzHandshake", handshakeSeeds(), mutate.Options{Inputs: 4000, Words: words, AllocBase: 1 << 20, AllocPerByte: 64}, playHandshake(t))
}

// errNoTLS: the client's TLS was none. Where it is taken for good, what follows is in the clear.
var errNoTLS = errors.New("no TLS after all")

func playHandshake(tb testing.TB) func(t *testing.T, stream []byte) {
	table := fixedTable{}
	for _, n := range []string{"a", "b"} {
		e, err := newExport(n, dev.NewMem(1<<20), ExportOptions{Description: "export " + n})
		if err != nil {
			tb.Fatal(err)
		}
		table[n] = e
	}
	return func(t *testing.T, stream []byte) {
		for _, forced := range []bool{false, true} {
			p := &pipe{Reader: bytes.NewReader(stream)}
			h := &handshake{rw: p, table: table}
			starts := 0
			if forced {
				h.upgrade = func() (io.ReadWriter, error) {
					if starts++; starts > 1 || len(stream)%7 == 0 {
						return nil, errNoTLS
					}
					return p, nil
				}
			}
			e, tm, err := h.run()
			if (e == nil) != (err != nil) {
				t.Errorf("export %v, error %v", e, err)
			}
			if e != nil && (table[e.name] != e || tm.size != 1<<20 || tm.allocation && !tm.structured) {
				t.Errorf("export %q, terms %+v", e.name, tm)
			}
			if starts > 1 || e != nil && forced && starts == 0 {
				t.Errorf("export %v after %d times TLS, want one", e, starts)
			}
			if limit := 18 + 200 + len(stream)/optionSize*300 + 3*len(stream); p.n > limit {
				t.Errorf("%d bytes sent for %d received", p.n, len(stream))
			}
		}
	}
}
