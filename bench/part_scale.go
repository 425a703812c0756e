package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/engine"
	"mica/engine/user"
	"mica/thin"
)

var scalePart = part{
	id: "scale", title: "Scale",
	about: "What should be flat, and what grows. The large pool has a device of 1 TiB, one of 64 GiB, one of 1 GiB and one of 1 MiB, all " +
		"mapped, in blocks of 64 KiB; its data file is a hole, only the metadata is real. Snapshots are taken in the process that " +
		"measures; each is committed when the call returns.",
	run: func(ctx context.Context, r *runner) error {
		for _, step := range []func(context.Context, *runner) error{scaleMany, scaleLarge, scaleGenerations, scaleAttached} {
			if err := step(ctx, r); err != nil {
				return err
			}
		}
		return nil
	},
}

// scaleSizes are the devices of the large pool, by id from 1 on, in blocks of 64 KiB.
func (r *runner) scaleSizes() []uint64 {
	if r.Quick {
		return []uint64{1 << 14, 1 << 12, 1 << 10, 16}
	}
	return []uint64{1 << 24, 1 << 20, 1 << 14, 16}
}

// rounds does something with another number of rounds.
func (r *runner) rounds(n int, fn func() error) error {
	old := r.Rounds
	r.Rounds = min(n, old)
	defer func() { r.Rounds = old }()
	return fn()
}

// open opens a pool in this process for fn.
func (r *runner) open(ctx context.Context, pool string, fn func(*user.Pool) error) error {
	p, err := user.Open(ctx, user.Location{Dir: pool}, user.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return errors.Join(fn(p), p.Close())
}

// scaleLarge is about the large pool.
func scaleLarge(ctx context.Context, r *runner) error {
	pool := r.path("large")
	var total uint64
	for _, n := range r.scaleSizes() {
		total += n
	}
	r.Log("   making a pool of %s mappings", thousands(int64(total)))
	if err := sparsePool(ctx, pool, total+total/8); err != nil {
		return err
	}
	for i, n := range r.scaleSizes() {
		if err := provision(ctx, pool, thin.DevID(i+1), n, 64); err != nil {
			return err
		}
	}
	if err := r.scaleSnapshotSize(ctx, pool); err != nil {
		return err
	}
	if err := r.scaleOpen(ctx, pool, total); err != nil {
		return err
	}
	if err := r.rounds(3, func() error { return r.scaleTools(ctx, pool, total) }); err != nil {
		return err
	}
	return r.rounds(1, func() error { return r.scaleDelete(ctx, pool) })
}

// scaleSnapshotSize takes snapshots of devices of different sizes.
func (r *runner) scaleSnapshotSize(ctx context.Context, pool string) error {
	t := r.table("scale-size", "Snapshot, committed, against what the origin maps", "mica")
	t.XLabel = "mapped, MiB"
	return r.open(ctx, pool, func(p *user.Pool) error {
		sizes := r.scaleSizes()
		for i := len(sizes) - 1; i >= 0; i-- {
			row := Row{Name: bytesName(int64(sizes[i]) * blockBytes), Unit: "ms", Better: "lower", X: float64(sizes[i]) / 16}
			if err := r.measure(ctx, t, row, r.snapshots(p, thin.DevID(i+1), 20)); err != nil {
				return err
			}
		}
		return nil
	})
}

// snapshots is the median time of some snapshots of a device, one after the other; they are deleted.
func (r *runner) snapshots(p *user.Pool, origin thin.DevID, n int) meter {
	return func(ctx context.Context) (figure, error) {
		before, err := p.Status(ctx)
		if err != nil {
			return figure{}, err
		}
		var times []float64
		var ids []thin.DevID
		for range n {
			r.seq++
			id := thin.DevID(100_000 + r.seq)
			begin := time.Now()
			if err := p.CreateSnap(ctx, id, origin); err != nil {
				return figure{}, err
			}
			times = append(times, ms(time.Since(begin)))
			ids = append(ids, id)
		}
		after, err := p.Status(ctx)
		if err != nil {
			return figure{}, err
		}
		for _, id := range ids {
			if err := p.Delete(ctx, id); err != nil {
				return figure{}, err
			}
		}
		return figure{median(times), map[string]float64{
			"data syncs":       float64(after.DataFlushes-before.DataFlushes) / float64(n),
			"metadata flushes": float64(after.MetaFlushes-before.MetaFlushes) / float64(n),
		}}, p.Commit(ctx)
	}
}

// scaleMany takes snapshots of a device that has many already.
func scaleMany(ctx context.Context, r *runner) error {
	pool := r.path("many")
	if err := sparsePool(ctx, pool, 1<<21); err != nil {
		return err
	}
	if err := provision(ctx, pool, thinID, 1<<14, 64); err != nil {
		return err
	}
	t := r.table("scale-count", "Snapshot of 1 GiB, committed, against the number of snapshots", "mica")
	t.XLabel = "snapshots that are there"
	have := 0
	return r.open(ctx, pool, func(p *user.Pool) error {
		for _, n := range r.upTo(10_000) {
			for have < n {
				var pairs []engine.SnapPair
				for ; have < n && len(pairs) < 200; have++ {
					pairs = append(pairs, engine.SnapPair{ID: thin.DevID(1000 + have), Origin: thinID})
				}
				if err := p.CreateSnaps(ctx, pairs); err != nil {
					return err
				}
			}
			row := Row{Name: thousands(int64(n)), Unit: "ms", Better: "lower", X: float64(n)}
			if err := r.measure(ctx, t, row, r.snapshots(p, thinID, 20)); err != nil {
				return err
			}
		}
		return nil
	})
}

// upTo is 1, 10, 100 and so on; a quick run stops early.
func (r *runner) upTo(most int) (list []int) {
	for n := 1; n <= most && !(r.Quick && n > 10); n *= 10 {
		list = append(list, n)
	}
	return list
}

// scaleOpen opens the large pool in a process of its own.
func (r *runner) scaleOpen(ctx context.Context, pool string, mappings uint64) error {
	t := r.table("scale-open", "Open the large pool: "+thousands(int64(mappings))+" mappings", "mica")
	return r.sweep(ctx, t, []Row{{Name: "until it serves", Unit: "ms", Better: "lower"}, {Name: "anonymous memory", Unit: "MiB", Better: "lower"}},
		func(ctx context.Context) ([]figure, error) {
			begin := time.Now()
			s, err := r.own("open", peer.Own{Pool: pool, ID: 1, Size: int64(r.scaleSizes()[0]) * blockBytes}).NBD(ctx, r.fresh("s"))
			if err != nil {
				return nil, err
			}
			took := time.Since(begin)
			_, err = fio.Run(ctx, fio.Job{Engine: "nbd", Target: s.URI, RW: "randread", Block: 4096, Depth: 16, Size: int64(r.scaleSizes()[0]) * blockBytes,
				Runtime: r.Runtime})
			c, cerr := peer.CostOf(s.Pid())
			return []figure{{value: ms(took)}, {value: float64(c.Anon) / (1 << 20)}}, errors.Join(err, cerr, s.Stop())
		})
}

// scaleTools compares the offline commands with thin-provisioning-tools.
func (r *runner) scaleTools(ctx context.Context, pool string, mappings uint64) error {
	const changed, origin thin.DevID = 9, 1
	err := r.open(ctx, pool, func(p *user.Pool) error {
		if err := p.CreateSnap(ctx, changed, origin); err != nil {
			return err
		}
		h, err := p.Open(ctx, changed, engine.OpenOptions{SizeBytes: int64(r.scaleSizes()[0]) * blockBytes})
		if err != nil {
			return err
		}
		defer h.Close()
		for i := int64(0); i < 1000; i++ {
			if err := h.Discard(i*int64(r.scaleSizes()[0])/1000*blockBytes, blockBytes); err != nil {
				return err
			}
		}
		return h.Flush()
	})
	if err != nil {
		return err
	}
	t := r.table("scale-tools", "Offline, "+thousands(int64(mappings))+" mappings and a snapshot of the largest device", "thin-provisioning-tools", "mica")
	meta := filepath.Join(pool, "metadata")
	var rows []string
	for _, c := range []struct {
		name   string
		theirs []string
		ours   []string
	}{
		{"check", []string{"thin_check", "-q", meta}, []string{"thin", "check", pool}},
		{"dump", []string{"thin_dump", meta}, []string{"thin", "dump", pool}},
		{"delta of a snapshot", []string{"thin_delta", "--snap1", itoa(origin), "--snap2", itoa(changed), meta},
			[]string{"thin", "delta", pool, itoa(origin), itoa(changed)}},
	} {
		row := Row{Name: c.name, Unit: "ms", Better: "lower"}
		if err := r.measure(ctx, t, row, timeOf(c.theirs...), timeOf(append([]string{r.Exe}, c.ours...)...)); err != nil {
			return err
		}
		rows = append(rows, c.name)
	}
	for _, row := range rows {
		t.Targets = append(t.Targets, Target{Row: row, Own: "mica", Peer: "thin-provisioning-tools", Want: 1, AtMost: true})
	}
	return nil
}

func itoa(id thin.DevID) string { return strconv.Itoa(int(id)) }

// timeOf measures a command whose output nobody reads.
func timeOf(argv ...string) meter {
	return func(ctx context.Context) (figure, error) {
		if _, err := exec.LookPath(argv[0]); err != nil {
			return figure{}, unavailable("not installed")
		}
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		begin := time.Now()
		err := c.Run()
		took := time.Since(begin)
		if err != nil {
			return figure{}, fmt.Errorf("%s: %w", filepath.Base(argv[0]), err)
		}
		return figure{ms(took), map[string]float64{
			"cpu ms": ms(c.ProcessState.UserTime() + c.ProcessState.SystemTime()),
		}}, nil
	}
}

// scaleDelete syncs one device while the largest is deleted.
func (r *runner) scaleDelete(ctx context.Context, pool string) error {
	t := r.table("scale-delete", "Write of 4 KiB into a new block and fsync, while "+bytesName(int64(r.scaleSizes()[0])*blockBytes)+" of another device are deleted", "mica")
	const busy thin.DevID = 50
	err := r.open(ctx, pool, func(p *user.Pool) error {
		if err := p.CreateThin(ctx, busy); err != nil {
			return err
		}
		h, err := p.Open(ctx, busy, engine.OpenOptions{SizeBytes: 1 << 40})
		if err != nil {
			return err
		}
		defer h.Close()
		next := int64(0)
		p99 := func(until func(n int) bool) (float64, error) {
			var took []float64
			for !until(len(took)) || len(took) == 0 {
				begin := time.Now()
				if _, err := h.WriteAt(make([]byte, 4096), next*blockBytes); err != nil {
					return 0, err
				}
				next++
				if err := h.Flush(); err != nil {
					return 0, err
				}
				took = append(took, ms(time.Since(begin)))
			}
			slices.Sort(took)
			return took[len(took)*99/100], nil
		}
		samples := 2000
		if r.Quick {
			samples = 20
		}
		return r.sweep(ctx, t, []Row{
			{Name: "p99 of write and fsync, alone", Unit: "ms", Better: "lower"},
			{Name: "p99 while a snapshot of it is deleted", Unit: "ms", Better: "lower"},
			{Name: "p99 while it is deleted", Unit: "ms", Better: "lower"},
			{Name: "delete of the snapshot", Unit: "ms", Better: "lower"},
			{Name: "delete of the device", Unit: "ms", Better: "lower"},
		}, func(ctx context.Context) ([]figure, error) {
			alone, err := p99(func(n int) bool { return n >= samples })
			if err != nil {
				return nil, err
			}
			var during, took [2]float64
			for i, id := range []thin.DevID{9, 1} {
				done := make(chan error, 1)
				begin := time.Now()
				go func() {
					err := p.Delete(ctx, id)
					took[i] = ms(time.Since(begin))
					done <- err
				}()
				during[i], err = p99(func(int) bool { return len(done) > 0 })
				if err := errors.Join(err, <-done); err != nil {
					return nil, err
				}
			}
			return []figure{{value: alone}, {value: during[0]}, {value: during[1]}, {value: took[0]}, {value: took[1]}}, nil
		})
	})
	if err != nil {
		return err
	}
	alone, while := t.Rows[0].Cells[0].Median(), t.Rows[2].Cells[0].Median()
	t.Rows = append(t.Rows, Row{Name: "p99 while it is deleted / alone", Unit: "times", Better: "lower", Cells: []Cell{{Samples: []float64{while / alone}}}})
	t.Targets = append(t.Targets, Target{Row: "p99 while it is deleted / alone", Own: "mica", Want: 2, AtMost: true})
	return os.RemoveAll(pool)
}
