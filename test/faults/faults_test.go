package faults

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

// A scenario is how the n-th request fails, and what follows.
type scenario struct {
	err  error
	then trial.Then
	torn bool
}

func (s scenario) String() string {
	torn := ""
	if s.torn {
		torn = ", writes half done"
	}
	return fmt.Sprintf("%v, %v%s", s.err, s.then, torn)
}

func scenarios() (all []scenario) {
	for _, e := range []error{unix.EIO, unix.ENOSPC} {
		for _, then := range []trial.Then{trial.Once, trial.SameKind, trial.Dead} {
			for _, torn := range []bool{false, true} {
				all = append(all, scenario{e, then, torn})
			}
		}
	}
	return all
}

// setup is the shape of the pool: caches are so small that metadata is read again and again.
func setup(rng *rand.Rand, workers int) trial.Setup {
	s := trial.Setup{BlockSize: 64 << 10, MetaBlocks: 512, MaxMetaBlocks: 560, Workers: workers, Private: 3, Shared: min(1, workers-1),
		DataBlocks: uint64(30 * workers), MaxDataBlocks: uint64(30*workers) + 12, Sectors: 4*128 + 8,
		Options: user.Options{CommitInterval: time.Hour, NoSpaceTimeout: 20 * time.Millisecond, TableCacheBytes: 1, MetaCacheBytes: 1, Logger: trial.Quiet}}
	switch rng.IntN(4) {
	case 0:
		s.Options.NoDiscardPassdown = true
	case 1:
		s.Options.MaxPending = 3
	}
	return s
}

// TestEveryRequestFails runs one load again and again, and each time another request fails: the
// first, the second, ... of all reads, writes, flushes and discards of data and metadata.
func TestEveryRequestFails(t *testing.T) {
	seed := seed(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	s := setup(rng, 1)
	everyRequest(t, seed, s, trial.Generate(rng, s, 500), 1)
}

// TestRequestsFailUnderLoad does so with several workers, of whose requests some are chosen.
func TestRequestsFailUnderLoad(t *testing.T) {
	seed := seed(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	s := setup(rng, 3)
	s.Jitter = 1 + seed>>1
	everyRequest(t, seed, s, trial.Generate(rng, s, 400), 5)
}

// everyRequest fails every step-th request.
func everyRequest(t *testing.T, seed uint64, s trial.Setup, ops trial.Ops, step int64) {
	all := scenarios()
	each := 1 // scenarios of one request
	if raceEnabled {
		each, step = 1, step*20
	}
	if os.Getenv(envAll) == "all" {
		each = len(all)
	}
	var next, runs, failures, modes atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for !t.Failed() {
				n := next.Add(step) - step
				for k := range each {
					sc := all[(int(n/step)*each+k+int(seed%12))%len(all)]
					p := &trial.Plan{At: n, Err: sc.err, Then: sc.then, Torn: sc.torn}
					var r result
					err := bounded(fmt.Sprintf("request %d, %v", n, sc), func() (err error) {
						r, err = run(s, ops, p)
						return err
					})
					hit, ok := p.First()
					if err != nil {
						t.Errorf("%s=%d: request %d of %d (%v; %v): %v\n%+v\n%s", envSeed, seed, n, p.Count(), hit, sc, err, s, ops)
						return
					}
					if !ok {
						return // the load has fewer requests
					}
					runs.Add(1)
					if r.failed {
						failures.Add(1)
					}
					if r.mode != "rw" {
						modes.Add(1)
					}
				}
			}
		}()
	}
	wg.Wait()
	t.Logf("%d runs; the pool failed in %d, left mode rw in %d; %.1f s", runs.Load(), failures.Load(), modes.Load(), time.Since(begin).Seconds())
	if !t.Failed() && !raceEnabled && (runs.Load() < 50 || failures.Load() < 5) {
		t.Error("too little happened")
	}
}

type result struct {
	mode   string // after the load, before repair
	failed bool
}

// run is one load with one plan, and all that must hold afterwards.
func run(s trial.Setup, ops trial.Ops, p *trial.Plan) (r result, err error) {
	if errors.Is(p.Err, unix.ENOSPC) {
		s.Options.CommitInterval = 2 * time.Millisecond // and so often a write asks the host again
	}
	meta, data, err := trial.Format(s)
	if err != nil {
		return r, err
	}
	t, err := trial.Start(s, meta, data, p.Wrap)
	if err != nil {
		if _, hit := p.First(); !hit || errors.Is(err, thin.ErrCorrupt) {
			return r, fmt.Errorf("start: %w", err)
		}
		if t == nil {
			return r, afterwards(s, nil, meta, data, p, r)
		}
	} else {
		t.Judge = func(o trial.Op, err error) error { return judge(p, err) }
		err = t.Run(ops)
	}
	if _, hit := p.First(); err == nil || hit && t.Judge == nil { // or Start was hit half-way
		r, err = stillOpen(t, p)
	}
	if err != nil {
		t.CloseDevices()
		t.Pool.Close()
		return r, err
	}
	if err := closed(t, p, r); err != nil {
		return r, err
	}
	return r, afterwards(s, t, meta, data, p, r)
}

// judge says whether an operation may end like this.
func judge(p *trial.Plan, err error) error {
	if _, hit := p.First(); !hit && !errors.Is(err, dev.ErrNoSpace) && !errors.Is(err, thin.ErrNoMetaSpace) {
		return fmt.Errorf("before any request failed: %w", err)
	}
	switch {
	case errors.Is(err, thin.ErrCorrupt):
		return fmt.Errorf("a failed request is taken for corruption: %w", err)
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENOSPC), errors.Is(err, dev.ErrNoSpace), errors.Is(err, thin.ErrNoMetaSpace):
	case errors.Is(err, engine.ErrFailed) && errors.Is(err, dev.ErrReadOnly), errors.Is(err, engine.ErrFailed):
	case errors.Is(err, thin.ErrExists): // what a failed operation was to delete is still there
	default:
		return fmt.Errorf("not a clean error: %w", err)
	}
	return nil
}
