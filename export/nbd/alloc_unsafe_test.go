package nbd

import (
	"fmt"
	"io"
	"testing"
	"unsafe"

	"mica/dev"
)

// TestNoGarbage: small requests cost no allocation, inline or at a worker, in batches or one by
// one, with either kind of reply.
func TestNoGarbage(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools drop what is put into them")
	}
	m := newTryMem(1 << 20)
	if _, err := m.WriteAt(pattern(1, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	file := newFileDevice(t, 1<<20)
	for name, d := range map[string]dev.Device{"trier": mappedTrier{m}, "file": file, "would_block": refusing{m}} {
		for _, structured := range []bool{false, true} {
			if name == "would_block" && structured {
				continue // holes are looked for, which allocates
			}
			for _, batch := range []int{1, 16} {
				t.Run(fmt.Sprintf("%s/structured=%v/batch=%d", name, structured, batch), func(t *testing.T) {
					_, c := serveDevice(t, d, ExportOptions{}, structured, false)
					var b []byte
					answer := 0
					for i := range batch {
						b = append(b, rawRequest(0, cmdRead, 1, uint64(i)*8192, 4096, nil)...)
						b = append(b, rawRequest(0, cmdWrite, 2, uint64(i)*8192+4096, 4096, make([]byte, 4096))...)
						answer += 4096 + 2*simpleSize
						if structured {
							answer += dataChunkSize - simpleSize
						}
					}
					in := make([]byte, answer)
					once := func() {
						if _, err := c.nc.Write(b); err != nil {
							t.Fatal(err)
						}
						if _, err := io.ReadFull(c.nc, in); err != nil {
							t.Fatal(err)
						}
					}
					once()
					if n := testing.AllocsPerRun(300, once); n != 0 {
						t.Errorf("%.0f allocations for %d requests", n, 2*batch)
					}
				})
			}
		}
	}
}

// mappedTrier serves everything at once and allocates nothing for it.
type mappedTrier struct{ m *tryMem }

func (d mappedTrier) ReadAt(p []byte, off int64) (int, error)  { return d.m.Mem.ReadAt(p, off) }
func (d mappedTrier) WriteAt(p []byte, off int64) (int, error) { return d.m.Mem.WriteAt(p, off) }
func (d mappedTrier) Size() int64                              { return d.m.Size() }
func (d mappedTrier) Flush() error                             { return nil }
func (d mappedTrier) Close() error                             { return nil }

func (d mappedTrier) TryReadAt(p []byte, off int64) error {
	_, err := d.m.Mem.ReadAt(p, off)
	return err
}

func (d mappedTrier) TryWriteAt(p []byte, off int64) error {
	_, err := d.m.Mem.WriteAt(p, off)
	return err
}

// refusing would block on everything.
type refusing struct{ m *tryMem }

func (d refusing) ReadAt(p []byte, off int64) (int, error)  { return d.m.Mem.ReadAt(p, off) }
func (d refusing) WriteAt(p []byte, off int64) (int, error) { return d.m.Mem.WriteAt(p, off) }
func (d refusing) Size() int64                              { return d.m.Size() }
func (d refusing) Flush() error                             { return nil }
func (d refusing) Close() error                             { return nil }
func (d refusing) TryReadAt([]byte, int64) error            { return dev.ErrWouldBlock }
func (d refusing) TryWriteAt([]byte, int64) error           { return dev.ErrWouldBlock }

// TestIdleConnectionsHoldNoBuffers: a connection that waits for its client has given its memory
// back.
func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	l := &memLink{in: rawRequest(0, cmdRead, 1, 0, 4096, nil), step: 1 << 20}
	e, err := newExport("", dev.NewMem(1<<20), ExportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := newConn(e, e.terms(true), l, defaultWorkers, newBudget(1<<20), quiet)
	l.idled = func() {
		if c.in.buf != nil || c.out.slab != nil {
			t.Error("a waiting connection holds buffers")
		}
	}
	if err := c.run(); err != nil {
		t.Error(err)
	}
	if len(l.out) != dataChunkSize+4096 {
		t.Errorf("%d bytes of reply", len(l.out))
	}
}

// TestBuffersAreAligned: devices may use direct I/O on them.
func TestBuffersAreAligned(t *testing.T) {
	for _, n := range []int{1, inlineMax, pieceSize, wholeSize} {
		b := getBuffer(n)
		if len(b.b) < n {
			t.Errorf("buffer of %d bytes, want %d", len(b.b), n)
		}
		if a := uintptr(unsafe.Pointer(&b.b[0])); a%4096 != 0 {
			t.Errorf("buffer of %d bytes at %#x", len(b.b), a)
		}
		b.put()
	}
}
