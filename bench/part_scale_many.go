package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/bench/store"
	"mica/engine"
	"mica/thin"
)

// scaleGenerations reads through chains of snapshots, each with a block of its own that was
// written in it; for qcow2 the images between are empty.
func scaleGenerations(ctx context.Context, r *runner) error {
	const size = 64 << 20
	t := r.table("scale-generations", "4 KiB random read, depth 16, against generations of snapshots (NBD)", colQemuQcow2, colThin)
	t.XLabel = "generations"
	base := r.path("gen.qcow2")
	old := r.Size
	r.Size = size
	err := r.qcow2(ctx, base, true)
	r.Size = old
	if err != nil {
		return err
	}
	pool := r.path("gens")
	if err := peer.MakePool(ctx, pool, 64<<30); err != nil {
		return err
	}
	if err := peer.Fill(ctx, pool, thinID, size); err != nil {
		return err
	}
	tip, images := thinID, 0
	var top = base
	j := fio.Job{RW: "randread", Block: 4096, Depth: 16, Size: size, Runtime: r.Runtime}
	for _, g := range r.upTo(1000) {
		err := peer.OnPool(ctx, pool, func(p engine.Pool) error {
			for ; int(tip) < g; tip++ {
				if err := nextGeneration(ctx, p, tip, size); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for ; images < g-1; images++ {
			next := r.path("gen" + strconv.Itoa(images) + ".qcow2")
			if err := peer.Qcow2Over(ctx, next, top, size); err != nil {
				return err
			}
			top = next
		}
		qcow2 := func(ctx context.Context) (figure, error) {
			s, err := peer.QemuNBD(ctx, top, "qcow2", r.fresh("s"))
			if err != nil {
				return figure{}, unavailable("does not open")
			}
			f, err := load(&client{s: s}, j, iops)(ctx)
			s.Stop()
			if err != nil && g > 100 { // qemu 10 does not survive a read through a thousand images
				return figure{}, unavailable("the server ends at the first reads")
			}
			return f, err
		}
		own := func(ctx context.Context) (figure, error) {
			s, err := r.own("generations", peer.Own{Pool: pool, ID: tip, Size: size}).NBD(ctx, r.fresh("s"))
			if err != nil {
				return figure{}, err
			}
			f, err := load(&client{s: s}, j, iops)(ctx)
			return f, errors.Join(err, s.Stop())
		}
		if err := r.measure(ctx, t, Row{Name: thousands(int64(g)), Unit: "IOPS", Better: "higher", X: float64(g)}, qcow2, own); err != nil {
			return err
		}
	}
	first, last := t.Rows[0].Cells[1], t.Rows[len(t.Rows)-1].Cells[1]
	r.note("mica at the last generation reads at %s of the first", times(last.Median()/first.Median()))
	return os.RemoveAll(pool)
}

// nextGeneration makes a snapshot of a device and writes a block in it.
func nextGeneration(ctx context.Context, p engine.Pool, tip thin.DevID, size int64) error {
	if err := p.CreateSnap(ctx, tip+1, tip); err != nil {
		return err
	}
	h, err := p.Open(ctx, tip+1, engine.OpenOptions{SizeBytes: size})
	if err != nil {
		return err
	}
	_, err = h.WriteAt(make([]byte, 4096), int64(tip)*blockBytes%size)
	return errors.Join(err, h.Close())
}

// scaleAttached attaches many devices to one daemon.
func scaleAttached(ctx context.Context, r *runner) error {
	ctx = inNamespace(ctx)
	n := 1000
	if r.Quick {
		n = 8
	}
	t := r.table("scale-attached", fmt.Sprintf("The daemon with %d attached devices", n), "mica")
	list, _, err := r.stores(ctx, 4<<30, []store.Maker{store.Mica(r.Exe)})
	if err != nil {
		return err
	}
	s := list[0]
	if err := r.commit(ctx, s, "image", "", func(dir string) error { return smallTree(dir, 20) }); err != nil {
		return err
	}
	return r.rounds(1, func() error {
		return r.sweep(ctx, t, []Row{
			{Name: "attach all, 16 at a time", Unit: "ms", Better: "lower"},
			{Name: "threads of the daemon, before", Better: "lower"},
			{Name: "threads of the daemon, just attached", Better: "lower"},
			{Name: "threads of the daemon, idle", Better: "lower"},
			{Name: "anonymous memory of the daemon, before", Unit: "MiB", Better: "lower"},
			{Name: "anonymous memory for each device, just attached", Unit: "KiB", Better: "lower"},
			{Name: "anonymous memory for each device, idle", Unit: "KiB", Better: "lower"},
			{Name: "take all away, 16 at a time", Unit: "ms", Better: "lower"},
		}, func(ctx context.Context) ([]figure, error) {
			before, err := peer.CostOf(s.Daemon().Pid())
			if err != nil {
				return nil, err
			}
			keys := make([]string, n)
			for i := range keys {
				keys[i] = r.key()
			}
			up, err := parallel(keys, func(key string) error {
				_, err := s.Prepare(ctx, key, "image")
				return err
			})
			if err != nil {
				return nil, err
			}
			after, err := peer.CostOf(s.Daemon().Pid())
			if err != nil {
				return nil, err
			}
			idle, err := settle(ctx, s.Daemon().Pid())
			if err != nil {
				return nil, err
			}
			each := func(c peer.Cost) figure { return figure{value: float64(c.Anon-before.Anon) / 1024 / float64(n)} }
			down, err := parallel(keys, func(key string) error { return s.Remove(ctx, key) })
			return []figure{{value: up}, {value: float64(before.Threads)}, {value: float64(after.Threads)}, {value: float64(idle.Threads)},
				{value: float64(before.Anon) / (1 << 20)}, each(after), each(idle), {value: down}}, err
		})
	})
}

// settle waits until a process has the same number of threads for a second, at most 20 s.
func settle(ctx context.Context, pid int) (peer.Cost, error) {
	last, since := -1, time.Now()
	for begin := time.Now(); ; {
		c, err := peer.CostOf(pid)
		if err != nil {
			return c, err
		}
		if c.Threads != last {
			last, since = c.Threads, time.Now()
		}
		if time.Since(since) > idleFor || time.Since(begin) > 20*time.Second {
			return c, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return c, ctx.Err()
		}
	}
}

// idleFor is longer than a device without requests keeps its threads.
const idleFor = 7 * time.Second

// parallel does fn for all keys, 16 at a time, and returns how long that took in milliseconds.
func parallel(keys []string, fn func(string) error) (float64, error) {
	begin := time.Now()
	work := make(chan string)
	var mu sync.Mutex
	var first error
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for k := range work {
				if err := fn(k); err != nil {
					mu.Lock()
					first = errors.Join(first, err)
					mu.Unlock()
				}
			}
		})
	}
	for _, k := range keys {
		work <- k
	}
	close(work)
	wg.Wait()
	return ms(time.Now().Sub(begin)), first
}
