package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export/pacing"
)

// gate holds requests of a Fault device until it is opened.
type gate struct {
	open    chan struct{}
	once    sync.Once
	waiting atomic.Int64
}

func newGate(t *testing.T) *gate {
	g := &gate{open: make(chan struct{})}
	t.Cleanup(g.release)
	return g
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func (g *gate) before(dev.Op, int64, int64) {
	g.waiting.Add(1)
	<-g.open
}

// eventually waits for a condition that has no event of its own.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for i := 0; !cond(); i++ {
		if i > 20000 {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestCloseWaitsForRequestsInFlight: they are answered, what comes later is told that the
// server is shutting down, then the connection ends.
func TestCloseWaitsForRequestsInFlight(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	s, c := serveDevice(t, f, ExportOptions{}, true, false)
	g := newGate(t)
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: g.before})
	// The flush is in flight at a worker, the read behind it hangs in the reader.
	f.Add(dev.Rule{Ops: dev.OpRead, Times: 1, Pass: true, Before: g.before})
	b := rawRequest(0, cmdFlush, 1, 0, 0, nil)
	b = append(b, rawRequest(0, cmdRead, 2, 0, 4096, nil)...)
	b = append(b, rawRequest(0, cmdWrite, 3, 0, 4096, make([]byte, 4096))...)
	if _, err := c.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both requests in the device", func() bool { return g.waiting.Load() == 2 })
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	eventually(t, "close began", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for cl := range s.conns {
			if cl.c == nil || !cl.c.draining.Load() {
				return false
			}
		}
		return s.closed
	})
	select {
	case err := <-closed:
		t.Fatalf("Close returned %v with requests in flight", err)
	default:
	}
	g.release()
	got := map[uint64]Errno{}
	for range 3 {
		k, err := c.reply(nil)
		if err != nil {
			t.Fatalf("after %v: %v", got, err)
		}
		got[k.cookie] = k.errno
	}
	if got[1] != 0 || got[2] != 0 || got[3] != ESHUTDOWN {
		t.Errorf("replies %v, want 1 and 2 done, 3 refused with ESHUTDOWN", got)
	}
	wantClosed(t, c)
	if err := <-closed; err != nil {
		t.Errorf("close: %v", err)
	}
	if n := f.Counts().Writes; n != 0 {
		t.Errorf("%d writes reached the device", n)
	}
	if _, err := dial(s.path); err == nil {
		t.Error("the server still answers")
	}
}

// TestCloseIsBounded: a device that hangs makes Close return with what hangs there.
func TestCloseIsBounded(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	s := NewServer(Options{CloseTimeout: 50 * time.Millisecond, Log: quiet})
	if err := s.AddExport("disk", f, ExportOptions{CloseDevice: true}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(medium(t), "s")
	ln, err := s.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- s.Serve(ln) }()
	c := connect(t, path, "disk", true, false)
	g := newGate(t)
	f.Add(dev.Rule{Ops: dev.OpFlush, Before: g.before})
	for range 2 {
		if _, err := c.request(0, cmdFlush, 0, 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "flushes in the device", func() bool { return g.waiting.Load() == 2 })
	err = s.Close()
	if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "1 connections, 2 requests") {
		t.Errorf("close: %v, want ErrTimeout with the numbers", err)
	}
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if err := s.AddExport("x", f, ExportOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("add after close: %v, want ErrClosed", err)
	}
	if _, err := s.Listen(path); !errors.Is(err, ErrClosed) {
		t.Errorf("listen after close: %v, want ErrClosed", err)
	}
	f.Clear()
	// The device was not closed under the requests that hang in it.
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("device after close: %v", err)
	}
	g.release()
}

func TestRemoveExport(t *testing.T) {
	s, path := startServer(t, Options{})
	a, b := dev.NewMem(1<<20), dev.NewMem(1<<20)
	for n, d := range map[string]dev.Device{"a": a, "b": b} {
		if err := s.AddExport(n, d, ExportOptions{CloseDevice: n == "a"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddExport("a", b, ExportOptions{}); !errors.Is(err, ErrExists) {
		t.Errorf("second a: %v, want ErrExists", err)
	}
	ca, cb := connect(t, path, "a", true, false), connect(t, path, "b", true, false)
	shaking, err := dial(path) // in the handshake: nothing to do with a
	if err != nil {
		t.Fatal(err)
	}
	defer shaking.Close()
	if got := fmt.Sprintf("%+v", s.Exports()); got != "[{Name:a Description: SizeBytes:1048576 ReadOnly:false Connections:1} {Name:b Description: SizeBytes:1048576 ReadOnly:false Connections:1}]" {
		t.Errorf("exports: %s", got)
	}
	if err := s.RemoveExport(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, ca)
	if _, err := a.ReadAt(make([]byte, 1), 0); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("device of a: %v, want closed", err)
	}
	if _, _, err := cb.do(0, cmdRead, 0, 4096, nil); err != nil {
		t.Errorf("b after the removal of a: %v", err)
	}
	if err := shaking.enter("a", true, false); err == nil {
		t.Error("entered a removed export")
	}
	if err := shaking.enter("", true, false); err != nil { // b is the only one left: the default
		t.Error(err)
	}
	if err := s.RemoveExport(context.Background(), "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("second removal: %v, want ErrNotFound", err)
	}
	if err := s.AddExport("a", dev.NewMem(512), ExportOptions{}); err != nil {
		t.Errorf("add again: %v", err)
	}
}

// TestRemoveExportIsBounded: ctx decides how long requests in flight may take.
func TestRemoveExportIsBounded(t *testing.T) {
	f := dev.NewFault(dev.NewMem(1 << 20))
	s, c := serveDevice(t, f, ExportOptions{}, true, false)
	g := newGate(t)
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 1, Pass: true, Before: g.before})
	if _, err := c.request(0, cmdFlush, 0, 0, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "flush in the device", func() bool { return g.waiting.Load() == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if err := s.RemoveExport(ctx, "disk"); !errors.Is(err, ErrTimeout) {
		t.Errorf("remove: %v, want ErrTimeout", err)
	}
	g.release()
}

// TestDisconnectInTheMiddle: clients vanish at every point of a request; nothing of a request
// that did not arrive whole is written, and the server goes on.
func TestDisconnectInTheMiddle(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	s, path := startServer(t, Options{})
	if err := s.AddExport("disk", f, ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	small := rawRequest(0, cmdWrite, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096))
	big := rawRequest(0, cmdWrite, 1, 1<<20, 1<<20, bytes.Repeat([]byte{2}, 1<<20))
	for name, send := range map[string][]byte{
		"nothing":            nil,
		"part of a header":   small[:11],
		"header":             small[:28],
		"half a payload":     small[:2000],
		"big header":         big[:28],
		"part of a piece":    big[:100000],
		"one byte is absent": small[:len(small)-1],
		"reads unanswered":   bytes.Repeat(rawRequest(0, cmdRead, 1, 0, 1<<20, nil), 20),
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, path, "disk", true, false)
			if _, err := c.nc.Write(send); err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
	eventually(t, "all connections ended", func() bool { return s.Exports()[0].Connections == 0 })
	if n := f.Counts().Writes; n != 0 {
		t.Errorf("%d writes reached the device", n)
	}
	c := connect(t, path, "disk", true, false)
	if _, _, err := c.do(0, cmdRead, 0, 4096, nil); err != nil {
		t.Error(err)
	}
}

// TestDisconnectWithRequestsInTheDevice: the connection is not done before they are.
func TestDisconnectWithRequestsInTheDevice(t *testing.T) {
	f := dev.NewFault(dev.NewMem(8 << 20))
	s, c := serveDevice(t, f, ExportOptions{}, false, false)
	g := newGate(t)
	f.Add(dev.Rule{Ops: dev.OpFlush, Times: 3, Pass: true, Before: g.before})
	for range 3 {
		c.request(0, cmdFlush, 0, 0, nil)
	}
	eventually(t, "flushes in the device", func() bool { return g.waiting.Load() == 3 })
	c.Close()
	if n := s.Exports()[0].Connections; n != 1 {
		t.Errorf("%d connections while requests are in the device, want 1", n)
	}
	g.release()
	eventually(t, "the connection ended", func() bool { return s.Exports()[0].Connections == 0 })
}

// TestStalledClient: one that sends requests and takes no replies holds up neither others nor
// Close, and holds a bounded amount of memory.
func TestStalledClient(t *testing.T) {
	f := dev.NewFault(dev.NewMem(64 << 20))
	s, path := startServer(t, Options{CloseTimeout: 200 * time.Millisecond, MaxBuffer: 3 << 20})
	if err := s.AddExport("disk", f, ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint32{4096, 1 << 20} {
		stalled := connect(t, path, "disk", true, false)
		stalled.nc.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		b := bytes.Repeat(rawRequest(0, cmdRead, 1, 0, n, nil), 1000)
		var err error
		for i := 0; i < 1000 && err == nil; i++ {
			_, err = stalled.nc.Write(b)
		}
		if !isTimeout(err) {
			t.Fatalf("reads of %d: the server took a million requests without a reply: %v", n, err)
		}
		s.mu.Lock()
		for cl := range s.conns {
			if cl.c != nil {
				cl.c.w.mu.Lock()
				if cl.c.w.bytes > maxTaskBytes || cl.c.w.tasks > maxTasks || cl.c.w.running > defaultWorkers {
					t.Errorf("a connection holds %d bytes, %d tasks, %d workers", cl.c.w.bytes, cl.c.w.tasks, cl.c.w.running)
				}
				cl.c.w.mu.Unlock()
			}
		}
		s.mu.Unlock()
		s.budget.mu.Lock()
		if s.budget.used > 3<<20+pieceSize { // one task more than fits
			t.Errorf("%d bytes in buffers", s.budget.used)
		}
		s.budget.mu.Unlock()
		other := connect(t, path, "disk", true, false)
		for i := range 100 {
			if _, _, err := other.do(0, cmdRead, uint64(i)*4096, 4096, nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, _, err := other.do(0, cmdWrite, 0, 1<<20, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWritesThatWaitLeaveRoomForOthers: hundreds of writes wait in the device (for space, say);
// reads, trims and flushes of the same connection go on.
func TestWritesThatWaitLeaveRoomForOthers(t *testing.T) {
	m := newTryMem(64 << 20)
	f := &struct {
		*dev.Fault
		dev.Trier
	}{dev.NewFault(m), m}
	m.refuse.Store(true)
	_, c := serveDevice(t, f, ExportOptions{}, true, false)
	g := newGate(t)
	f.Add(dev.Rule{Ops: dev.OpWrite | dev.OpZero, Pass: true, Before: g.before})
	const writes = 100
	cookies := map[uint64]bool{}
	for i := range writes {
		id, err := c.request(0, []uint16{cmdWrite, cmdWriteZeroes}[i&1], uint64(i)*4096, 4096, map[bool][]byte{true: make([]byte, 4096)}[i&1 == 0])
		if err != nil {
			t.Fatal(err)
		}
		cookies[id] = true
	}
	for i := range 50 {
		for _, cmd := range []uint16{cmdRead, cmdTrim, cmdFlush} {
			off, n := uint64(32<<20), uint32(4096<<(i%8))
			if cmd == cmdFlush {
				off, n = 0, 0
			}
			if _, _, err := c.do(0, cmd, off, n, nil); err != nil {
				t.Fatalf("%s with %d writes waiting: %v", commandName(cmd), writes, err)
			}
		}
	}
	if n := g.waiting.Load(); n > defaultWorkers-spareWorkers {
		t.Errorf("%d writes are in the device, want at most %d", n, defaultWorkers-spareWorkers)
	}
	g.release()
	for range writes {
		k, err := c.reply(nil)
		if err != nil || k.errno != 0 || !cookies[k.cookie] {
			t.Fatalf("reply %+v, %v", k, err)
		}
		delete(cookies, k.cookie)
	}
}

// TestSlowDeviceIsServedInParallel: on a device that takes its time, small requests of one
// connection are in it together, with and without Trier.
func TestSlowDeviceIsServedInParallel(t *testing.T) {
	for _, cmd := range []uint16{cmdRead, cmdWrite} {
		f := dev.NewFault(dev.NewMem(1 << 20))
		_, c := serveDevice(t, f, ExportOptions{}, false, false)
		const slow, together = pacing.Limit / pacing.Slow, 8
		all := make(chan struct{})
		var n atomic.Int64
		f.Add(dev.Rule{Ops: dev.OpRead | dev.OpWrite, Pass: true, Before: func(dev.Op, int64, int64) {
			switch k := n.Add(1); {
			case k <= slow:
				time.Sleep(time.Millisecond)
			case k == slow+together:
				close(all)
			case k < slow+together:
				<-all // served one after the other, this never comes
			}
		}})
		var b []byte
		for i := range uint64(slow + together) {
			var p []byte
			if cmd == cmdWrite {
				p = make([]byte, 4096)
			}
			b = append(b, rawRequest(0, cmd, i, i*4096, 4096, p)...)
		}
		if _, err := c.nc.Write(b); err != nil {
			t.Fatal(err)
		}
		for range slow + together {
			if k, err := c.reply(func(uint64) int { return map[uint16]int{cmdRead: 4096}[cmd] }); err != nil || k.errno != 0 {
				t.Fatalf("%s: %+v, %v after %d requests reached the device", commandName(cmd), k, err, n.Load())
			}
		}
	}
}

// TestTrier: what the device does at once is done inline, the rest by workers.
func TestTrier(t *testing.T) {
	m := newTryMem(16 << 20)
	s, c := serveDevice(t, m, ExportOptions{}, true, false)
	var cn *conn
	s.mu.Lock()
	for cl := range s.conns {
		cn = cl.c
	}
	s.mu.Unlock()
	data := pattern(3, 64<<10)
	steps := []struct {
		name           string
		flags, cmd     uint16
		off            uint64
		n              int
		tried, blocked int64 // calls of Try methods; of plain ones
	}{
		{"write to a hole", 0, cmdWrite, 0, 64 << 10, 1, 1},
		{"write over it", 0, cmdWrite, 0, 64 << 10, 1, 0},
		{"read it", 0, cmdRead, 0, 64 << 10, 1, 0},
		{"forced write", cmdFlagFUA, cmdWrite, 0, 4096, 0, 1},
		{"read a hole", 0, cmdRead, 1 << 20, 4096, 1, 0}, // by Extents
		{"read half a hole", 0, cmdRead, 60 << 10, 8192, 1, 1},
		{"read of several pieces", 0, cmdRead, 0, 64<<10 + 512, 0, 1},
		{"big write", 0, cmdWrite, 2 << 20, 2 * pieceSize, 0, 2},
	}
	for _, st := range steps {
		var p []byte
		if st.cmd == cmdWrite {
			p = bytes.Repeat(data, (st.n+len(data)-1)/len(data))[:st.n]
		}
		// Alone in the connection, a request is never spread because the machine is slow.
		eventually(t, "workers at rest", func() bool { return cn.w.inFlight() == 0 })
		tried, blocked := m.tried.Load(), m.blocked.Load()
		if _, _, err := c.do(st.flags, st.cmd, st.off, uint32(st.n), p); err != nil {
			t.Fatalf("%s: %v", st.name, err)
		}
		if a, b := m.tried.Load()-tried, m.blocked.Load()-blocked; a != st.tried || b != st.blocked {
			t.Errorf("%s: %d tries and %d plain calls, want %d and %d", st.name, a, b, st.tried, st.blocked)
		}
	}
}

// TestForcedWritesAreFlushed: FUA means a flush after the change and before the reply; without
// it there is none.
func TestForcedWritesAreFlushed(t *testing.T) {
	for _, cmd := range []uint16{cmdRead, cmdWrite, cmdTrim, cmdWriteZeroes, cmdBlockStatus} {
		for _, n := range []int{4096, 1 << 20} {
			for _, flags := range []uint16{0, cmdFlagFUA} {
				f := dev.NewFault(dev.NewMem(8 << 20))
				var mu sync.Mutex
				var ops []dev.Op
				f.Add(dev.Rule{Pass: true, Before: func(op dev.Op, _, _ int64) {
					mu.Lock()
					defer mu.Unlock()
					ops = append(ops, op)
				}})
				_, c := serveDevice(t, f, ExportOptions{}, true, true)
				var data []byte
				if cmd == cmdWrite {
					data = make([]byte, n)
				}
				if _, _, err := c.do(flags, cmd, 0, uint32(n), data); err != nil {
					t.Fatal(err)
				}
				mu.Lock()
				flushes := 0
				for _, op := range ops {
					if op == dev.OpFlush {
						flushes++
					}
				}
				changes := cmd == cmdWrite || cmd == cmdTrim || cmd == cmdWriteZeroes
				switch {
				case flags == cmdFlagFUA && changes && (flushes != 1 || ops[len(ops)-1] != dev.OpFlush):
					t.Errorf("forced %s of %d: %v, want one flush, at the end", commandName(cmd), n, ops)
				case (flags == 0 || !changes) && flushes != 0:
					t.Errorf("%s of %d: %v, want no flush", commandName(cmd), n, ops)
				}
				mu.Unlock()
			}
		}
	}
}

// TestFlushCoversOtherConnections: a write answered on one connection is in the medium when a
// flush on another has been answered. A recording device is cut right there.
func TestFlushCoversOtherConnections(t *testing.T) {
	log := dev.NewCrashLog()
	rec, err := log.Wrap(dev.NewMem(1 << 20))
	if err != nil {
		t.Fatal(err)
	}
	s, a := serveDevice(t, rec, ExportOptions{}, true, false)
	b := connect(t, s.path, "disk", true, false)
	for i := range 20 {
		want := bytes.Repeat([]byte{byte(i + 1)}, 4096)
		off := uint64(i) * 8192
		if _, _, err := a.do(0, cmdWrite, off, 4096, want); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.do(0, cmdFlush, 0, 0, nil); err != nil {
			t.Fatal(err)
		}
		img := log.Image(rec, log.Now(), dev.CrashLose, 512, rand.New(rand.NewPCG(1, 1)))
		got := make([]byte, 4096)
		if _, err := img.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("write %d is not in the medium after the other connection's flush (%v)", i, err)
		}
	}
}

// TestPipelining sends many requests in one go; every one gets one reply with its own data.
func TestPipelining(t *testing.T) {
	for _, structured := range []bool{false, true} {
		m := newTryMem(8 << 20)
		want := pattern(9, 8<<20)
		if _, err := m.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		_, c := serveDevice(t, m, ExportOptions{}, structured, false)
		type sent struct{ off, n int }
		open := map[uint64]sent{}
		var b []byte
		for i := range 300 {
			id := uint64(i) + 1000
			n := []int{512, 4096, 65536, 8192}[i%4]
			off := i * 16384 // reads and writes do not overlap
			if i%3 == 0 {
				b = append(b, rawRequest(0, cmdWrite, id, uint64(off), uint32(n), want[off:off+n])...)
				n = 0
			} else if off+n <= len(want) {
				b = append(b, rawRequest(0, cmdRead, id, uint64(off), uint32(n), nil)...)
			}
			open[id] = sent{off, n}
		}
		werr := make(chan error, 1)
		go func() {
			_, err := c.nc.Write(b)
			werr <- err
		}()
		for len(open) > 0 {
			k, err := c.reply(func(id uint64) int { return open[id].n })
			if err != nil {
				t.Fatal(err)
			}
			s, ok := open[k.cookie]
			if !ok || k.errno != 0 || k.flags&1 == 0 {
				t.Fatalf("reply %d, error %d, flags %d: unexpected", k.cookie, k.errno, k.flags)
			}
			delete(open, k.cookie)
			if k.typ == 1 {
				k.data = k.data[8:]
			}
			if !bytes.Equal(k.data, want[s.off:s.off+s.n]) {
				t.Fatalf("structured %v: read of %d at %d: wrong data", structured, s.n, s.off)
			}
		}
		if err := <-werr; err != nil {
			t.Fatal(err)
		}
	}
}

func TestListen(t *testing.T) {
	dir := medium(t)
	path := filepath.Join(dir, "s")
	s := NewServer(Options{Log: quiet})
	defer s.Close()
	if u := s.URI("x"); u != "" {
		t.Errorf("URI before Listen: %q", u)
	}
	ln, err := s.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(ln)
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("socket mode %v, %v, want 0600", fi.Mode(), err)
	}
	if u := s.URI("a/b ?&ü"); u != "nbd+unix:///a%2Fb%20%3F&%C3%BC?socket="+path {
		t.Errorf("URI %q", u)
	}
	other := NewServer(Options{Log: quiet})
	defer other.Close()
	if _, err := other.Listen(path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("listen on a live socket: %v, want ErrInUse and the pid", err)
	}
	// Somebody replaces the file: Close leaves the new one alone.
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	ln2, err := other.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("Close removed another server's socket: %v", err)
	}
	// Die without removing the socket: it is stale and gets replaced.
	ln2.(*listener).UnixListener.Close()
	third := NewServer(Options{Log: quiet})
	if _, err := third.Listen(path); err != nil {
		t.Errorf("listen over a stale socket: %v", err)
	}
	if err := third.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("socket is still there after Close without Serve")
	}
	for name, p := range map[string]string{
		"regular file":   filepath.Join(dir, "file"),
		"directory":      dir,
		"dangling link":  filepath.Join(dir, "link"),
		"no directory":   filepath.Join(dir, "none", "s"),
		"too long":       filepath.Join(dir, strings.Repeat("x", 108)),
		"no path at all": "",
		"abstract":       "@mica",
	} {
		os.WriteFile(filepath.Join(dir, "file"), []byte("precious"), 0o600)
		os.Symlink("/nowhere", filepath.Join(dir, "link"))
		l, err := NewServer(Options{Log: quiet}).Listen(p)
		if err == nil {
			l.Close()
			t.Errorf("%s: no error", name)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); string(b) != "precious" {
		t.Errorf("the file in the way was changed: %q, %v", b, err)
	}
}

func TestServeTakesNoForeignTCPListener(t *testing.T) {
	s := NewServer(Options{Log: quiet})
	defer s.Close()
	if err := s.Serve(fakeTCP{}); err == nil || !strings.Contains(err.Error(), "only Unix sockets and listeners of ListenTCP") {
		t.Errorf("got %v", err)
	}
}

func TestAddExportRefusesWhatCannotBeServed(t *testing.T) {
	s := NewServer(Options{Log: quiet})
	defer s.Close()
	for name, add := range map[string]func() error{
		"odd size":    func() error { return s.AddExport("a", dev.NewMem(1000), ExportOptions{}) },
		"long name":   func() error { return s.AddExport(strings.Repeat("x", 5000), dev.NewMem(512), ExportOptions{}) },
		"zero byte":   func() error { return s.AddExport("a\x00", dev.NewMem(512), ExportOptions{}) },
		"description": func() error { return s.AddExport("a", dev.NewMem(512), ExportOptions{Description: "\xff"}) },
	} {
		if err := add(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestGrowth: clients see a new size when they connect again; a device that has shrunk gives
// errors, not zeros.
func TestGrowth(t *testing.T) {
	m := dev.NewMem(1 << 20)
	s, c := serveDevice(t, m, ExportOptions{}, true, false)
	if err := m.Resize(2 << 20); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.do(0, cmdRead, 1<<20, 512, nil); err != EINVAL {
		t.Errorf("old connection beyond its size: %v", err)
	}
	if d := connect(t, s.path, "disk", true, false); d.size != 2<<20 {
		t.Errorf("new connection sees %d bytes", d.size)
	}
	if err := m.Resize(4096); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint32{4096, 512 << 10} {
		if _, _, err := c.do(0, cmdRead, 4096, n, nil); err != EINVAL {
			t.Errorf("read of %d beyond a shrunk device: %v, want EINVAL", n, err)
		}
	}
	if _, _, err := c.do(0, cmdWrite, 4096, 512, make([]byte, 512)); err != EINVAL {
		t.Errorf("write beyond a shrunk device: %v, want EINVAL", err)
	}
}

// TestManyClients: connections, exports and removals at the same time; meant for -race.
func TestManyClients(t *testing.T) {
	s, path := startServer(t, Options{})
	m := newTryMem(16 << 20)
	if err := s.AddExport("disk", m, ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			base := uint64(i) << 21
			for j := range 6 {
				c, err := dial(path)
				if err == nil {
					err = c.enter("disk", j&1 == 0, false)
				}
				if err != nil {
					t.Error(err)
					return
				}
				for k, n := range []int{512, 4096, 1 << 20, 65536, 12288} {
					want := bytes.Repeat([]byte{byte(i), byte(j), byte(k), 1}, n/4)
					if _, _, err := c.do(uint16(k&1)*cmdFlagFUA, cmdWrite, base, uint32(n), want); err != nil {
						t.Error(err)
					}
					got, _, err := c.do(0, cmdRead, base, uint32(n), nil)
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("client %d: read back of %d: %v, equal %v", i, n, err, bytes.Equal(got, want))
					}
				}
				if j&1 == 0 {
					c.request(0, cmdDisc, 0, 0, nil)
				}
				c.Close()
			}
		}()
	}
	for i := range 30 {
		name := fmt.Sprint("tmp", i)
		if err := s.AddExport(name, dev.NewMem(1<<20), ExportOptions{}); err != nil {
			t.Error(err)
		}
		c := connect(t, path, name, true, false)
		if _, err := c.request(0, cmdRead, 0, 4096, nil); err != nil {
			t.Error(err)
		}
		if err := s.RemoveExport(context.Background(), name); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(io.Discard, c.r); err != nil && !isReset(err) {
			t.Error(err)
		}
	}
	wg.Wait()
}
