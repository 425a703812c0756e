package bench

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"

	"mica/bench/peer"
	"mica/dev"
	"mica/engine/user"
	"mica/thin"
)

// provisionStep is how many mappings are inserted between two commits.
const provisionStep = 1 << 17

// provision gives a thin device of a closed pool n mappings from block 0 on, in its metadata only:
// the data file stays a hole, which is what those blocks would read as. That is how pools of many
// terabytes come about in seconds. The mappings lie in runs of run data blocks, in random order.
func provision(ctx context.Context, pool string, id thin.DevID, n uint64, run uint64) (err error) {
	d, err := dev.Open(user.Location{Dir: pool}.MetadataPath(), dev.OpenOptions{Lock: true})
	if err != nil {
		return err
	}
	m, err := thin.Open(d, thin.OpenOptions{})
	if err != nil {
		return errors.Join(err, d.Close())
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := m.CreateThin(id); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(uint64(id), n))
	entries := make([]thin.Entry, 0, provisionStep)
	var at uint64
	var hint thin.DataBlock
	for at < n {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries = entries[:0]
		want := min(provisionStep, n-at)
		var runs []thin.DataRun
		for got := uint64(0); got < want; {
			r, ok := m.AllocData(hint, min(run, want-got))
			if !ok {
				return errors.New("the pool is too small for its mappings")
			}
			runs = append(runs, r)
			hint = r.Begin + thin.DataBlock(r.Len)
			got += r.Len
		}
		rnd.Shuffle(len(runs), func(i, k int) { runs[i], runs[k] = runs[k], runs[i] })
		for _, r := range runs {
			for i := range r.Len {
				entries = append(entries, thin.Entry{VBlock: thin.VBlock(at), Mapping: thin.Mapping{Block: r.Begin + thin.DataBlock(i), Time: m.Time()}})
				at++
			}
		}
		if err := m.Insert(id, entries); err != nil {
			return err
		}
		if _, err := m.Commit(nil); err != nil {
			return err
		}
	}
	return nil
}

// sparsePool makes a pool for blocks data blocks of 64 KiB of which nothing occupies space but the
// metadata.
func sparsePool(ctx context.Context, dir string, blocks uint64) error {
	if err := peer.MakePool(ctx, dir, int64(blocks)*blockBytes); err != nil {
		return err
	}
	return os.Chmod(dir, 0o700)
}

// blockBytes is the block of all pools here.
const blockBytes = 64 << 10
