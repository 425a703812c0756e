package power

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

// setup picks the shape of a pool.
func setup(rng *rand.Rand) trial.Setup {
	s := trial.Setup{BlockSize: 64 << 10, MetaBlocks: 512, MaxMetaBlocks: 600, Workers: 1 + rng.IntN(4), Private: 3, Shared: rng.IntN(2),
		Options: user.Options{ErrorIfNoSpace: true, CommitInterval: time.Hour, Logger: trial.Quiet}}
	o := &s.Options
	switch rng.IntN(4) {
	case 0:
		o.CommitInterval = time.Millisecond
	case 1:
		o.TableCacheBytes = 1
	case 2:
		o.MaxPending = 1 + rng.IntN(4)
	}
	switch rng.IntN(6) {
	case 0:
		o.NoDiscardPassdown = true
	case 1:
		s.BlockSize = 128 << 10
	case 2:
		s.Origin = true
	case 3: // metadata runs out
		s.Hints = true
		s.MetaBlocks = 60 + rng.Int64N(60)
		s.MaxMetaBlocks = s.MetaBlocks + rng.Int64N(40)
	}
	if rng.IntN(2) == 0 {
		s.Jitter = 1 + rng.Uint64()>>1
	}
	s.Sectors = 4*s.BlockSize/trial.SectorBytes + 8
	if rng.IntN(16) == 0 { // blocks that are prepared in pieces
		s.BlockSize, s.Workers = 2<<20, 1+rng.IntN(2)
		s.Sectors = 3*s.BlockSize/2/trial.SectorBytes + 8
	}
	// From just too little for everything to twice as much: blocks are used again soon.
	need := uint64(s.Workers*s.Private+s.Shared) * 5
	s.DataBlocks = need*3/4 + rng.Uint64N(need)
	s.MaxDataBlocks = s.DataBlocks + rng.Uint64N(20)
	return s
}

// A counter sums up what the runs did.
type counter struct {
	cuts, runs, lives, ops, tools, failed atomic.Int64

	dir string // for files that thin_check is shown; empty: it is not installed
}

// TestPool runs random loads on pools and cuts the power of each at every flush and at many points
// between. After each cut the metadata must be clean, the pool must open, and each sector of each
// device must hold what was durable, or something later. Some pools live on after a cut, and are
// cut again.
func TestPool(t *testing.T) {
	seed, want := seed(t), int64(cuts(t))
	if path := os.Getenv(envOps); path != "" {
		replay(t, path, seed)
		return
	}
	begin := time.Now()
	var c counter
	if _, err := exec.LookPath("thin_check"); err == nil {
		c.dir = shm(t)
	}
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for c.cuts.Load() < want && c.failed.Load() == 0 {
				n := seed + next.Add(1)
				if f := run(n, int(min(400, want/20+1)), &c); f != nil && c.failed.Add(1) == 1 {
					t.Error(f.report(&c))
				}
			}
		}()
	}
	wg.Wait()
	if c.dir == "" {
		t.Log("thin_check is not installed (scripts/setup.sh): only our own check was made")
	} else if n := c.tools.Load(); want >= 10_000 && n < toolCuts && !t.Failed() {
		t.Errorf("thin_check saw %d cuts, want %d", n, toolCuts)
	}
	t.Logf("%d cuts of %d runs in %d lives, %d operations, %d times thin_check, %.1f s", c.cuts.Load(), c.runs.Load(), c.lives.Load(), c.ops.Load(), c.tools.Load(), time.Since(begin).Seconds())
}

// toolCuts is how many cuts Debian's thin_check must see in an ordinary run.
const toolCuts = 100

// thinCheck shows a metadata image to thin_check.
func (c *counter) thinCheck(m *dev.Mem, n int64) error {
	if c.dir == "" {
		return nil
	}
	c.tools.Add(1)
	path := filepath.Join(c.dir, fmt.Sprint(n))
	defer os.Remove(path)
	p := make([]byte, m.Size())
	if _, err := m.ReadAt(p, 0); err != nil {
		return err
	}
	if err := os.WriteFile(path, p, 0o600); err != nil {
		return err
	}
	return command("thin_check", path)
}

// A failure is a run that went wrong.
type failure struct {
	seed uint64
	s    trial.Setup
	ops  trial.Ops // of the life that failed
	life int
	err  error
}

// run is one pool from its making through several lives, each but the first beginning with a cut
// of the one before.
func run(seed uint64, cuts int, c *counter) *failure {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := setup(rng)
	meta, data, err := trial.Format(s)
	if err != nil {
		return &failure{seed, s, nil, 0, err}
	}
	c.runs.Add(1)
	for life := range 1 + rng.IntN(3) {
		n := 40 + rng.IntN(160)
		if rng.IntN(8) == 0 {
			n *= 4
		}
		ops := trial.Generate(rng, s, n)
		c.lives.Add(1)
		c.ops.Add(int64(len(ops)))
		l, err := live(s, meta, data, ops, nil)
		if errors.Is(err, errTooSmall) {
			return nil
		}
		if err == nil {
			meta, data, err = l.cut(rng, cuts, c)
		}
		if err != nil {
			return &failure{seed, s, ops, life, err}
		}
	}
	return nil
}

// A life is a load that ran to its end.
type life struct {
	*trial.Trial
	metaUnit, dataUnit func(off int64) int64 // what the media write as a whole
}

// errTooSmall: the metadata does not hold what all workers share. There is nothing to try.
var errTooSmall = errors.New("metadata too small")

// live runs operations on images and closes the pool.
func live(s trial.Setup, meta, data *dev.Mem, ops trial.Ops, wrap func(m, d dev.Device) (dev.Device, dev.Device)) (*life, error) {
	t, err := trial.Start(s, meta, data, wrap)
	if err != nil {
		if t != nil {
			t.Close()
		}
		if errors.Is(err, thin.ErrNoMetaSpace) {
			return nil, errTooSmall
		}
		return nil, fmt.Errorf("start: %w", err)
	}
	if err := errors.Join(t.Run(ops), t.Close()); err != nil {
		return nil, err
	}
	return &life{t, dev.UnitMetadata, dev.Unit512}, nil
}

// cut cuts the power about n times, and returns the images of one of the cuts.
func (l *life) cut(rng *rand.Rand, n int, c *counter) (meta, data *dev.Mem, err error) {
	points := l.points(rng, n)
	goOn := rng.IntN(len(points))
	cursor := l.Log.Cursor()
	for i, cut := range points {
		cursor.Seek(cut)
		mm, dm := dev.AnyCrashMode(rng), dev.AnyCrashMode(rng)
		m := cursor.Image(l.Meta, mm, l.metaUnit, rng)
		d := cursor.Image(l.Data, dm, l.dataUnit, rng)
		if i == goOn {
			meta, data = m.Clone(), d.Clone()
		}
		if n := c.cuts.Add(1); n%97 == 0 && c.tools.Load() < 2*toolCuts {
			if err := c.thinCheck(m, n); err != nil {
				return nil, nil, fmt.Errorf("cut at %d, unflushed writes of the metadata %v: %w", cut, mm, err)
			}
		}
		if err := l.CheckImages(m, d, cut); err != nil {
			return nil, nil, fmt.Errorf("cut at %d of %d, unflushed writes: metadata %v, data %v: %w", cut, points[len(points)-1], mm, dm, err)
		}
	}
	return meta, data, nil
}

// points are the times just before and after every flush, as far as n go, and others by chance.
func (l *life) points(rng *rand.Rand, n int) []int {
	var p []int
	for _, e := range l.Log.FlushEnds() {
		p = append(p, e-1, e)
	}
	rng.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
	p = p[:min(len(p), n*2/3)]
	now := l.Log.Now()
	for len(p) < n {
		p = append(p, 1+rng.IntN(now))
	}
	slices.Sort(p)
	return p
}

// report makes the list of operations short and says how to repeat it.
func (f *failure) report(c *counter) string {
	head := fmt.Sprintf("%s=%d: run %d, life %d: %v\n%+v\n", envSeed, f.seed-1, f.seed, f.life, f.err, f.s)
	if f.life > 0 || len(f.ops) == 0 {
		return head + f.ops.String() // the images it began with are not kept
	}
	rng := rand.New(rand.NewPCG(f.seed, 2))
	last := f.err
	short := trial.Shrink(f.ops, 150, func(ops trial.Ops) bool {
		err := f.again(ops, rng)
		if err != nil {
			last = err
		}
		return err != nil
	})
	return fmt.Sprintf("%s%d of %d operations do (%s):\n%v\n%s", head, len(short), len(f.ops), envOps, last, short)
}

// again runs a list on a new pool of the same shape, some times.
func (f *failure) again(ops trial.Ops, rng *rand.Rand) error {
	for range 3 {
		meta, data, err := trial.Format(f.s)
		if err != nil {
			return err
		}
		l, err := live(f.s, meta, data, ops, nil)
		if err == nil {
			_, _, err = l.cut(rng, 200, new(counter))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// replay runs the operations of a file in the shape that the seed gives.
func replay(t *testing.T, path string, seed uint64) {
	b, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ops, err := trial.ParseOps(b)
	if err != nil {
		t.Fatal(err)
	}
	f := &failure{s: setup(rand.New(rand.NewPCG(seed+1, 1)))}
	rng := rand.New(rand.NewPCG(seed, 2))
	for i := range 50 {
		if err := f.again(ops, rng); err != nil {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
}
