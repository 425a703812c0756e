package user

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/dev/devtest"
	"mica/engine"
)

// TestThinConforms runs the device suite on thin devices of several block sizes, fresh ones and
// snapshots of written ones.
func TestThinConforms(t *testing.T) {
	const size = 5<<20 + 512
	for _, bs := range []int64{64 << 10, 192 << 10, 1 << 20, 4 << 20} {
		for _, o := range []struct {
			name string
			opts Options
		}{
			{"plain", Options{}},
			{"tiny caches", Options{TableCacheBytes: 1, MaxPending: 3}},
			{"no passdown", Options{NoDiscardPassdown: true}},
		} {
			t.Run(o.name, func(t *testing.T) {
				var last *testPool
				devtest.Run(t, size, func(t *testing.T) dev.Device {
					last = newPool(t, poolSize{bs: bs, dataBlocks: uint64(32<<20/bs) + 8}, o.opts)
					last.create(1)
					return last.thin(1, size)
				}, devtest.Options{Ops: 500, Fixed: true, Reopen: func(t *testing.T) dev.Device {
					last.reopen()
					return last.thin(1, size)
				}})
			})
		}
	}
}

func TestReadOnlyHandles(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{})
	tp.create(1)
	w := tp.thin(1, 1<<20)
	if _, err := tp.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true}); err == nil {
		t.Error("a device open for writing was opened a second time")
	}
	w.Close()
	a := tp.thinWith(1, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true})
	b := tp.thinWith(1, engine.OpenOptions{SizeBytes: 2 << 20, ReadOnly: true})
	if _, err := tp.p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20}); err == nil {
		t.Error("a device with readers was opened for writing")
	}
	if _, err := a.WriteAt([]byte{1}, 0); err == nil {
		t.Error("write through a read-only handle")
	}
	wantBytes(t, b, 0, 1<<20, 1<<20)
	a.Close()
	wantBytes(t, b, 0, 1<<20, 0)
}

// TestHolesBesidePendingLeaves: a walk over what is not in memory must not step over mappings
// that are only in memory.
func TestHolesBesidePendingLeaves(t *testing.T) {
	tp := newPool(t, poolSize{}, still)
	tp.create(1)
	const size = 4 * leafBlocks * block
	h := tp.thin(1, size)
	at := int64(2*leafBlocks+7) * block
	write(t, h, fill(1, block), at)
	es, err := h.Extents(0, size)
	must(t, err)
	want := []dev.Extent{{Off: 0, Len: at, Hole: true, Zero: true}, {Off: at, Len: block}, {Off: at + block, Len: size - at - block, Hole: true, Zero: true}}
	if fmt.Sprint(es) != fmt.Sprint(want) {
		t.Errorf("extents %v, want %v", es, want)
	}
	must(t, h.Discard(0, size))
	if n := h.MappedBlocks(); n != 0 {
		t.Errorf("%d blocks mapped after a discard of all", n)
	}
	must(t, h.Flush())
	if n := tp.p.cache.len(); n > 2 {
		t.Errorf("a walk over an empty device left %d leaves in memory", n)
	}
}

// TestTableCacheIsBounded reads a device that is much larger than the cache.
func TestTableCacheIsBounded(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{CommitInterval: time.Hour, TableCacheBytes: 50 * leafBytes})
	tp.create(1)
	h := tp.thin(1, 1000*leafBlocks*block)
	for i := range int64(1000) {
		if i%2 == 0 {
			write(t, h, fill(byte(i), 512), i*leafBlocks*block)
		}
		if i == 500 {
			must(t, h.Flush())
		}
	}
	if n := tp.p.cache.len(); n < 249 {
		t.Errorf("%d leaves in memory, some with pending entries are missing", n)
	}
	must(t, h.Flush())
	for i := range int64(1000) {
		want := byte(0)
		if i%2 == 0 {
			want = byte(i)
		}
		wantBytes(t, h, want, 512, i*leafBlocks*block)
	}
	if n := tp.p.cache.len(); n > 60 {
		t.Errorf("%d leaves in memory, the bound is 50", n)
	}
	h.Close()
	if n := tp.p.cache.len(); n != 0 {
		t.Errorf("%d leaves in memory after the last device was closed", n)
	}
}

// TestLargestBlocks: blocks of 1 GiB are prepared in pieces, and their holes stay holes.
func TestLargestBlocks(t *testing.T) {
	const bs = 1 << 30
	tp := newPool(t, poolSize{bs: bs, dataBlocks: 4}, still)
	tp.create(1)
	h := tp.thin(1, 3*bs)
	write(t, h, fill(1, 8192), bs-4096) // the end of one block and the beginning of the next
	tp.snap(2, 1)
	got, _ := tp.counting(func() { write(t, h, fill(2, 4096), bs+(5<<20)) })
	if got.Reads != 1024 || got.Writes != 2 {
		t.Errorf("breaking sharing cost %+v, want 1024 reads and a write for each of two pieces", got)
	}
	host, err := tp.dataMem.HostBytes()
	must(t, err)
	if host > 4<<20 {
		t.Errorf("the data device holds %d bytes", host)
	}
	wantBytes(t, h, 1, 8192, bs-4096)
	wantBytes(t, h, 2, 4096, bs+(5<<20))
	wantBytes(t, h, 0, 1<<20, bs+(4<<20))
	wantBytes(t, tp.thin(2, 3*bs), 0, 4096, bs+(5<<20))
	must(t, h.WriteZeroes(0, bs, false))
	if n := h.MappedBlocks(); n != 1 {
		t.Errorf("%d blocks mapped, want 1", n)
	}
}

// TestPiecesAreBounded: many blocks that are prepared at once share a bounded number of buffers.
func TestPiecesAreBounded(t *testing.T) {
	tp := newPool(t, poolSize{bs: 2 << 20, dataBlocks: 128}, still)
	tp.create(1)
	h := tp.thin(1, 128<<20)
	write(t, h, fill(1, 128<<20), 0)
	tp.snap(2, 1)
	if n := cap(tp.p.copies) * 1 << 20; n != copyBytes {
		t.Errorf("%d bytes of buffers, want %d", n, copyBytes)
	}
	var wg sync.WaitGroup
	for i := range int64(60) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := h.WriteAt(fill(2, 4096), i<<21); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	for i := range int64(60) {
		wantBytes(t, h, 2, 4096, i<<21)
		wantBytes(t, h, 1, 2<<20-4096, i<<21+4096)
	}
	if n := len(tp.p.copies); n != cap(tp.p.copies) {
		t.Errorf("%d of %d buffers came back", n, cap(tp.p.copies))
	}
}
