package user

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

var ctx = context.Background()

// quiet is for pools whose failure is the point of a test.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// A testPool is a pool on two memory devices with counters and fault injection. On cleanup it is
// closed and checked, by our own check and by thin_check.
type testPool struct {
	t            testing.TB
	data         *dev.Fault
	meta         *dev.Fault
	dataMem      *dev.Mem
	metaMem      *dev.Mem
	opts         Options
	bs           int64
	p            *Pool
	dirty        bool // a fault was injected: closing may fail, the pool may be marked needs_check
	ownCheckOnly bool // many pools: thin_check would take long
}

type poolSize struct {
	bs         int64
	dataBlocks uint64
	metaBlocks int64
}

func newPool(t testing.TB, s poolSize, o Options) *testPool {
	t.Helper()
	if s.bs == 0 {
		s.bs = 64 << 10
	}
	if s.dataBlocks == 0 {
		s.dataBlocks = 1024
	}
	if s.metaBlocks == 0 {
		s.metaBlocks = 1024
	}
	tp := &testPool{t: t, bs: s.bs, opts: o, dataMem: dev.NewMem(int64(s.dataBlocks) * s.bs), metaMem: dev.NewMem(s.metaBlocks * 4096)}
	if err := thin.Format(tp.metaMem, thin.FormatOptions{DataBlockSize: s.bs, DataBlocks: s.dataBlocks}); err != nil {
		t.Fatal(err)
	}
	tp.open()
	t.Cleanup(tp.finish)
	return tp
}

func (tp *testPool) open() {
	tp.t.Helper()
	tp.dataMem, tp.metaMem = tp.dataMem.Clone(), tp.metaMem.Clone()
	tp.data, tp.meta = dev.NewFault(tp.dataMem), dev.NewFault(tp.metaMem)
	p, err := New(tp.meta, tp.data, tp.opts)
	if err != nil {
		tp.t.Fatal(err)
	}
	tp.p = p
}

// reopen closes the pool, checks it and opens it again.
func (tp *testPool) reopen() {
	tp.t.Helper()
	tp.close()
	tp.check()
	tp.open()
}

func (tp *testPool) close() {
	tp.t.Helper()
	if tp.p == nil {
		return
	}
	err := tp.p.Close()
	tp.p = nil
	if err != nil && !tp.dirty {
		tp.t.Fatalf("close: %v", err)
	}
}

func (tp *testPool) finish() {
	tp.t.Helper()
	if tp.p != nil {
		for _, d := range tp.p.openDevices() {
			tp.t.Errorf("thin %d is still open at the end of the test", d.id)
			return
		}
	}
	tp.close()
	tp.check()
}

func (tp *testPool) check() {
	tp.t.Helper()
	checkMetadata(tp.t, tp.metaMem.Clone(), tp.dirty, !tp.ownCheckOnly)
}

// checkMetadata runs our check and thin_check on a closed metadata device.
func checkMetadata(t testing.TB, m *dev.Mem, needsCheckAllowed, tools bool) {
	t.Helper()
	rep, err := thin.Check(m, thin.CheckOptions{})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if rep.Fatals > 0 || rep.Leaks > 0 {
		for _, f := range rep.Findings {
			t.Errorf("check: %s: %s", f.Severity, f.String())
		}
		t.FailNow()
	}
	tool, err := exec.LookPath("thin_check")
	if err != nil || !tools {
		return
	}
	path := filepath.Join(shm(t), "metadata")
	f, err := dev.CreateFile(path, m.Size(), dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < m.Size(); off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), m.Size()-off)]
		m.ReadAt(b, off)
		if !bytes.Equal(b, zeroBuf[:len(b)]) {
			f.WriteAt(b, off)
		}
	}
	f.Close()
	defer os.Remove(path)
	args := []string{"-q", path}
	if needsCheckAllowed {
		args = append([]string{"--clear-needs-check-flag"}, args...)
	}
	if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
		t.Fatalf("thin_check: %v\n%s", err, out)
	}
}

// shm returns a directory in memory that lasts as long as the test.
func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "mica-user-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (tp *testPool) create(id thin.DevID) {
	tp.t.Helper()
	must(tp.t, tp.p.CreateThin(ctx, id))
}

func (tp *testPool) snap(id, origin thin.DevID) {
	tp.t.Helper()
	must(tp.t, tp.p.CreateSnap(ctx, id, origin))
}

// thin opens a device of sizeBytes until the test ends or it is closed.
func (tp *testPool) thin(id thin.DevID, sizeBytes int64) *Thin {
	tp.t.Helper()
	return tp.thinWith(id, engine.OpenOptions{SizeBytes: sizeBytes})
}

func (tp *testPool) thinWith(id thin.DevID, o engine.OpenOptions) *Thin {
	tp.t.Helper()
	h, err := tp.p.Open(ctx, id, o)
	if err != nil {
		tp.t.Fatal(err)
	}
	tp.t.Cleanup(func() { h.Close() })
	return h.(*Thin)
}

func (tp *testPool) status() engine.Status {
	tp.t.Helper()
	s, err := tp.p.Status(ctx)
	must(tp.t, err)
	return s
}

func write(t testing.TB, d dev.Device, p []byte, off int64) {
	t.Helper()
	if n, err := d.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func read(t testing.TB, d dev.Device, n int, off int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xEE}, n)
	if m, err := d.ReadAt(p, off); err != nil || m != n {
		t.Fatalf("read %d bytes at %d: %d, %v", n, off, m, err)
	}
	return p
}

func fill(c byte, n int64) []byte { return bytes.Repeat([]byte{c}, int(n)) }

// wantBytes fails unless n bytes at off are all c.
func wantBytes(t testing.TB, d dev.Device, c byte, n, off int64) {
	t.Helper()
	for i, b := range read(t, d, int(n), off) {
		if b != c {
			t.Fatalf("byte %d is %#x, want %#x", off+int64(i), b, c)
		}
	}
}

// eventually waits until ok, or fails after a generous time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("timed out: %s", what)
}
