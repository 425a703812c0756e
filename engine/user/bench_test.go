package user

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// Benchmarks of a pool on files in memory (/dev/shm), beside a plain file (peer=file): what the
// thin layer costs is the ratio of the two.

func benchPool(b *testing.B, dataBytes int64) *Pool {
	b.Helper()
	l := Location{Dir: filepath.Join(shm(b), "pool")}
	must(b, Format(ctx, l, FormatOptions{DataBytes: dataBytes}))
	p, err := Open(ctx, l, Options{NoSpaceTimeout: time.Second})
	must(b, err)
	b.Cleanup(func() { must(b, p.Close()) })
	return p
}

func benchThin(b *testing.B, p *Pool, id thin.DevID, size int64) engine.Thin {
	b.Helper()
	h, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: size})
	must(b, err)
	b.Cleanup(func() { h.Close() })
	return h
}

const benchBytes = 256 << 20

func fillDevice(b *testing.B, d dev.Device) {
	b.Helper()
	p := fill(1, 1<<20)
	for off := int64(0); off < benchBytes; off += int64(len(p)) {
		write(b, d, p, off)
	}
}

// benchDevices runs do on a plain file and on a thin device, both written in full.
func benchDevices(b *testing.B, do func(b *testing.B, d dev.Device)) {
	b.Run("peer=file", func(b *testing.B) {
		f, err := dev.CreateFile(filepath.Join(shm(b), "f"), benchBytes, dev.OpenOptions{})
		must(b, err)
		defer f.Close()
		fillDevice(b, f)
		do(b, f)
	})
	b.Run("peer=thin", func(b *testing.B) {
		p := benchPool(b, benchBytes*2)
		must(b, p.CreateThin(ctx, 1))
		h := benchThin(b, p, 1, benchBytes)
		fillDevice(b, h)
		must(b, h.Flush())
		do(b, h)
	})
}

// benchIO keeps depth requests of n bytes under way, or more where there are more processors.
func benchIO(b *testing.B, n int64, depth int, sequential bool, io func(d dev.Device, p []byte, off int64) error) {
	benchDevices(b, func(b *testing.B, d dev.Device) {
		var next atomic.Int64
		procs := runtime.GOMAXPROCS(0)
		if depth < procs {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(depth))
			procs = depth
		}
		b.SetParallelism(depth / procs)
		b.SetBytes(n)
		b.ReportAllocs()
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			p := make([]byte, n)
			rng := rand.New(rand.NewPCG(uint64(next.Add(1)), 0))
			for pb.Next() {
				off := rng.Int64N(benchBytes/n) * n
				if sequential {
					off = next.Add(n) % (benchBytes - n) / n * n
				}
				if err := io(d, p, off); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

var benchSizes = []struct {
	name  string
	n     int64
	depth int
	seq   bool
}{{"bs=4KiB/qd=1", 4 << 10, 1, false}, {"bs=4KiB/qd=16", 4 << 10, 16, false}, {"bs=64KiB/qd=4", 64 << 10, 4, false}, {"bs=1MiB/qd=4", 1 << 20, 4, true}}

func BenchmarkThinRead(b *testing.B) {
	for _, c := range benchSizes {
		b.Run(c.name, func(b *testing.B) {
			benchIO(b, c.n, c.depth, c.seq, func(d dev.Device, p []byte, off int64) error {
				_, err := d.ReadAt(p, off)
				return err
			})
		})
	}
}

func BenchmarkThinWrite(b *testing.B) {
	for _, c := range benchSizes {
		b.Run(c.name, func(b *testing.B) {
			benchIO(b, c.n, c.depth, c.seq, func(d dev.Device, p []byte, off int64) error {
				_, err := d.WriteAt(p, off)
				return err
			})
		})
	}
}

// BenchmarkThinTry is what an export's inline path does.
func BenchmarkThinTry(b *testing.B) {
	for _, op := range []string{"read", "write"} {
		b.Run("op="+op+"/bs=4KiB", func(b *testing.B) {
			p := benchPool(b, benchBytes*2)
			must(b, p.CreateThin(ctx, 1))
			h := benchThin(b, p, 1, benchBytes)
			fillDevice(b, h)
			buf := make([]byte, 4096)
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			b.SetBytes(4096)
			for b.Loop() {
				off := rng.Int64N(benchBytes/4096) * 4096
				var err error
				if op == "read" {
					err = h.TryReadAt(buf, off)
				} else {
					err = h.TryWriteAt(buf, off)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkThinLookup is the thin layer alone: a mapped read of a device whose data costs nothing.
func BenchmarkThinLookup(b *testing.B) {
	tp := newPool(b, poolSize{dataBlocks: 1024}, still)
	tp.create(1)
	h := tp.thin(1, 64<<20)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		write(b, h, fill(1, 1<<20), off)
	}
	tp.p.data.Device = nothing{tp.p.data.Device}
	defer func() { tp.p.data.Device = tp.p.data.Device.(nothing).Device }()
	buf := make([]byte, 512)
	b.Run("op=read", func(b *testing.B) {
		b.ReportAllocs()
		for i := int64(0); b.Loop(); i += 77 * 4096 {
			h.TryReadAt(buf, i%(63<<20))
		}
	})
	b.Run("op=write", func(b *testing.B) {
		b.ReportAllocs()
		for i := int64(0); b.Loop(); i += 77 * 4096 {
			h.TryWriteAt(buf, i%(63<<20))
		}
	})
}

// nothing is a device whose reads and writes do nothing.
type nothing struct{ dev.Device }

func (nothing) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (nothing) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }

// BenchmarkThinAllocate writes in sequence to blocks that are not mapped yet.
func BenchmarkThinAllocate(b *testing.B) {
	for _, c := range []struct {
		name string
		n    int64
	}{{"bs=4KiB", 4 << 10}, {"bs=64KiB", 64 << 10}, {"bs=1MiB", 1 << 20}} {
		b.Run(c.name, func(b *testing.B) {
			p := benchPool(b, 4*benchBytes)
			must(b, p.CreateThin(ctx, 1))
			h := benchThin(b, p, 1, 1<<40)
			buf := fill(1, c.n)
			step := max(c.n, 64<<10)
			b.SetBytes(c.n)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				write(b, h, buf, off)
				if off += step; off >= 2*benchBytes {
					b.StopTimer()
					must(b, h.Discard(0, off))
					must(b, p.Commit(ctx))
					off = 0
					b.StartTimer()
				}
			}
		})
	}
}

// BenchmarkThinBreakSharing writes into each block of a fresh snapshot: a part, or all of it.
func BenchmarkThinBreakSharing(b *testing.B) {
	for _, n := range []int64{4 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("bs=%dKiB", n>>10), func(b *testing.B) {
			p := benchPool(b, 4*benchBytes)
			must(b, p.CreateThin(ctx, 1))
			h := benchThin(b, p, 1, benchBytes)
			fillDevice(b, h)
			buf := fill(2, n)
			blocks := int64(benchBytes >> 16)
			i, id := blocks, thin.DevID(1)
			b.SetBytes(n)
			b.ReportAllocs()
			for b.Loop() {
				if i == blocks {
					b.StopTimer()
					if id > 1 {
						must(b, p.Delete(ctx, id))
					}
					id++
					must(b, p.CreateSnap(ctx, id, 1))
					must(b, p.Commit(ctx))
					i = 0
					b.StartTimer()
				}
				write(b, h, buf, i*37%blocks<<16)
				i++
			}
		})
	}
}

// BenchmarkSnapshot takes durable snapshots of a device, idle or written between.
func BenchmarkSnapshot(b *testing.B) {
	for _, mapped := range []int64{1, 1000, 60000} {
		b.Run(fmt.Sprintf("mapped=%d", mapped), func(b *testing.B) {
			tp := newPool(b, poolSize{dataBlocks: uint64(mapped)*2 + 20000, metaBlocks: 40000}, Options{})
			tp.create(1)
			h := tp.thin(1, (mapped+1)<<16)
			for i := range mapped {
				write(b, h, fill(1, 512), i<<16)
			}
			must(b, tp.p.Commit(ctx))
			id, buf := thin.DevID(2), fill(2, 512)
			b.ReportAllocs()
			for b.Loop() {
				write(b, h, buf, 0)
				must(b, tp.p.CreateSnap(ctx, id, 1))
				id++
				if id%10000 == 0 {
					b.StopTimer()
					for d := thin.DevID(2); d < id; d++ {
						tp.p.Delete(ctx, d)
					}
					b.StartTimer()
				}
			}
		})
	}
}

// BenchmarkFlush is write and flush by several goroutines on their own devices: of new blocks, which
// takes a commit, and of mapped ones, which takes a sync.
func BenchmarkFlush(b *testing.B) {
	for _, mapped := range []bool{false, true} {
		b.Run(fmt.Sprintf("mapped=%v", mapped), func(b *testing.B) {
			p := benchPool(b, 4*benchBytes)
			var next atomic.Int64
			var hs []engine.Thin
			for i := range runtime.GOMAXPROCS(0) {
				id := thin.DevID(i)
				must(b, p.CreateThin(ctx, id))
				hs = append(hs, benchThin(b, p, id, 1<<40))
				write(b, hs[i], fill(1, 8192), 0)
				must(b, hs[i].Flush())
			}
			b.SetBytes(8192)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				h, buf := hs[next.Add(1)-1], fill(1, 8192)
				for off := int64(0); pb.Next(); off += 64 << 10 {
					if mapped || off >= 64<<20 {
						if !mapped {
							must(b, h.Discard(0, off))
						}
						off = 0
					}
					write(b, h, buf, off)
					must(b, h.Flush())
				}
			})
		})
	}
}

// BenchmarkCommit makes new mappings durable, which are all over a large device or lie together, on
// memory: what a commit costs the processor.
func BenchmarkCommit(b *testing.B) {
	for _, c := range []struct {
		name     string
		mappings int64
		step     int64
	}{{"mappings=1", 1, 1}, {"mappings=1000", 1000, 1}, {"mappings=1000/spread", 1000, 1009}} {
		b.Run(c.name, func(b *testing.B) {
			tp := newPool(b, poolSize{dataBlocks: 1 << 20, metaBlocks: 16384}, still)
			tp.create(1)
			const blocks = 1 << 20
			h, buf := tp.thin(1, blocks*block), fill(1, 512)
			at, n := int64(0), int64(0)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				if n+c.mappings > blocks/4 {
					must(b, h.Discard(0, blocks*block))
					must(b, tp.p.Commit(ctx))
					n = 0
				}
				for range c.mappings {
					write(b, h, buf, at*block)
					at, n = (at+c.step)%blocks, n+1
				}
				b.StartTimer()
				must(b, tp.p.Commit(ctx))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(c.mappings), "ns/mapping")
		})
	}
}
