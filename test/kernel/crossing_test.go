package kernel

import (
	"flag"
	"fmt"
	"testing"

	"mica/internal/crossing"
)

// More rounds of random scripts with other seeds: go test ./test/kernel -run Random -rounds 50
var (
	rounds    = flag.Int("rounds", 1, "pools that TestRandomCrossings sends across")
	firstSeed = flag.Uint64("seed", 100, "seed of the first of them")
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
)

// TestKernelMadePool: a pool of the kernel, changed by mica, changed by the kernel, and so on.
func TestKernelMadePool(t *testing.T) {
	s := newScenario(t, 1, 64*kib, 64*mib, 4*mib, 8*mib)
	s.kernel(func(sc *script) { sc.random(300) })
	s.mica(userSide, func(sc *script) { sc.random(300) })
	s.kernel(func(sc *script) { sc.random(300) })
	s.mica(thinSide, func(sc *script) { sc.random(300) })
	s.kernel(func(sc *script) { sc.random(100) })
}

// TestMicaMadePool: the other way round.
func TestMicaMadePool(t *testing.T) {
	s := newScenario(t, 2, 64*kib, 64*mib, 4*mib, 8*mib)
	s.format()
	s.mica(userSide, func(sc *script) { sc.random(300) })
	s.kernel(func(sc *script) { sc.random(300) })
	s.mica(userSide, func(sc *script) { sc.random(300) })
	s.kernel(func(sc *script) { sc.random(100) })
}

// TestThousandsOfMappings makes trees of several levels and snapshots of them.
func TestThousandsOfMappings(t *testing.T) {
	const blocks = 4000
	size := blocks * 64 * kib
	s := newScenario(t, 3, 64*kib, 768*mib, 8*mib, size)
	s.gen.MaxDevs = 4
	every := func(sc *script, dev uint32, off, n, stride int64) {
		sc.do(crossing.Op{Kind: crossing.Scatter, Dev: dev, Off: off, Len: n, Stride: stride, Count: (size - off) / stride, Seed: sc.Seed()})
	}
	s.kernel(func(sc *script) {
		sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: 100, Size: size})
		// Every other block first, then the rest: data blocks alternate, so nothing is one run.
		every(sc, 100, 4*kib, 4*kib, 128*kib)
		every(sc, 100, 68*kib, 4*kib, 128*kib)
		sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: 101, Origin: 100})
		every(sc, 100, 0, 512, 192*kib)
		sc.do(crossing.Op{Kind: crossing.Discard, Dev: 101, Off: 10 * mib, Len: 100 * mib})
	})
	s.mica(userSide, func(sc *script) {
		sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: 102, Origin: 101})
		every(sc, 101, 8*kib, 1024, 320*kib)
		sc.do(crossing.Op{Kind: crossing.Discard, Dev: 100, Off: 0, Len: 50 * mib})
		sc.do(crossing.Op{Kind: crossing.Delete, Dev: 100})
		sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: 103, Size: size})
		every(sc, 103, 60*kib, 512, 256*kib)
	})
	s.kernel(func(sc *script) {
		every(sc, 102, 12*kib, 512, 448*kib)
		sc.do(crossing.Op{Kind: crossing.Delete, Dev: 101})
		sc.do(crossing.Op{Kind: crossing.Discard, Dev: 103, Off: 0, Len: size})
	})
}

// TestRestoredPools: metadata that a dump was restored into, by either tool, serves both engines.
func TestRestoredPools(t *testing.T) {
	s := newScenario(t, 8, 64*kib, 64*mib, 4*mib, 8*mib)
	s.gen.NoMetadataSnap = true
	s.kernel(func(sc *script) { sc.random(200) })
	s.restore("thin_restore")
	s.mica(userSide, func(sc *script) { sc.random(100) })
	s.kernel(func(sc *script) { sc.random(100) })
	s.restore("mica")
	s.kernel(func(sc *script) { sc.random(100) })
	s.mica(userSide, func(sc *script) { sc.random(100) })
}

// TestLargeBlocks: 512 KiB, where most writes are partial, and 192 KiB, which is no power of two.
func TestLargeBlocks(t *testing.T) {
	for i, block := range []int64{512 * kib, 192 * kib} {
		s := newScenario(t, 4+uint64(i), block, 300*block, 4*mib, 24*block)
		s.gen.MaxWrite = 2 * block
		s.gen.NoDiscard = block&(block-1) != 0
		s.kernel(func(sc *script) { sc.random(150) })
		s.gen.NoDiscard = false
		s.mica(userSide, func(sc *script) { sc.random(150) })
		s.gen.NoDiscard = block&(block-1) != 0
		s.kernel(func(sc *script) { sc.random(60) })
	}
}

// TestGrowth: both devices grow on either side, the kernel's while the pool is active.
func TestGrowth(t *testing.T) {
	s := newScenario(t, 6, 64*kib, 8*mib, 512*kib, 4*mib)
	grow := func(sc *script, data, metadata int64) {
		sc.random(60)
		sc.do(crossing.Op{Kind: crossing.GrowData, Size: data})
		sc.random(60)
		sc.do(crossing.Op{Kind: crossing.GrowMetadata, Size: metadata})
		sc.random(60)
	}
	s.gen.MaxDevs = 4
	s.gen.MaxWrite = 64 * kib
	s.format()
	s.mica(userSide, func(sc *script) { grow(sc, 16*mib, 2*mib) })
	s.kernel(func(sc *script) { grow(sc, 48*mib+64*kib, 3*mib+4*kib) })
	s.mica(userSide, func(sc *script) { grow(sc, 1100*mib, 70*mib) }) // a second bitmap block each
	s.kernel(func(sc *script) { grow(sc, 2200*mib, 140*mib) })
}

// TestHeldMetadataSnapshot: trees that only the snapshot refers to stay, on both sides.
func TestHeldMetadataSnapshot(t *testing.T) {
	s := newScenario(t, 7, 64*kib, 64*mib, 4*mib, 8*mib)
	s.gen.NoMetadataSnap, s.gen.NoDelete = true, true
	fill := func(sc *script, dev uint32) {
		sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: dev, Size: 8 * mib},
			crossing.Op{Kind: crossing.Write, Dev: dev, Off: 0, Len: 4 * mib, Seed: sc.Seed()},
			crossing.Op{Kind: crossing.CreateSnap, Dev: dev + 1, Origin: dev})
	}
	s.kernel(func(sc *script) {
		fill(sc, 1000)
		sc.do(crossing.Op{Kind: crossing.Reserve}, crossing.Op{Kind: crossing.Delete, Dev: 1000})
	})
	s.mica(userSide, func(sc *script) {
		sc.random(80)
		sc.do(crossing.Op{Kind: crossing.Delete, Dev: 1001}, crossing.Op{Kind: crossing.Release})
		fill(sc, 2000)
		sc.do(crossing.Op{Kind: crossing.Reserve}, crossing.Op{Kind: crossing.Delete, Dev: 2001})
		sc.random(80)
	})
	s.kernel(func(sc *script) {
		sc.random(80)
		sc.do(crossing.Op{Kind: crossing.Release}, crossing.Op{Kind: crossing.Reserve})
		sc.random(80)
	})
}

// TestManyDevices makes the trees of devices more than one node (252 roots, 126 details) and
// counts of blocks far above 3.
func TestManyDevices(t *testing.T) {
	s := newScenario(t, 9, 64*kib, 256*mib, 8*mib, mib)
	s.gen.NoDelete, s.gen.NoMetadataSnap, s.gen.MaxDevs = true, true, 0
	chain := func(sc *script, first, last uint32) {
		for id := first; id <= last; id++ {
			switch {
			case id%10 == 1:
				sc.do(crossing.Op{Kind: crossing.CreateThin, Dev: id, Size: mib},
					crossing.Op{Kind: crossing.Write, Dev: id, Off: 0, Len: 5 * 64 * kib, Seed: sc.Seed()})
			default: // a snapshot of the one before, with a block of its own
				sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: id, Origin: id - 1},
					crossing.Op{Kind: crossing.Write, Dev: id, Off: int64(id%16) * 64 * kib, Len: 512, Seed: sc.Seed()})
			}
		}
	}
	thinOut := func(sc *script, first, last, step uint32) {
		for id := first; id <= last; id += step {
			sc.do(crossing.Op{Kind: crossing.Delete, Dev: id})
		}
	}
	s.format()
	s.mica(userSide, func(sc *script) { chain(sc, 1, 260) })
	s.kernel(func(sc *script) {
		chain(sc, 261, 280)
		thinOut(sc, 2, 280, 3)
		thinOut(sc, 3, 280, 3)
		// 40 snapshots of one device that then diverge: every leaf is shared and copied.
		for id := uint32(1000); id < 1040; id++ {
			sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: id, Origin: 1},
				crossing.Op{Kind: crossing.Write, Dev: id, Off: 64 * kib, Len: 512, Seed: sc.Seed()})
		}
	})
	s.mica(userSide, func(sc *script) {
		for id := uint32(2000); id < 2040; id++ {
			sc.do(crossing.Op{Kind: crossing.CreateSnap, Dev: id, Origin: 1},
				crossing.Op{Kind: crossing.Write, Dev: id, Off: 128 * kib, Len: 512, Seed: sc.Seed()})
		}
	})
	s.kernel(func(sc *script) {
		thinOut(sc, 1, 280, 3)
		thinOut(sc, 1000, 1039, 1)
	})
}

// TestRandomCrossings sends random pools across several times. Sizes, and who begins, depend on
// the seed.
func TestRandomCrossings(t *testing.T) {
	for i := range uint64(*rounds) {
		seed := *firstSeed + i
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			blocks := []int64{64 * kib, 128 * kib, 64 * kib, 512 * kib, 320 * kib}
			block := blocks[seed%uint64(len(blocks))]
			s := newScenario(t, seed, block, 700*block, 4*mib, 40*block)
			s.gen.MaxDevs = 4 + int(seed%9)
			odd := block&(block-1) != 0
			if seed%2 == 0 {
				s.format()
				s.mica(userSide, func(sc *script) { sc.random(200) })
			}
			for range 3 {
				s.gen.NoDiscard = odd
				s.kernel(func(sc *script) { sc.random(150) })
				s.gen.NoDiscard = false
				s.mica(userSide, func(sc *script) { sc.random(200) })
			}
		})
	}
}
