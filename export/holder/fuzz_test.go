package holder

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/mutate"
)

func packetSeeds() [][]byte {
	var out [][]byte
	for _, s := range []string{
		`{"op":"put","name":"a","blob":{"x":1}}`, `{"op":"get","name":"a"}`, `{"op":"drop","name":"a"}`, `{"op":"list"}`,
		`{"op":"list","name":"a"}`, `{"op":"blob","name":"a","blob":[1,2]}`, `{"op":"ping"}`, `{"op":"quit"}`, `{"op":"put"}`,
		`{"op":"put","name":""}`, `{"op":"nothing","name":"x"}`, `{}`, `[]`, `null`, ``, `{"op":"put","name":"\u0000"}`,
		`{"op":"blob","name":"a","blob":null}`, `{"op":"put","name":"a","blob":"` + string(make([]byte, 100)) + `"}`,
	} {
		out = append(out, []byte(s))
	}
	return out
}

// FuzzPacket sends arbitrary packets to a holder, with a descriptor. Each is answered with a packet
// of JSON, the holder keeps what it held, and no descriptor is left over.
func FuzzPacket(f *testing.F) { mutate.Fuzz(f, packetSeeds(), answerAny(f)) }

func TestPacketMutated(t *testing.T) {
	mutate.Test(t, "FuzzPacket", packetSeeds(), mutate.Options{Inputs: 3000, MaxBytes: 60 << 10, AllocBase: 1 << 20, AllocPerByte: 64,
		Words: []string{`"op":`, `"name":"a"`, `"blob":`, `"put"`, `"list"`, `"get"`, `null`}}, answerAny(t))
}

func answerAny(tb testing.TB) func(*testing.T, []byte) {
	dir, err := os.MkdirTemp("", "holder")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unixpacket"})
	if err != nil {
		tb.Fatal(err)
	}
	h := &holder{idle: time.Hour, entries: map[string]entry{}, conns: map[*net.UnixConn]chan struct{}{}, quit: make(chan struct{})}
	h.timer = time.AfterFunc(time.Hour, h.expire)
	h.wg.Add(1)
	go h.accept(l)
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		c.Close()
		h.stop()
		l.Close()
		h.wg.Wait()
		h.dropAll()
		unix.Close(null)
	})
	buf := make([]byte, maxPacket)
	return func(t *testing.T, packet []byte) {
		if len(packet) == 0 || len(packet) > maxPacket {
			return
		}
		var m message
		if json.Unmarshal(packet, &m) == nil && m.Op == "quit" {
			return // which ends it
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, _, err := c.WriteMsgUnix(packet, unix.UnixRights(null), nil); err != nil {
			t.Fatalf("send: %v", err)
		}
		var a answer
		fd, err := receive(c, buf, &a)
		if err != nil {
			t.Fatalf("no answer, or none that makes sense: %v", err)
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		h.mu.Lock()
		held := len(h.entries)
		for name := range h.entries {
			if name == "" || len(name) > maxName {
				t.Errorf("holds a name of %d bytes", len(name))
			}
		}
		h.mu.Unlock()
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		if n := len(fds); n > held+40 {
			t.Errorf("%d descriptors are open, %d are held", n, held)
		}
		if held > 200 {
			h.dropAll()
		}
	}
}

func (h *holder) dropAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, e := range h.entries {
		unix.Close(e.fd)
		delete(h.entries, name)
	}
}
