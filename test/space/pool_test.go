package space

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

// cutAll cuts the power of a trial that has ended n times, up to a time.
func cutAll(t *testing.T, tr *trial.Trial, rng *rand.Rand, n, now int) {
	t.Helper()
	c := tr.Log.Cursor()
	for i := range n {
		cut := now * (i + 1) / n
		c.Seek(cut)
		mm, dm := dev.AnyCrashMode(rng), dev.AnyCrashMode(rng)
		if err := tr.CheckImages(c.Image(tr.Meta, mm, dev.UnitMetadata, rng), c.Image(tr.Data, dm, dev.Unit512, rng), cut); err != nil {
			t.Fatalf("cut at %d of %d, unflushed writes: metadata %v, data %v: %v", cut, now, mm, dm, err)
		}
	}
}

// TestMetadataFull fills small metadata devices to the last block, with several writers, snapshots
// that diverge, deletes and discards at the same time. The pool never fails and is never marked:
// what does not fit is refused with a clear error, deletes and discards always work, and nothing
// that was acknowledged is lost, after power cuts either. Growth of the metadata helps at once.
func TestMetadataFull(t *testing.T) {
	seed := seed(t)
	for i := range 12 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			s := trial.Setup{BlockSize: 64 << 10, DataBlocks: 4000, MaxDataBlocks: 4000, MetaBlocks: 46 + rng.Int64N(26), Workers: 3, Private: 4, Shared: 1, Hints: true,
				Sectors: 6 * 128, Options: user.Options{ErrorIfNoSpace: true, CommitInterval: []time.Duration{time.Millisecond, time.Hour}[i%2], Logger: trial.Quiet}}
			s.MaxMetaBlocks = s.MetaBlocks
			meta, data, err := trial.Format(s)
			must(t, err)
			tr, err := trial.Start(s, meta, data, nil)
			if errors.Is(err, thin.ErrNoMetaSpace) {
				t.Skipf("%d metadata blocks do not hold the shared device", s.MetaBlocks)
			}
			must(t, err)
			var refused atomic.Int64
			tr.Judge = func(o trial.Op, err error) error {
				switch {
				case !errors.Is(err, thin.ErrNoMetaSpace):
					return err
				case o.Kind == trial.Delete || o.Kind == trial.Discard:
					return fmt.Errorf("refused for want of metadata: %w", err)
				}
				refused.Add(1)
				return nil
			}
			if err := tr.Run(trial.Generate(rng, s, 500)); err != nil {
				tr.CloseDevices()
				tr.Pool.Close()
				t.Fatalf("%s=%d: %v", envSeed, seed, err)
			}
			st, err := tr.Pool.Status(ctx)
			must(t, err)
			if st.FailReason != "" || st.NeedsCheck {
				t.Errorf("status: %+v", st)
			}
			must(t, tr.CheckLive())
			end := tr.Log.Now()
			if refused.Load() > 0 {
				// With more metadata there is room again.
				must(t, tr.Pool.GrowMetadata(ctx, 4096*(s.MetaBlocks+200)))
				must(t, tr.Pool.CreateThin(ctx, 500))
				must(t, tr.Pool.Delete(ctx, 500))
				if st, err = tr.Pool.Status(ctx); err != nil || st.Mode != "rw" {
					t.Errorf("mode %s after growth: %v", st.Mode, err)
				}
			}
			must(t, tr.CloseDevices())
			must(t, tr.Pool.Close())
			cutAll(t, tr, rng, 150, end)
			t.Logf("%d metadata blocks, %d operations refused", s.MetaBlocks, refused.Load())
		})
	}
}
