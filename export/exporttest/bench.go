package exporttest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// memory is a device that does everything at once.
type memory struct{ *dev.Mem }

func (m memory) TryReadAt(p []byte, off int64) error {
	_, err := m.Mem.ReadAt(p, off)
	return err
}

func (m memory) TryWriteAt(p []byte, off int64) error {
	_, err := m.Mem.WriteAt(p, off)
	return err
}

// Bench measures a node on memory: what the transport itself costs. Direct I/O, one request in flight
// for each goroutine.
func Bench(b *testing.B, d Driver) {
	if os.Geteuid() != 0 {
		b.Skip("SKIPPED: block devices need root")
	}
	if err := d.Available(); err != nil {
		b.Skipf("SKIPPED here: %v", err)
	}
	const size = 64 << 20
	r := newRig(b, d)
	m := memory{dev.NewMem(size)}
	if _, err := m.WriteAt(fill(make([]byte, size), 1), 0); err != nil {
		b.Fatal(err)
	}
	a, err := r.e.Attach(within(b, time.Minute), "bench", m, export.AttachOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.detach(a)
	for _, c := range []struct {
		bs, depth int
		write     bool
	}{{4 << 10, 1, false}, {4 << 10, 1, true}, {4 << 10, 16, false}, {4 << 10, 16, true}, {1 << 20, 4, false}, {1 << 20, 4, true}} {
		b.Run(fmt.Sprintf("bs=%dKiB/depth=%d/write=%v", c.bs>>10, c.depth, c.write), func(b *testing.B) {
			f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			b.SetBytes(int64(c.bs))
			b.ReportAllocs()
			var wg sync.WaitGroup
			left := make(chan struct{}, b.N)
			for range b.N {
				left <- struct{}{}
			}
			close(left)
			b.ResetTimer()
			for w := range c.depth {
				buf := aligned(b, c.bs)
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(w), 1))
					for range left {
						off, err := rnd.Int64N(size/int64(c.bs))*int64(c.bs), error(nil)
						if c.write {
							_, err = f.WriteAt(buf, off)
						} else {
							_, err = f.ReadAt(buf, off)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
