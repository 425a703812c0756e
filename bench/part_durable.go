package bench

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/engine"
	"mica/thin"
)

var durablePart = part{
	id: "durable", title: "What durability costs", disk: true,
	about: "On a real disk: writes of 8 KiB at random places of an empty device, fsync after each, so that most go to a new block; alone, " +
		"and beside another device of the same kind (for mica: of the same pool) that is written in sequence as fast as it takes it. " +
		"Flushes and bytes are those of the whole disk while the job ran, whoever caused them.",
	run: runDurable,
}

const colQcow2Block = "qemu-storage-daemon qcow2"

// A durable is a kind of empty device with a second one beside it.
type durable struct {
	name  string
	serve func(ctx context.Context, dir string) (nodes [2]string, stop func() error, err error)
}

func (r *runner) durables() []durable {
	pair := func(name string, one func(ctx context.Context, dir, name string) (*peer.Server, error)) durable {
		return durable{name, func(ctx context.Context, dir string) (nodes [2]string, stop func() error, err error) {
			a, err := one(ctx, dir, "a")
			if err != nil {
				return nodes, nil, err
			}
			b, err := one(ctx, dir, "b")
			if err != nil {
				a.Stop()
				return nodes, nil, err
			}
			return [2]string{a.Node, b.Node}, func() error {
				a.Stop()
				return b.Stop()
			}, nil
		}}
	}
	return []durable{
		pair(colLoop, func(ctx context.Context, dir, name string) (*peer.Server, error) {
			file := filepath.Join(dir, name)
			if err := r.plainFile(ctx, file, false); err != nil {
				return nil, err
			}
			return peer.PlainLoop(ctx, file)
		}),
		pair(colQcow2Block, func(ctx context.Context, dir, name string) (*peer.Server, error) {
			file := filepath.Join(dir, name)
			if err := peer.Qcow2(ctx, file, r.Size); err != nil {
				return nil, err
			}
			return peer.StorageDaemon(ctx, file, "qcow2", filepath.Join(dir, name+".m"))
		}),
		{colThin, func(ctx context.Context, dir string) (nodes [2]string, stop func() error, err error) {
			pool := filepath.Join(dir, "pool")
			if err := peer.MakePool(ctx, pool, 3*r.Size+1<<30); err != nil {
				return nodes, nil, err
			}
			err = peer.OnPool(ctx, pool, func(p engine.Pool) error {
				if err := p.CreateThin(ctx, thinID); err != nil {
					return err
				}
				return p.CreateThin(ctx, thinID+1)
			})
			if err != nil {
				return nodes, nil, err
			}
			s, err := r.own("thin", peer.Own{Pool: pool, ID: thinID, More: []thin.DevID{thinID + 1}, Size: r.Size}).Block(ctx, filepath.Join(dir, "run"))
			if err != nil {
				return nodes, nil, err
			}
			return [2]string{s.Node, s.More[0]}, s.Stop, nil
		}},
	}
}

func runDurable(ctx context.Context, r *runner) error {
	kinds := r.durables()
	var columns []string
	var sweeps []sweep
	for _, k := range kinds {
		columns = append(columns, k.name)
		sweeps = append(sweeps, func(ctx context.Context) ([]figure, error) { return r.durableOnce(ctx, k) })
	}
	t := r.table("durable", "8 KiB write and fsync, new blocks", columns...)
	low := func(name, unit string) Row { return Row{Name: name, Unit: unit, Better: "lower"} }
	err := r.sweep(ctx, t, []Row{
		low("write and fsync alone, p50", "us"),
		low("write and fsync alone, p99", "us"),
		low("flushes of the disk for each fsync", ""),
		low("bytes to the disk for each byte written", ""),
		low("write and fsync beside a sequential writer, p50", "us"),
		low("write and fsync beside a sequential writer, p99", "us"),
		low("p99 beside / alone", "times"),
		{Name: "the sequential writer", Unit: "MB/s", Better: "higher"},
		low("its bytes to the disk for each byte written", ""),
	}, sweeps...)
	t.Targets = append(t.Targets, Target{Row: "p99 beside / alone", Own: colThin, Want: 3, AtMost: true})
	return err
}

// durableOnce measures one kind on new devices.
func (r *runner) durableOnce(ctx context.Context, k durable) ([]figure, error) {
	dir := r.fresh("durable")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	nodes, stop, err := k.serve(ctx, dir)
	if err != nil {
		return nil, err
	}
	figures, err := r.durableJobs(ctx, nodes)
	if e := stop(); err == nil {
		err = e
	}
	return figures, err
}

func (r *runner) durableJobs(ctx context.Context, nodes [2]string) ([]figure, error) {
	half := r.Size / 2
	syncer := fio.Job{Engine: "psync", Target: nodes[0], RW: "randwrite", Block: 8 << 10, Size: half, Runtime: 3 * r.Runtime, Direct: true, Fsync: 1}
	writer := fio.Job{Engine: "libaio", Target: nodes[1], RW: "write", Block: 1 << 20, Depth: 4, Size: r.Size, Runtime: 3 * r.Runtime, Direct: true}

	unix.Sync()
	before, err := peer.CountDisk(r.dir)
	if err != nil {
		return nil, err
	}
	alone, err := fio.Run(ctx, syncer)
	if err != nil {
		return nil, err
	}
	after, err := peer.CountDisk(r.dir)
	if err != nil {
		return nil, err
	}
	c, n := after.Sub(before), float64(alone[0].Requests)

	syncer.Offset = half
	both, err := fio.Run(ctx, syncer, writer)
	if err != nil {
		return nil, err
	}
	unix.Sync()
	before, err = peer.CountDisk(r.dir)
	if err != nil {
		return nil, err
	}
	writer.Runtime, writer.Count = 0, int(half>>20)
	seq, err := fio.Run(ctx, writer)
	if err != nil {
		return nil, err
	}
	unix.Sync()
	after, err = peer.CountDisk(r.dir)
	if err != nil {
		return nil, err
	}
	total := func(f fio.Figures) (p50, p99 float64) { return us(f.P50 + f.SyncP50), us(f.P99 + f.SyncP99) }
	a50, a99 := total(alone[0])
	b50, b99 := total(both[0])
	return []figure{
		{value: a50}, {a99, map[string]float64{"fsyncs": n}}, {value: float64(c.Flushes) / n}, {value: float64(c.Bytes) / (n * 8192)},
		{value: b50}, {value: b99}, {value: b99 / a99}, {value: mbps(both[1])},
		{value: float64(after.Sub(before).Bytes) / float64(seq[0].Requests<<20)},
	}, nil
}
