package power

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"mica/dev"
	"mica/internal/trial"
)

// A liar is a medium that does not do what it says.
type liar struct {
	*dev.Recorder
	flush func(*dev.Recorder) error
	write func(r *dev.Recorder, p []byte, off int64) (int, error)
}

func (l *liar) Flush() error {
	if l.flush != nil {
		return l.flush(l.Recorder)
	}
	return l.Recorder.Flush()
}

func (l *liar) WriteAt(p []byte, off int64) (int, error) {
	if l.write != nil {
		return l.write(l.Recorder, p, off)
	}
	return l.Recorder.WriteAt(p, off)
}

// TestLyingMedia: what TestPool looks at does find media that break their promises, each within a few
// thousand cuts. A test that cannot fail proves nothing.
func TestLyingMedia(t *testing.T) {
	seed := seed(t)
	never := func(*dev.Recorder) error { return nil }
	rarely := func(n *atomic.Int64, every int64, do func() error) error {
		if n.Add(1)%every == 0 {
			return nil
		}
		return do()
	}
	for _, c := range []struct {
		name string
		wrap func(m, d *dev.Recorder) (dev.Device, dev.Device)
		unit func(int64) int64
	}{
		{"data is not synced", func(m, d *dev.Recorder) (dev.Device, dev.Device) { return m, &liar{Recorder: d, flush: never} }, nil},
		{"metadata is not synced", func(m, d *dev.Recorder) (dev.Device, dev.Device) { return &liar{Recorder: m, flush: never}, d }, nil},
		{"every tenth sync of the data is not done", func(m, d *dev.Recorder) (dev.Device, dev.Device) {
			n := new(atomic.Int64)
			return m, &liar{Recorder: d, flush: func(r *dev.Recorder) error { return rarely(n, 10, r.Flush) }}
		}, nil},
		{"every tenth sync of the metadata is not done", func(m, d *dev.Recorder) (dev.Device, dev.Device) {
			n := new(atomic.Int64)
			return &liar{Recorder: m, flush: func(r *dev.Recorder) error { return rarely(n, 10, r.Flush) }}, d
		}, nil},
		{"every 30th write of the data is not done", func(m, d *dev.Recorder) (dev.Device, dev.Device) {
			n := new(atomic.Int64)
			return m, &liar{Recorder: d, write: func(r *dev.Recorder, p []byte, off int64) (int, error) {
				return len(p), rarely(n, 30, func() error { _, err := r.WriteAt(p, off); return err })
			}}
		}, nil},
		{"every 30th write of the data goes to the next block", func(m, d *dev.Recorder) (dev.Device, dev.Device) {
			n := new(atomic.Int64)
			return m, &liar{Recorder: d, write: func(r *dev.Recorder, p []byte, off int64) (int, error) {
				if n.Add(1)%30 == 0 && off+int64(len(p))+65536 <= r.Size() {
					off += 65536
				}
				return r.WriteAt(p, off)
			}}
		}, nil},
		{"the superblock is torn inside its first sector", nil, func(off int64) int64 {
			if off < 4096 {
				return 64
			}
			return 4096
		}},
		{"data sectors are torn", nil, func(int64) int64 { return 128 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			var n counter
			for i := uint64(0); n.cuts.Load() < 20_000; i++ {
				if err := lyingRun(seed+i, c.wrap, c.unit, &n); err != nil {
					t.Logf("found after %d cuts: %.160v", n.cuts.Load(), err)
					return
				}
			}
			t.Errorf("not found by %d cuts", n.cuts.Load())
		})
	}
}

func lyingRun(seed uint64, wrap func(m, d *dev.Recorder) (dev.Device, dev.Device), unit func(int64) int64, n *counter) error {
	rng := rand.New(rand.NewPCG(seed, 4))
	s := setup(rng)
	meta, data, err := trial.Format(s)
	if err != nil {
		return err
	}
	var w func(m, d dev.Device) (dev.Device, dev.Device)
	if wrap != nil {
		w = func(m, d dev.Device) (dev.Device, dev.Device) { return wrap(m.(*dev.Recorder), d.(*dev.Recorder)) }
	}
	l, err := live(s, meta, data, trial.Generate(rng, s, 150), w)
	if err != nil {
		return err
	}
	if unit != nil {
		l.metaUnit, l.dataUnit = unit, unit
	}
	_, _, err = l.cut(rng, 200, n)
	return err
}
