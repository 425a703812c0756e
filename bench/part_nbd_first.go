package bench

import (
	"context"
	"os"

	"mica/bench/fio"
	"mica/bench/peer"
	"mica/engine"
	"mica/thin"
)

// nbdFirstWrites measures what a write costs that nobody has prepared: in an empty device, and
// in a fresh snapshot of one that is full. Each measurement has media or a snapshot of its own.
func (r *runner) nbdFirstWrites(ctx context.Context, id string, columns []string) (*Table, error) {
	t := r.table(id, "First writes", columns...)
	jobs := []job{
		{"1 MiB write in sequence, allocating", fio.Job{RW: "write", Block: 1 << 20, Depth: 4, Size: r.Size}, "MB/s", mbps},
		{"4 KiB random write, allocating", fio.Job{RW: "randwrite", Block: 4096, Depth: 16, Size: r.Size, Count: r.firstWrites()}, "IOPS", iops},
	}
	for _, j := range jobs {
		var meters []meter
		for i := range columns {
			meters = append(meters, r.onEmpty(i, j))
		}
		if err := r.measure(ctx, t, Row{Name: j.name, Unit: j.unit, Better: "higher"}, meters...); err != nil {
			return nil, err
		}
	}

	base := r.path("base.qcow2")
	if err := r.qcow2(ctx, base, true); err != nil {
		return nil, err
	}
	pool := r.path("origin")
	if err := r.thinDevice(ctx, pool, true); err != nil {
		return nil, err
	}
	j := job{"4 KiB random write into a fresh snapshot",
		fio.Job{RW: "randwrite", Block: 4096, Depth: 16, Size: r.Size, Count: r.firstWrites()}, "IOPS", iops}
	err := r.measure(ctx, t, Row{Name: j.name, Unit: j.unit, Better: "higher"},
		nil, nil, r.onOverlay(base, j), r.onSnapshot(pool, j), nil)
	return t, err
}

// firstWrites is a number of random writes of which most hit a block of 64 KiB for the first time.
func (r *runner) firstWrites() int { return int(r.Size / (64 << 10) / 2) }

// onEmpty measures a job on the i-th kind of device, made empty for it.
func (r *runner) onEmpty(i int, j job) meter {
	return func(ctx context.Context) (figure, error) {
		dir := r.fresh("empty")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return figure{}, err
		}
		defer os.RemoveAll(dir)
		d := r.nbdDevices(dir, false)[i]
		if err := d.make(ctx); err != nil {
			return figure{}, err
		}
		return once(ctx, d, j)
	}
}

// once serves a device for one job.
func once(ctx context.Context, d device, j job) (figure, error) {
	s, err := d.serve(ctx)
	if err != nil {
		return figure{}, err
	}
	f, err := load(&client{name: d.name, s: s}, j.fio, j.value)(ctx)
	if e := s.Stop(); err == nil {
		err = e
	}
	return f, err
}

// onOverlay measures a job on a new qcow2 image over base.
func (r *runner) onOverlay(base string, j job) meter {
	return func(ctx context.Context) (figure, error) {
		file := r.fresh("overlay")
		defer os.Remove(file)
		if err := peer.Qcow2Over(ctx, file, base, r.Size); err != nil {
			return figure{}, err
		}
		return once(ctx, device{colQemuQcow2, nil, func(ctx context.Context) (*peer.Server, error) {
			return peer.QemuNBD(ctx, file, "qcow2", r.fresh("s"))
		}}, j)
	}
}

// onSnapshot measures a job on a new snapshot of a pool's device, which is deleted afterwards.
func (r *runner) onSnapshot(pool string, j job) meter {
	return func(ctx context.Context) (figure, error) {
		r.seq++
		id := thinID + thin.DevID(r.seq)
		if err := peer.OnPool(ctx, pool, func(p engine.Pool) error { return p.CreateSnap(ctx, id, thinID) }); err != nil {
			return figure{}, err
		}
		f, err := once(ctx, device{colThin, nil, func(ctx context.Context) (*peer.Server, error) {
			return r.own("snapshot", peer.Own{Pool: pool, ID: id, Size: r.Size}).NBD(ctx, r.fresh("s"))
		}}, j)
		if e := peer.OnPool(ctx, pool, func(p engine.Pool) error { return p.Delete(ctx, id) }); err == nil {
			err = e
		}
		return f, err
	}
}
