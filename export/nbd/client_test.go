package nbd

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"mica/dev"
)

// A tclient speaks the protocol as the tests need it: one message at a time, nothing hidden. It
// is written from the protocol document, not from the server's encoders.
type tclient struct {
	nc     net.Conn
	r      *bufio.Reader
	size   uint64
	flags  uint16
	blocks [3]uint32 // minimum, preferred, maximum
	cookie uint64
}

// An option reply.
type optReply struct {
	typ  uint32
	data []byte
}

// A chunk is a structured reply chunk, or a simple reply (typ simpleReply, data only for reads).
type chunk struct {
	flags, typ uint16
	cookie     uint64
	data       []byte
	errno      Errno
}

const simpleReply = 0xffff

func dial(path string) (*tclient, error) {
	nc, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	return greet(nc, 3)
}

// greet reads the server's greeting and answers with client flags.
func greet(nc net.Conn, flags uint32) (*tclient, error) {
	nc.SetDeadline(time.Now().Add(30 * time.Second)) // a hung server fails the test
	c := &tclient{nc: nc, r: bufio.NewReaderSize(nc, 1<<20)}
	var b [18]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return c, err
	}
	if got := string(b[:16]); got != "NBDMAGICIHAVEOPT" {
		return c, fmt.Errorf("greeting %q", got)
	}
	if got := binary.BigEndian.Uint16(b[16:]); got != 3 {
		return c, fmt.Errorf("handshake flags %d, want 3", got)
	}
	_, err := nc.Write(binary.BigEndian.AppendUint32(nil, flags))
	return c, err
}

// newTClient speaks over a connection that was greeted already.
func newTClient(nc net.Conn) *tclient {
	nc.SetDeadline(time.Now().Add(30 * time.Second))
	return &tclient{nc: nc, r: bufio.NewReaderSize(nc, 1<<20)}
}

func (c *tclient) Close() { c.nc.Close() }

func (c *tclient) sendOption(opt uint32, data []byte) error {
	b := append([]byte("IHAVEOPT"), 0, 0, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(b[8:], opt)
	binary.BigEndian.PutUint32(b[12:], uint32(len(data)))
	_, err := c.nc.Write(append(b, data...))
	return err
}

// option sends an option and reads all replies to it.
func (c *tclient) option(opt uint32, data []byte) ([]optReply, error) {
	if err := c.sendOption(opt, data); err != nil {
		return nil, err
	}
	var out []optReply
	for {
		var b [20]byte
		if _, err := io.ReadFull(c.r, b[:]); err != nil {
			return out, err
		}
		if m := binary.BigEndian.Uint64(b[:]); m != 0x3e889045565a9 {
			return out, fmt.Errorf("option reply magic %x", m)
		}
		if o := binary.BigEndian.Uint32(b[8:]); o != opt {
			return out, fmt.Errorf("reply to option %d, want %d", o, opt)
		}
		r := optReply{typ: binary.BigEndian.Uint32(b[12:]), data: make([]byte, binary.BigEndian.Uint32(b[16:]))}
		if _, err := io.ReadFull(c.r, r.data); err != nil {
			return out, err
		}
		out = append(out, r)
		if r.typ == 1 || r.typ&(1<<31) != 0 {
			return out, nil
		}
	}
}

func str32(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// goData is the data of GO and INFO.
func goData(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint16(str32(name), uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// metaData is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func metaData(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(str32(name), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, str32(q)...)
	}
	return b
}

// enter negotiates and enters the transmission phase.
func (c *tclient) enter(name string, structured, status bool) error {
	if structured {
		if r, err := c.option(8, nil); err != nil || r[0].typ != 1 {
			return fmt.Errorf("structured replies: %v %v", r, err)
		}
	}
	if status {
		if r, err := c.option(10, metaData(name, "base:allocation")); err != nil || len(r) != 2 {
			return fmt.Errorf("meta context: %v %v", r, err)
		}
	}
	rs, err := c.option(7, goData(name, 3))
	if err != nil {
		return err
	}
	for _, r := range rs {
		switch {
		case r.typ == 3 && binary.BigEndian.Uint16(r.data) == 0:
			c.size, c.flags = binary.BigEndian.Uint64(r.data[2:]), binary.BigEndian.Uint16(r.data[10:])
		case r.typ == 3 && binary.BigEndian.Uint16(r.data) == 3:
			for i := range c.blocks {
				c.blocks[i] = binary.BigEndian.Uint32(r.data[2+4*i:])
			}
		case r.typ != 1 && r.typ != 3:
			return fmt.Errorf("go %q: reply %x %q", name, r.typ, r.data)
		}
	}
	return nil
}

// rawRequest builds a request.
func rawRequest(flags, cmd uint16, cookie, off uint64, n uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, n)
	return append(b, data...)
}

// request sends a request with the next cookie.
func (c *tclient) request(flags, cmd uint16, off uint64, n uint32, data []byte) (uint64, error) {
	c.cookie++
	_, err := c.nc.Write(rawRequest(flags, cmd, c.cookie, off, n, data))
	return c.cookie, err
}

// reply reads one message of the server. readLen is the data that a successful simple reply
// carries.
func (c *tclient) reply(readLen func(cookie uint64) int) (chunk, error) {
	var b [20]byte
	if _, err := io.ReadFull(c.r, b[:16]); err != nil {
		return chunk{}, err
	}
	switch m := binary.BigEndian.Uint32(b[:]); m {
	case 0x67446698:
		k := chunk{typ: simpleReply, flags: 1, errno: Errno(binary.BigEndian.Uint32(b[4:])), cookie: binary.BigEndian.Uint64(b[8:])}
		if k.errno == 0 && readLen != nil {
			k.data = make([]byte, readLen(k.cookie))
			if _, err := io.ReadFull(c.r, k.data); err != nil {
				return k, err
			}
		}
		return k, nil
	case 0x668e33ef:
		if _, err := io.ReadFull(c.r, b[16:]); err != nil {
			return chunk{}, err
		}
		k := chunk{flags: binary.BigEndian.Uint16(b[4:]), typ: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
			data: make([]byte, binary.BigEndian.Uint32(b[16:]))}
		if _, err := io.ReadFull(c.r, k.data); err != nil {
			return k, err
		}
		if k.typ&(1<<15) != 0 {
			k.errno = Errno(binary.BigEndian.Uint32(k.data))
			if n := int(binary.BigEndian.Uint16(k.data[4:])); n != len(k.data)-6 {
				return k, fmt.Errorf("error message of %d bytes in %d", n, len(k.data)-6)
			}
		}
		return k, nil
	default:
		return chunk{}, fmt.Errorf("reply magic %x", m)
	}
}

// do sends a request and reads all of its reply, which must be the next. For a read it
// assembles the data. The chunks are returned for those who look closer.
func (c *tclient) do(flags, cmd uint16, off uint64, n uint32, data []byte) ([]byte, []chunk, error) {
	id, err := c.request(flags, cmd, off, n, data)
	if err != nil {
		return nil, nil, err
	}
	var chunks []chunk
	var out []byte
	covered := 0
	if cmd == 0 && n <= 64<<20 { // longer ones must be refused
		out = make([]byte, n)
	}
	var failed error
	for {
		k, err := c.reply(func(uint64) int { return len(out) })
		if err != nil {
			return nil, chunks, err
		}
		if k.cookie != id {
			return nil, chunks, fmt.Errorf("reply to %d, want %d", k.cookie, id)
		}
		chunks = append(chunks, k)
		switch {
		case k.errno != 0:
			failed = k.errno
		case k.typ == simpleReply && cmd == 0:
			copy(out, k.data)
			covered += len(k.data)
		case k.typ == 1:
			o := binary.BigEndian.Uint64(k.data) - off
			copy(out[o:], k.data[8:])
			covered += len(k.data) - 8
		case k.typ == 2:
			covered += int(binary.BigEndian.Uint32(k.data[8:]))
		}
		if k.flags&1 != 0 {
			break
		}
	}
	if failed != nil {
		return nil, chunks, failed
	}
	if cmd == 0 && covered != int(n) {
		return nil, chunks, fmt.Errorf("chunks cover %d of %d bytes", covered, n)
	}
	return out, chunks, nil
}

// status is one descriptor of BLOCK_STATUS.
type status struct{ n, flags uint32 }

func statuses(t *testing.T, chunks []chunk) []status {
	t.Helper()
	if len(chunks) != 1 || chunks[0].typ != 5 || chunks[0].flags != 1 {
		t.Fatalf("block status: chunks %v", chunks)
	}
	d := chunks[0].data
	if id := binary.BigEndian.Uint32(d); id != contextAllocationID || len(d)%8 != 4 {
		t.Fatalf("block status: context %d, %d bytes", id, len(d))
	}
	var out []status
	for d = d[4:]; len(d) > 0; d = d[8:] {
		out = append(out, status{binary.BigEndian.Uint32(d), binary.BigEndian.Uint32(d[4:])})
	}
	return out
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// startServer serves until the test ends, and checks then that Close leaves nothing behind.
func startServer(t testing.TB, o Options) (*Server, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if o.Log == nil {
		o.Log = quiet
	}
	s := NewServer(o)
	path := filepath.Join(dir, "s")
	ln, err := s.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there after Close", path)
		}
	})
	return s, path
}

// serveDevice serves one device as "disk" and connects a client to it.
func serveDevice(t testing.TB, d dev.Device, o ExportOptions, structured, status bool) (*Server, *tclient) {
	t.Helper()
	s, path := startServer(t, Options{})
	if err := s.AddExport("disk", d, o); err != nil {
		t.Fatal(err)
	}
	return s, connect(t, path, "disk", structured, status)
}

func connect(t testing.TB, path, name string, structured, status bool) *tclient {
	t.Helper()
	c, err := dial(path)
	if err == nil {
		err = c.enter(name, structured, status)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}
