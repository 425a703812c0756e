// Package devtest is the conformance suite of dev.Device: what every implementation must do.
package devtest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"mica/dev"
)

// Options say what a device under test promises beyond the core.
type Options struct {
	// DiscardZeroes: a discarded range reads as zeros (files and memory; not block devices).
	DiscardZeroes bool
	// Fixed: the device's length cannot be changed here.
	Fixed bool
	// Reopen, if set, opens the same contents again after a Close.
	Reopen func(t *testing.T) dev.Device
	// Ops is the number of operations of the model test, 0 = 2000.
	Ops int
}

// Run tests devices made by open, which returns a new, zeroed device of about sizeBytes (a few
// MiB). The suite closes it.
func Run(t *testing.T, sizeBytes int64, open func(t *testing.T) dev.Device, o Options) {
	with := func(f func(t *testing.T, d dev.Device)) func(t *testing.T) {
		return func(t *testing.T) {
			d := open(t)
			defer d.Close()
			if d.Size() != sizeBytes {
				t.Fatalf("size %d, want %d", d.Size(), sizeBytes)
			}
			f(t, d)
		}
	}
	t.Run("bounds", with(testBounds))
	t.Run("model", with(func(t *testing.T, d dev.Device) { testModel(t, d, o) }))
	t.Run("parallel", with(testParallel))
	t.Run("extents", with(testExtents))
	t.Run("close", with(testClose))
	if !o.Fixed {
		t.Run("resize", with(testResize))
	}
	if o.Reopen != nil {
		t.Run("reopen", with(func(t *testing.T, d dev.Device) { testReopen(t, d, o) }))
	}
}

func testBounds(t *testing.T, d dev.Device) {
	size := d.Size()
	buf := make([]byte, 8192)
	for _, off := range []int64{-1, size + 1, size - 4096, 1<<63 - 1, -1 << 63} {
		n, err := d.WriteAt(buf, off)
		if n != 0 || !errors.Is(err, dev.ErrOutOfRange) {
			t.Errorf("write of 8192 bytes at %d: %d, %v, want 0 and ErrOutOfRange", off, n, err)
		}
	}
	if n, err := d.ReadAt(buf, size-4096); n != 4096 || err != io.EOF {
		t.Errorf("read past the end: %d, %v, want 4096, EOF", n, err)
	}
	if n, err := d.ReadAt(buf, size); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d, %v, want 0, EOF", n, err)
	}
	if n, err := d.ReadAt(buf, -1); n != 0 || !errors.Is(err, dev.ErrOutOfRange) {
		t.Errorf("read at -1: %d, %v, want ErrOutOfRange", n, err)
	}
	if n, err := d.ReadAt(buf[:0], 0); n != 0 || err != nil {
		t.Errorf("empty read: %d, %v", n, err)
	}
	if n, err := d.WriteAt(buf[:0], size); n != 0 || err != nil {
		t.Errorf("empty write at the end: %d, %v", n, err)
	}
	if n, err := d.ReadAt(buf[:100], size-100); n != 100 || err != nil {
		t.Errorf("read up to the end: %d, %v", n, err)
	}
	if z, ok := d.(dev.Zeroer); ok {
		if err := z.WriteZeroes(size-4096, 8192, false); !errors.Is(err, dev.ErrOutOfRange) && !errors.Is(err, dev.ErrUnsupported) {
			t.Errorf("write zeroes past the end: %v, want ErrOutOfRange", err)
		}
	}
	if z, ok := d.(dev.Discarder); ok {
		if err := z.Discard(size, 1<<62); !errors.Is(err, dev.ErrOutOfRange) && !errors.Is(err, dev.ErrUnsupported) {
			t.Errorf("discard past the end: %v, want ErrOutOfRange", err)
		}
	}
}

// testModel runs random operations against a slice.
func testModel(t *testing.T, d dev.Device, o Options) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	model := make([]byte, d.Size())
	buf := make([]byte, 256<<10)
	ops := o.Ops
	if ops == 0 {
		ops = 2000
	}
	var log []string
	for i := range ops {
		n := 1 + rng.Int64N(int64(len(buf)))
		if rng.IntN(2) == 0 {
			n = 1 + rng.Int64N(9000)
		}
		off := rng.Int64N(int64(len(model)) - n + 1)
		if rng.IntN(2) == 0 {
			off, n = off&^511, (n+511)&^511
			n = min(n, int64(len(model))-off)
		}
		var err error
		switch k := rng.IntN(10); {
		case k < 5:
			log = append(log, fmt.Sprintf("%d write %d +%d", i, off, n))
			for j := range buf[:n] {
				buf[j] = byte(i*7 + j)
			}
			_, err = d.WriteAt(buf[:n], off)
			copy(model[off:], buf[:n])
		case k == 5:
			keep := rng.IntN(2) == 0
			log = append(log, fmt.Sprintf("%d zero %d +%d keep=%v", i, off, n, keep))
			if z, ok := d.(dev.Zeroer); ok {
				err = z.WriteZeroes(off, n, keep)
				if errors.Is(err, dev.ErrUnsupported) {
					err = nil
				} else {
					clear(model[off : off+n])
				}
			}
		case k == 6 && o.DiscardZeroes:
			log = append(log, fmt.Sprintf("%d discard %d +%d", i, off, n))
			if z, ok := d.(dev.Discarder); ok {
				err = z.Discard(off, n)
				if errors.Is(err, dev.ErrUnsupported) {
					err = nil
				} else {
					clear(model[off : off+n])
				}
			}
		case k == 7 && i%10 == 0:
			err = d.Flush()
		default:
			_, err = d.ReadAt(buf[:n], off)
			if err == nil && !bytes.Equal(buf[:n], model[off:off+n]) {
				err = fmt.Errorf("read %d +%d differs at byte %d", off, n, off+firstDiff(buf[:n], model[off:off+n]))
			}
		}
		if err != nil {
			t.Fatalf("seed %d, operation %d: %v\nlast operations: %q", seed, i, err, log[max(0, len(log)-20):])
		}
	}
	CheckContents(t, d, model)
}

func firstDiff(a, b []byte) int64 {
	for i := range a {
		if a[i] != b[i] {
			return int64(i)
		}
	}
	return -1
}

// CheckContents fails t unless d reads as want from byte 0.
func CheckContents(t testing.TB, d dev.Device, want []byte) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for off := 0; off < len(want); off += len(buf) {
		p := buf[:min(len(buf), len(want)-off)]
		if _, err := d.ReadAt(p, int64(off)); err != nil {
			t.Fatalf("read %d bytes at %d: %v", len(p), off, err)
		}
		if w := want[off : off+len(p)]; !bytes.Equal(p, w) {
			i := firstDiff(p, w)
			t.Fatalf("byte %d is %#x, want %#x", int64(off)+i, p[i], w[i])
		}
	}
}

// testParallel writes disjoint, interleaved ranges from many goroutines.
func testParallel(t *testing.T, d dev.Device) {
	const writers, piece = 8, 5000
	want := make([]byte, d.Size())
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for off := int64(w * piece); off+piece <= d.Size(); off += writers * piece {
				p := bytes.Repeat([]byte{byte(w + 1)}, piece)
				copy(want[off:], p)
				if _, err := d.WriteAt(p, off); err != nil {
					t.Error(err)
					return
				}
				if err := d.Flush(); err != nil && off%7 == 0 {
					t.Error(err)
				}
				q := make([]byte, piece)
				if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
					t.Errorf("read back at %d: %v, equal %v", off, err, bytes.Equal(p, q))
					return
				}
			}
		}()
	}
	wg.Wait()
	CheckContents(t, d, want)
}

func testExtents(t *testing.T, d dev.Device) {
	x, ok := d.(dev.Extenter)
	if !ok {
		return
	}
	for _, off := range []int64{0, 1 << 20, d.Size() - 70000} {
		if _, err := d.WriteAt(bytes.Repeat([]byte{7}, 70000), off); err != nil {
			t.Fatal(err)
		}
	}
	for off := int64(0); off < d.Size(); {
		es, err := x.Extents(off, d.Size()-off)
		if errors.Is(err, dev.ErrUnsupported) {
			return
		}
		if err != nil || len(es) == 0 {
			t.Fatalf("extents at %d: %v, %v", off, es, err)
		}
		for _, e := range es {
			if e.Off != off || e.Len <= 0 || e.Off+e.Len > d.Size() {
				t.Fatalf("extent %+v, want one at %d", e, off)
			}
			if e.Zero {
				p := make([]byte, e.Len)
				if _, err := d.ReadAt(p, e.Off); err != nil {
					t.Fatal(err)
				}
				if i := bytes.IndexByte(p, 7); i >= 0 {
					t.Fatalf("extent %+v is called zero, byte %d is data", e, e.Off+int64(i))
				}
			}
			off += e.Len
		}
	}
	if _, err := x.Extents(d.Size(), 1); !errors.Is(err, dev.ErrOutOfRange) {
		t.Errorf("extents past the end: %v, want ErrOutOfRange", err)
	}
}

func testClose(t *testing.T, d dev.Device) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, 4096)
			for {
				if _, err := d.WriteAt(p, 0); err != nil {
					if !errors.Is(err, dev.ErrClosed) {
						t.Errorf("write beside close: %v, want ErrClosed", err)
					}
					return
				}
			}
		}()
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if err := d.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 10), 0); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("read after close: %v, want ErrClosed", err)
	}
	if err := d.Flush(); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("flush after close: %v, want ErrClosed", err)
	}
}

func testResize(t *testing.T, d dev.Device) {
	r, ok := d.(dev.Resizer)
	if !ok {
		return
	}
	size := d.Size()
	data := bytes.Repeat([]byte{9}, 10000)
	if _, err := d.WriteAt(data, size-10000); err != nil {
		t.Fatal(err)
	}
	if err := r.Resize(size + 12345); err != nil {
		t.Fatal(err)
	}
	if d.Size() != size+12345 {
		t.Fatalf("size %d after growth, want %d", d.Size(), size+12345)
	}
	want := append(append([]byte(nil), data...), make([]byte, 12345)...)
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, size-10000); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("contents around the old end after growth: %v", err)
	}
	if err := r.Resize(size - 5000); err != nil {
		t.Fatal(err)
	}
	if err := r.Resize(size); err != nil {
		t.Fatal(err)
	}
	clear(want[5000:])
	if _, err := d.ReadAt(got[:10000], size-10000); err != nil || !bytes.Equal(got[:10000], want[:10000]) {
		t.Fatalf("bytes cut off and added again are not zero: %v", err)
	}
}

func testReopen(t *testing.T, d dev.Device, o Options) {
	data := bytes.Repeat([]byte{5}, 10000)
	if _, err := d.WriteAt(data, 3333); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	e := o.Reopen(t)
	defer e.Close()
	got := make([]byte, len(data))
	if _, err := e.ReadAt(got, 3333); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("contents after reopen: %v", err)
	}
}
