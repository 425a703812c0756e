package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"mica/bench/store"
)

const aboutLife = "containerd's snapshotter interface: prepare a snapshot of an image, mount it, write a small file with fsync, unmount, " +
	"remove. 50 times one after the other (fewer where that would take more than two seconds), the median of each step. The image " +
	"has 200 files. The snapshotters of containerd are called in the process that measures, mica's is its daemon, over its socket. "

var lifePart = part{
	id: "life", title: "Life of a container",
	about: aboutLife + "An image of ten layers and 500 MB, compressed, is unpacked layer by layer, in sequence, with containerd's own code.",
	run: func(ctx context.Context, r *runner) error {
		if err := r.life(ctx, "life", 10, 1); err != nil {
			return err
		}
		return r.unpack(ctx, "unpack")
	},
}

var lifeDiskPart = part{
	id: "life-disk", title: "Life of a container, on a real disk", disk: true, about: aboutLife,
	run: func(ctx context.Context, r *runner) error { return r.life(ctx, "life-disk", 0, 0) },
}

// lives is how many containers live in one sample, lifeTime how long that may take.
const (
	lives    = 50
	lifeTime = 2 * time.Second
)

// makers are the snapshotters that are compared.
func (r *runner) makers() []store.Maker {
	return []store.Maker{store.Overlayfs, store.Native, store.Blockfile, store.Btrfs, store.Mica(r.Exe)}
}

// stores makes snapshotters on the part's medium. One that is not to be had has nil, and why.
func (r *runner) stores(ctx context.Context, size int64, makers []store.Maker) (list []*store.Store, why []string, err error) {
	for _, m := range makers {
		s, err := m.Make(ctx, r.fresh(m.Name), size)
		if errors.Is(err, store.ErrUnavailable) {
			r.note("%s: %v", m.Name, err)
			list, why = append(list, nil), append(why, "not available")
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", m.Name, err)
		}
		r.defers(s.Close)
		list, why = append(list, s), append(why, "")
	}
	return list, why, nil
}

func names(makers []store.Maker) (list []string) {
	for _, m := range makers {
		list = append(list, m.Name)
	}
	return list
}

// on makes the sweeps of all stores from one function.
func on(list []*store.Store, why []string, fn func(s *store.Store) sweep) (sweeps []sweep) {
	for i, s := range list {
		if s == nil {
			sweeps = append(sweeps, func(context.Context) ([]figure, error) { return nil, unavailable(why[i]) })
			continue
		}
		sweeps = append(sweeps, fn(s))
	}
	return sweeps
}

func inNamespace(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, "bench") }

// mounted mounts a snapshot for a piece of work.
func (r *runner) mounted(mounts []mount.Mount, fn func(dir string) error) error {
	dir := r.fresh("at")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := mount.All(mounts, dir); err != nil {
		return err
	}
	err := fn(dir)
	return errors.Join(err, mount.UnmountAll(dir, 0), os.Remove(dir))
}

// commit makes a committed snapshot with what fill writes.
func (r *runner) commit(ctx context.Context, s *store.Store, name, parent string, fill func(dir string) error) error {
	m, err := s.Prepare(ctx, name+"-active", parent)
	if err != nil {
		return err
	}
	if err := r.mounted(m, fill); err != nil {
		return err
	}
	return s.Commit(ctx, name, name+"-active")
}

// smallTree writes n files of 8 KiB in directories of 20.
func smallTree(dir string, n int) error {
	data := make([]byte, 8<<10)
	for i := range n {
		d := filepath.Join(dir, "d"+strconv.Itoa(i/20))
		if i%20 == 0 {
			if err := os.Mkdir(d, 0o755); err != nil {
				return err
			}
		}
		for k := range data {
			data[k] = byte(i + k*7)
		}
		if err := os.WriteFile(filepath.Join(d, strconv.Itoa(i)), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// life measures the steps of containers' lives. Targets: milliseconds for all of them but the
// removal, and for prepare; 0: none.
func (r *runner) life(ctx context.Context, id string, all, prepare float64) error {
	ctx = inNamespace(ctx)
	makers := r.makers()
	list, why, err := r.stores(ctx, 256<<20, makers[:4])
	if err != nil {
		return err
	}
	own, ownWhy, err := r.stores(ctx, 4<<30, makers[4:])
	if err != nil {
		return err
	}
	list, why = append(list, own...), append(why, ownWhy...)
	for _, s := range list {
		if s != nil {
			if err := r.commit(ctx, s, "image", "", func(dir string) error { return smallTree(dir, 200) }); err != nil {
				return fmt.Errorf("%s: %w", s.Name, err)
			}
		}
	}
	t := r.table(id, "One container after another", names(makers)...)
	rows := []Row{{Name: "prepare"}, {Name: "mount"}, {Name: "write and fsync"}, {Name: "unmount"}, {Name: "all of these"}, {Name: "remove"}}
	for i := range rows {
		rows[i].Unit, rows[i].Better = "ms", "lower"
	}
	if err := r.sweep(ctx, t, rows, on(list, why, func(s *store.Store) sweep {
		return func(ctx context.Context) ([]figure, error) { return r.liveMany(ctx, s) }
	})...); err != nil {
		return err
	}
	if all > 0 {
		t.Targets = append(t.Targets, Target{Row: "all of these", Own: "mica", Want: all, AtMost: true},
			Target{Row: "prepare", Own: "mica", Want: prepare, AtMost: true})
	}
	return r.flushesOfLife(ctx, id, list[len(list)-1])
}

// liveMany lets containers live one after another.
func (r *runner) liveMany(ctx context.Context, s *store.Store) ([]figure, error) {
	var steps [6][]float64
	begin := time.Now()
	n := lives
	if r.Quick {
		n = 2
	}
	for i := range n {
		if i > 0 && time.Since(begin) > lifeTime {
			break
		}
		d, err := r.liveOnce(ctx, s)
		if err != nil {
			return nil, err
		}
		for k, v := range d {
			steps[k] = append(steps[k], v)
		}
	}
	var out []figure
	for _, v := range steps {
		out = append(out, figure{median(v), map[string]float64{"n": float64(len(v))}})
	}
	return out, nil
}

// liveOnce is one life: prepare, mount, write, unmount, their sum, remove; milliseconds.
func (r *runner) liveOnce(ctx context.Context, s *store.Store) (d [6]float64, err error) {
	key := r.key()
	dir := r.path(key)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return d, err
	}
	defer os.Remove(dir)
	begin := time.Now()
	lap := func(i int) {
		now := time.Now()
		d[i] = float64(now.Sub(begin).Microseconds()) / 1000
		begin = now
	}
	m, err := s.Prepare(ctx, key, "image")
	if err != nil {
		return d, err
	}
	lap(0)
	if err := mount.All(m, dir); err != nil {
		return d, err
	}
	lap(1)
	err = writeSynced(filepath.Join(dir, "written"), []byte("by the container\n"))
	lap(2)
	if err := errors.Join(err, mount.Unmount(dir, 0)); err != nil {
		return d, err
	}
	lap(3)
	d[4] = d[0] + d[1] + d[2] + d[3]
	err = s.Remove(ctx, key)
	lap(5)
	return d, err
}

func (r *runner) key() string {
	r.seq++
	return "k" + strconv.Itoa(r.seq)
}

// flushesOfLife counts what mica's pool flushes in the life of one container, and when 100 are
// prepared at the same time.
func (r *runner) flushesOfLife(ctx context.Context, id string, s *store.Store) error {
	if s == nil || s.Daemon() == nil {
		return nil
	}
	d := s.Daemon()
	count := func(do func() error) ([]figure, error) {
		before, err := d.Pool(ctx)
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		if err := do(); err != nil {
			return nil, err
		}
		took := time.Since(begin)
		after, err := d.Pool(ctx)
		return []figure{
			{value: float64(after.DataFlushes + after.MetaFlushes - before.DataFlushes - before.MetaFlushes),
				more: map[string]float64{"pool commits": float64(after.Commits - before.Commits), "ms": float64(took.Microseconds()) / 1000}},
		}, err
	}
	many := 100
	if r.Quick {
		many = 4
	}
	t := r.table(id+"-flushes", "Flushes of the pool's devices", "mica")
	one := func(ctx context.Context) ([]figure, error) {
		key := r.key()
		f, err := count(func() error {
			_, err := s.Prepare(ctx, key, "image")
			return err
		})
		return f, errors.Join(err, s.Remove(ctx, key))
	}
	if err := r.sweep(ctx, t, []Row{{Name: "one prepare", Unit: "flushes", Better: "lower"}}, one); err != nil {
		return err
	}
	all := func(ctx context.Context) ([]figure, error) {
		keys := make([]string, many)
		errs := make(chan error, many)
		f, err := count(func() error {
			for i := range keys {
				keys[i] = r.key()
				go func() {
					_, err := s.Prepare(ctx, keys[i], "image")
					errs <- err
				}()
			}
			var err error
			for range keys {
				err = errors.Join(err, <-errs)
			}
			return err
		})
		for _, k := range keys {
			err = errors.Join(err, s.Remove(ctx, k))
		}
		return f, err
	}
	row := Row{Name: fmt.Sprintf("%d prepares at the same time", many), Unit: "flushes", Better: "lower"}
	if err := r.sweep(ctx, t, []Row{row}, all); err != nil {
		return err
	}
	t.Targets = append(t.Targets, Target{Row: "one prepare", Own: "mica", Want: 5, AtMost: true})
	return nil
}
