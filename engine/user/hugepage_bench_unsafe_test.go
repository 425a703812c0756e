package user

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"unsafe"

	"mica/thin"

	"golang.org/x/sys/unix"
)

// BenchmarkHugePages looks up random blocks among 10 million mappings: in leaves of the Go heap, as
// the table has them, and in leaves that lie in memory which the kernel was asked to back by huge
// pages. The figure is that of one look-up, 64 of them in an iteration.
func BenchmarkHugePages(b *testing.B) {
	const leaves = 10_000_000/leafBlocks + 1
	for _, where := range []string{"heap", "mapped", "huge"} {
		b.Run(fmt.Sprintf("memory=%s", where), func(b *testing.B) {
			var t table
			t.reach(leaves * leafBlocks)
			next := func() *leaf { return new(leaf) }
			if where != "heap" {
				const size = int(unsafe.Sizeof(leaf{}))
				n := (leaves*size + 4<<20) &^ (2<<20 - 1)
				mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Munmap(mem)
				advice := unix.MADV_NOHUGEPAGE
				if where == "huge" {
					advice = unix.MADV_HUGEPAGE
				}
				if err := unix.Madvise(mem, advice); err != nil {
					b.Skipf("SKIPPED: madvise: %v", err)
				}
				next = func() *leaf { // it holds no pointers of the Go heap
					l := (*leaf)(unsafe.Pointer(&mem[0]))
					mem = mem[size:]
					return l
				}
			}
			for i := range uint64(leaves) {
				l := next()
				for j := range l.entries {
					l.entries[j].Store(i*leafBlocks + uint64(j))
				}
				l.used.Store(true)
				t.slot(thin.VBlock(i * leafBlocks)).Store(l)
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			var at [4096]uint64
			for i := range at {
				at[i] = rnd.Uint64N(leaves * leafBlocks)
			}
			b.ResetTimer()
			step, n := uint64(0), 0
			for b.Loop() {
				for range 64 {
					vb := (at[n%len(at)] + step) % (leaves * leafBlocks)
					n++
					step += 4099 * leafBlocks / 3
					if got := t.at(thin.VBlock(vb)).entries[vb%leafBlocks].Load(); got != vb {
						b.Fatalf("block %d: %d", vb, got)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/lookup")
		})
	}
}
