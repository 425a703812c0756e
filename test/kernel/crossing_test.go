package kernel

import (
	"testing"

	"mica/internal/crossing"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// TestKernelPool: a pool made by the kernel.
func TestKernelPool(t *testing.T) {
	s := newScenario(t, 1, 64*kib, 64*mib, 4*mib, 8*mib)
	s.kernel(func(sc *script) { sc.random(300) })
	s.kernel(func(sc *script) { sc.random(200) })
}

// TestThousandsOfMappings makes trees of several levels and snapshots of them.
func TestThousandsOfMappings(t *testing.T) {
	const blocks = 4000
	s := newScenario(t, 2, 64*kib, 768*mib, 8*mib, blocks*64*kib)
	s.kernel(func(sc *script) {
		sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: 100, Size: blocks * 64 * kib})
		// Every other block first, then the rest: data blocks alternate, so nothing is one run.
		for _, begin := range []int64{0, 64 * kib} {
			sc.do(crossing.Op{Kind: crossing.Scatter, Dev: 100, Off: begin + 4*kib, Len: 4 * kib, Stride: 128 * kib, Count: blocks / 2, Seed: sc.Seed()})
		}
		sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: 101, Origin: 100})
		sc.do(crossing.Op{Kind: crossing.Scatter, Dev: 100, Off: 0, Len: 512, Stride: 192 * kib, Count: blocks / 3, Seed: sc.Seed()})
		sc.do(crossing.Op{Kind: crossing.Discard, Dev: 101, Off: 10 * mib, Len: 100 * mib})
	})
}
