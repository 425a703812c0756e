package repair

import (
	"fmt"
	"testing"

	"mica/dev"
	"mica/thin"
)

// BenchmarkRepair makes a pool anew: an image, and snapshots that share most of it.
func BenchmarkRepair(b *testing.B) {
	const mappings, snaps = 200000, 100
	p := newPool(b, 1, 16384, 4*mappings)
	p.must(p.m.CreateThin(1))
	for vb := thin.VBlock(0); vb < mappings; vb += 10000 {
		p.write(1, vb, 10000, 1)
		p.commit()
	}
	for i := range thin.DevID(snaps) {
		p.must(p.m.CreateSnap(10+i, 1))
		p.write(10+i, thin.VBlock(p.rng.Intn(mappings-1000)), 100, 10)
		p.commit()
	}
	for _, dry := range []bool{true, false} {
		b.Run(fmt.Sprintf("dry=%v", dry), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var out dev.Device
				if !dry {
					out = dev.NewMem(p.mem.Size())
				}
				if _, err := Repair(p.mem, out, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
