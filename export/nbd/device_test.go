package nbd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"mica/dev"
	"mica/dev/devtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bare hides a device's extras.
type bare struct{ dev.Device }

// tryMem is a memory device that tells mapped blocks from others as a thin device does: Try
// methods serve ranges without holes, everything else would block.
type tryMem struct {
	*dev.Mem
	tried, served, blocked atomic.Int64 // Try calls, those served, plain reads and writes
	refuse                 atomic.Bool  // Try methods serve nothing
}

func newTryMem(size int64) *tryMem { return &tryMem{Mem: dev.NewMem(size)} }

func (m *tryMem) BlockSize() int64 { return 64 << 10 }

func (m *tryMem) mapped(off, n int64) bool {
	m.tried.Add(1)
	if m.refuse.Load() {
		return false
	}
	xs, err := m.Extents(off, n)
	if err != nil || len(xs) != 1 || xs[0].Hole {
		return false
	}
	m.served.Add(1)
	return true
}

func (m *tryMem) TryReadAt(p []byte, off int64) error {
	if !m.mapped(off, int64(len(p))) {
		return fmt.Errorf("read at %d: %w", off, dev.ErrWouldBlock)
	}
	_, err := m.Mem.ReadAt(p, off)
	return err
}

func (m *tryMem) TryWriteAt(p []byte, off int64) error {
	if !m.mapped(off, int64(len(p))) {
		return dev.ErrWouldBlock
	}
	_, err := m.Mem.WriteAt(p, off)
	return err
}

func (m *tryMem) ReadAt(p []byte, off int64) (int, error) {
	m.blocked.Add(1)
	return m.Mem.ReadAt(p, off)
}

func (m *tryMem) WriteAt(p []byte, off int64) (int, error) {
	m.blocked.Add(1)
	return m.Mem.WriteAt(p, off)
}

// A remote is an export as a dev.Device, over several connections, so that the conformance
// suite of devices runs through the server. What is not aligned to sectors it makes from
// aligned requests under a lock.
type remote struct {
	conns  chan *tclient
	size   int64
	closed atomic.Bool
	mu     sync.RWMutex // held for reading by aligned writes, for writing by others
	n      int
}

func newRemote(t testing.TB, path, name string, structured bool, conns int) *remote {
	r := &remote{conns: make(chan *tclient, conns), n: conns}
	for range conns {
		c := connect(t, path, name, structured, structured)
		r.size = int64(c.size)
		r.conns <- c
	}
	return r
}

func (r *remote) do(flags, cmd uint16, off, n int64, data []byte) ([]byte, []chunk, error) {
	c := <-r.conns
	defer func() { r.conns <- c }()
	b, ch, err := c.do(flags, cmd, uint64(off), uint32(n), data)
	var e Errno
	if errors.As(err, &e) {
		err = map[Errno]error{ENOSPC: dev.ErrNoSpace, EPERM: dev.ErrReadOnly, ESHUTDOWN: dev.ErrClosed}[e]
		if err == nil {
			err = e
		}
	}
	return b, ch, err
}

func (r *remote) Size() int64 { return r.size }

func (r *remote) ReadAt(p []byte, off int64) (int, error) {
	if r.closed.Load() {
		return 0, dev.ErrClosed
	}
	n, end := dev.CheckRead(off, len(p), r.size)
	if n == 0 {
		return 0, end
	}
	a, z := off&^511, (off+int64(n)+511)&^511
	b, _, err := r.do(0, cmdRead, a, z-a, nil)
	if err != nil {
		return 0, err
	}
	return copy(p[:n], b[off-a:]), end
}

func (r *remote) WriteAt(p []byte, off int64) (int, error) {
	if r.closed.Load() {
		return 0, dev.ErrClosed
	}
	if err := dev.CheckRange(off, int64(len(p)), r.size); err != nil || len(p) == 0 {
		return 0, err
	}
	a, z := off&^511, (off+int64(len(p))+511)&^511
	if a == off && z-a == int64(len(p)) {
		r.mu.RLock()
		defer r.mu.RUnlock()
	} else {
		r.mu.Lock()
		defer r.mu.Unlock()
		b, _, err := r.do(0, cmdRead, a, z-a, nil)
		if err != nil {
			return 0, err
		}
		copy(b[off-a:], p)
		p = b
	}
	_, _, err := r.do(0, cmdWrite, a, z-a, p)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// zero calls do for the whole sectors of a range and writes zeros into the rest.
func (r *remote) zero(off, n int64, do func(off, n int64) error) error {
	if r.closed.Load() {
		return dev.ErrClosed
	}
	if err := dev.CheckRange(off, n, r.size); err != nil {
		return err
	}
	a, z := (off+511)&^511, (off+n)&^511
	if a >= z {
		_, err := r.WriteAt(make([]byte, n), off)
		return err
	}
	if _, err := r.WriteAt(make([]byte, a-off), off); err != nil {
		return err
	}
	if _, err := r.WriteAt(make([]byte, off+n-z), z); err != nil {
		return err
	}
	return do(a, z-a)
}

func (r *remote) WriteZeroes(off, n int64, keep bool) error {
	return r.zero(off, n, func(off, n int64) error {
		flags := uint16(0)
		if keep {
			flags = cmdFlagNoHole
		}
		_, _, err := r.do(flags, cmdWriteZeroes, off, n, nil)
		return err
	})
}

func (r *remote) Discard(off, n int64) error {
	return r.zero(off, n, func(off, n int64) error {
		_, _, err := r.do(0, cmdTrim, off, n, nil)
		return err
	})
}

func (r *remote) Extents(off, n int64) ([]dev.Extent, error) {
	if err := dev.CheckRange(off, n, r.size); err != nil {
		return nil, err
	}
	a, z := off&^511, (off+n+511)&^511
	_, ch, err := r.do(0, cmdBlockStatus, a, z-a, nil)
	if err != nil {
		return nil, err
	}
	d := ch[0].data[4:]
	var out []dev.Extent
	for pos := a; len(d) > 0; d = d[8:] {
		k := int64(be32(d))
		x := dev.Extent{Off: max(pos, off), Len: min(pos+k, off+n) - max(pos, off), Hole: d[7]&1 != 0, Zero: d[7]&2 != 0}
		out = append(out, x)
		pos += k
	}
	return out, nil
}

func be32(b []byte) uint32 {
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func (r *remote) Flush() error {
	if r.closed.Load() {
		return dev.ErrClosed
	}
	_, _, err := r.do(0, cmdFlush, 0, 0, nil)
	return err
}

func (r *remote) Close() error {
	if r.closed.Swap(true) {
		return nil
	}
	for range r.n {
		(<-r.conns).Close()
	}
	return nil
}

// simpleRemote hides BLOCK_STATUS, which needs structured replies.
type simpleRemote struct {
	dev.Device
	dev.Zeroer
	dev.Discarder
}

// medium is where test files lie: memory where there is some.
func medium(t testing.TB) string {
	t.Helper()
	if dir, err := os.MkdirTemp("/dev/shm", "mica-nbd-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func newFileDevice(t testing.TB, size int64) *dev.File {
	t.Helper()
	f, err := dev.CreateFile(filepath.Join(medium(t), "disk"), size, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestConformance runs the suite of dev.Device over the wire: what it promises to those above
// must survive the protocol, with both kinds of replies, on devices of every kind.
func TestConformance(t *testing.T) {
	const size = 4 << 20
	devices := map[string]func(t *testing.T) dev.Device{
		"memory":         func(t *testing.T) dev.Device { return dev.NewMem(size) },
		"file":           func(t *testing.T) dev.Device { return newFileDevice(t, size) },
		"trier":          func(t *testing.T) dev.Device { return newTryMem(size) },
		"without extras": func(t *testing.T) dev.Device { return bare{dev.NewMem(size)} },
	}
	for name, open := range devices {
		for _, structured := range []bool{false, true} {
			kind := map[bool]string{false: "simple", true: "structured"}[structured]
			t.Run(strings.ReplaceAll(name, " ", "_")+"/"+kind, func(t *testing.T) {
				devtest.Run(t, size, func(t *testing.T) dev.Device {
					d := open(t)
					t.Cleanup(func() { d.Close() })
					s, path := startServer(t, Options{})
					if err := s.AddExport("disk", d, ExportOptions{}); err != nil {
						t.Fatal(err)
					}
					_, noExtras := d.(bare)
					r := newRemote(t, path, "disk", structured && !noExtras, 4)
					switch {
					case noExtras:
						return struct {
							dev.Device
							dev.Zeroer
						}{r, r}
					case structured:
						return r
					}
					return simpleRemote{r, r, r}
				}, devtest.Options{DiscardZeroes: !strings.Contains(name, "without"), Fixed: true, Ops: 600})
			})
		}
	}
}
