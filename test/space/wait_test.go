package space

import (
	"math/rand/v2"
	"testing"
	"time"

	"mica/engine/user"
	"mica/internal/trial"
)

// TestWaitersAreServed runs loads that need far more data blocks than there are. Writes wait, and no
// operation fails: whenever somebody waits the pool grows by a block or two. Nothing is lost, after
// power cuts either.
func TestWaitersAreServed(t *testing.T) {
	seed := seed(t)
	for i := range 6 {
		rng := rand.New(rand.NewPCG(seed, uint64(100+i)))
		s := trial.Setup{BlockSize: 64 << 10, DataBlocks: 12, MaxDataBlocks: 12, MetaBlocks: 512, MaxMetaBlocks: 512, Workers: 4, Private: 3, Shared: 1,
			Sectors: 4*128 + 8, Jitter: 1 + rng.Uint64()>>1,
			Options: user.Options{CommitInterval: []time.Duration{time.Millisecond, time.Hour}[i%2], NoSpaceTimeout: time.Hour, Logger: trial.Quiet}}
		meta, data, err := trial.Format(s)
		must(t, err)
		tr, err := trial.Start(s, meta, data, nil)
		must(t, err)
		tr.Judge = func(o trial.Op, err error) error { return err }
		done := make(chan error, 1)
		go func() { done <- tr.Run(trial.Generate(rng, s, 250)) }()
		waited, blocks := 0, s.DataBlocks
		for running := true; running; {
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("%s=%d, %d: %v", envSeed, seed, i, err)
				}
				running = false
			case <-time.After(time.Millisecond):
				if st, err := tr.Pool.Status(ctx); err == nil && st.WaitingForSpace > 0 {
					if st.Mode != "out_of_data_space" {
						continue // it has just been served
					}
					waited++
					blocks += 1 + rng.Uint64N(2)
					must(t, tr.Grow(blocks))
				}
			}
		}
		must(t, tr.CheckLive())
		must(t, tr.Close())
		t.Logf("%d: %d times somebody waited, %d blocks at the end", i, waited, blocks)
		if waited == 0 {
			t.Errorf("%s=%d, %d: nobody had to wait", envSeed, seed, i)
		}
		cutAll(t, tr, rng, 100, tr.Log.Now())
	}
}
