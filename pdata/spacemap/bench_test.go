package spacemap

import (
	"fmt"
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/txn"
)

// benchMaps are the maps of a pool of 64 GiB in blocks of 64 KiB, on memory.
type benchMaps struct {
	b    *testing.B
	tm   *txn.Manager
	meta *Meta
	data *Data
}

const benchBlocks = 1 << 20

func newBenchMaps(b *testing.B) *benchMaps {
	d := dev.NewMem(8192 * block.Size)
	m := &benchMaps{b: b, tm: txn.New(d, block.NewCache(d, 16<<20))}
	var err error
	m.meta, err = FormatMeta(m.tm, 8192)
	m.must(err)
	m.data, err = FormatData(m.tm, benchBlocks)
	m.must(err)
	m.commit()
	return m
}

func (m *benchMaps) must(err error) {
	if err != nil {
		m.b.Fatal(err)
	}
}

func (m *benchMaps) commit() {
	_, err := m.data.Finish()
	m.must(err)
	_, err = m.meta.Finish()
	m.must(err)
	m.must(m.tm.Close().Write())
	m.meta.Committed(m.meta.CloseTxn())
	for _, b := range m.data.CloseTxn() {
		m.data.Thaw(b, 1)
	}
}

// BenchmarkData is the allocator of data blocks, and what its part of a commit costs.
func BenchmarkData(b *testing.B) {
	for _, run := range []uint64{1, 64} {
		b.Run(fmt.Sprintf("op=alloc/run=%d", run), func(b *testing.B) {
			m, next := newBenchMaps(b), uint64(0) // blocks are given out in order
			b.ReportAllocs()
			for b.Loop() {
				begin, n := m.data.Alloc(next, run)
				for i := range n {
					m.must(m.data.Map(begin + i))
				}
				if next = begin + n; next+run > benchBlocks {
					b.StopTimer()
					for i := range next {
						m.must(m.data.Dec(i))
					}
					m.commit()
					next = 0
					b.StartTimer()
				}
			}
		})
	}
	b.Run("op=share", func(b *testing.B) { // one reference more, and one less
		m := newBenchMaps(b)
		begin, n := m.data.Alloc(0, 1024)
		for i := range n {
			m.must(m.data.Map(begin + i))
		}
		b.ReportAllocs()
		for i := uint64(0); b.Loop(); i++ {
			m.must(m.data.Inc(begin + i*7919%n))
			m.must(m.data.Dec(begin + i*7919%n))
		}
	})
	for _, bitmaps := range []uint64{1, 64} {
		b.Run(fmt.Sprintf("op=commit/bitmaps=%d", bitmaps), func(b *testing.B) {
			m := newBenchMaps(b)
			b.ReportAllocs()
			for i := uint64(0); b.Loop(); i++ {
				for k := range bitmaps {
					at := k*EntriesPerBitmap + i/2%EntriesPerBitmap
					if i%2 == 0 {
						_, n := m.data.Alloc(at, 1)
						if n == 0 {
							b.Fatalf("no block at %d", at)
						}
						m.must(m.data.Map(at))
					} else {
						m.must(m.data.Dec(at))
					}
				}
				m.commit()
			}
		})
	}
}
