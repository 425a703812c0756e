//go:build guest

package kernel

import (
	"context"
	"errors"
	"testing"
	"time"

	"mica/engine"
	"mica/thin"
)

// TestDeletesGiveBack: what only a deleted device had is back on the host when the delete returns;
// what two had shared, soon after the second is gone.
func TestDeletesGiveBack(t *testing.T) {
	p, err := Open(ctx, Source{Dir: newDir(t, 64<<20, 2<<20, 64<<10)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	host := func() int64 { return p.data.hostBytes() >> 20 }
	fill := func(id thin.DevID, off, n int64) {
		t.Helper()
		d, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: 32 << 20})
		must(err)
		for at := off; at < off+n; at += 1 << 20 {
			_, err = d.WriteAt([]byte{1}, at)
			must(err)
			_, err = d.WriteAt(make([]byte, 1<<20), at)
			must(err)
		}
		must(d.Flush())
		must(d.Close())
	}
	must(p.CreateThin(ctx, 1))
	fill(1, 0, 8<<20)
	must(p.CreateSnap(ctx, 2, 1))
	fill(2, 8<<20, 4<<20) // its own
	fill(2, 0, 2<<20)     // broken sharing
	if h := host(); h != 14 {
		t.Errorf("%d MiB on the host, want 14", h)
	}
	must(p.Delete(ctx, 2))
	if h := host(); h != 8 {
		t.Errorf("%d MiB on the host when the snapshot is gone, want 8", h)
	}
	must(p.CreateSnap(ctx, 3, 1))
	must(p.Delete(ctx, 1)) // 3 has all of it
	if h := host(); h != 8 {
		t.Errorf("%d MiB on the host, device 3 maps 8", h)
	}
	d, err := p.Open(ctx, 3, engine.OpenOptions{SizeBytes: 8 << 20, ReadOnly: true})
	must(err)
	b := make([]byte, 1<<20)
	for off := int64(0); off < 8<<20; off += 1 << 20 {
		_, err := d.ReadAt(b, off)
		must(err)
	}
	must(d.Close())
	must(p.Delete(ctx, 3)) // nothing of it is as young as itself
	for deadline := time.Now().Add(20 * time.Second); host() > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	if h := host(); h != 0 {
		t.Errorf("%d MiB on the host of an empty pool", h)
	}

	// Interrupted, the device is still there.
	must(p.CreateThin(ctx, 4))
	fill(4, 0, 4<<20)
	short, cancel := context.WithCancel(ctx)
	cancel()
	if err := p.Delete(short, 4); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted delete: %v", err)
	}
	if _, err := p.Device(ctx, 4); err != nil {
		t.Error(err)
	}
	must(p.Delete(ctx, 4))
	must(p.Close())
	if left := leftOver(t); len(left) > 0 {
		t.Errorf("left in the kernel: %v", left)
	}
}
