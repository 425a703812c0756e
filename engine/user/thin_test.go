package user

import (
	"testing"

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
