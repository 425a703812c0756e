package thin

import (
	"bytes"
	"flag"
	"fmt"
	"testing"
)

var modelRounds = flag.Int("model.rounds", 40, "rounds of each pool model test")

// check holds the committed state against our own checker.
func (p *testPool) check() {
	p.t.Helper()
	r, err := Check(p.mem, CheckOptions{})
	p.must(err)
	mustClean(p.t, r)
	if r.Devices != len(p.committed.devs) {
		p.t.Fatalf("check counts %d devices, want %d", r.Devices, len(p.committed.devs))
	}
	n := uint64(0)
	for _, d := range p.committed.devs {
		n += uint64(len(d.maps))
	}
	if r.Mappings != n {
		p.t.Fatalf("check counts %d mappings, want %d", r.Mappings, n)
	}
}

func mustClean(t testing.TB, r *Report) {
	t.Helper()
	if !r.Clean() || r.Warnings > 0 {
		var b bytes.Buffer
		r.WriteText(&b)
		t.Fatalf("the pool is not clean:\n%s", b.Bytes()[:min(b.Len(), 4000)])
	}
}

// TestPoolAgainstModel does random operations on pools and on plain maps, with commits,
// reopening, lost transactions, metadata snapshots and growth of both devices.
func TestPoolAgainstModel(t *testing.T) {
	for seed := int64(1); seed <= 4; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			p := newTestPool(t, seed, 4096, 30000)
			for round := range *modelRounds {
				for range 1 + p.rng.Intn(8) {
					what := p.step()
					if testing.Verbose() {
						t.Log(round, what)
					}
				}
				p.compare()
				switch p.rng.Intn(12) {
				case 0:
					p.reopen()
				case 1:
					p.commit()
					if p.held == nil {
						p.must(p.m.ReserveMetadataSnap())
						p.held = p.now.clone()
					} else {
						p.must(p.m.ReleaseMetadataSnap())
						p.held = nil
					}
				case 2:
					p.now.data += uint64(p.rng.Intn(9000))
					p.must(p.m.GrowData(p.now.data))
				case 3:
					if p.mem.Size() < 60<<20 {
						p.must(p.mem.Resize(p.mem.Size() + int64(p.rng.Intn(9<<20))))
						p.must(p.m.GrowMetadata())
					}
				}
				p.commit()
				p.compare()
				p.check()
				if round%10 == 0 || round == *modelRounds-1 {
					p.thinCheck()
				}
				if p.rng.Intn(5) == 0 {
					p.reopen()
					p.compare()
				}
			}
		})
	}
}
