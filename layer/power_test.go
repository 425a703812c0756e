package layer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/recordfs"
	"mica/layer/catalog"
	"mica/layer/internal/fake"
	"mica/thin"
)

// MICA_LAYER_CUTS is how many power cuts TestPowerCuts makes, MICA_POWER_SEED its seed.
func powerEnv(t testing.TB) (cuts int, seed uint64) {
	cuts, seed = 800, uint64(time.Now().UnixNano())
	if raceEnabled {
		cuts = 150
	}
	if v := os.Getenv("MICA_LAYER_CUTS"); v != "" {
		n, err := strconv.Atoi(v)
		ok(t, err)
		cuts = n
	}
	if v := os.Getenv("MICA_POWER_SEED"); v != "" {
		must[int](t)(fmt.Sscan(v, &seed))
	}
	t.Logf("seed %d (MICA_POWER_SEED)", seed)
	return cuts, seed
}

// A moment is when something began and when it was acknowledged; 0: it was not.
type moment struct{ begin, end int }

// A value is what is at contentAt of an object from some time on; end: since when it is durable.
type value struct {
	v uint64
	moment
}

// A fate is the life of one object. Names are never used again.
type fate struct {
	kind, name string // "container", "snapshot" (of container/name), "image", "snap"
	made, gone moment
	values     []value
	moved      *fate // of a committed snap: the active one that it was
}

func (f *fate) last() uint64 {
	if len(f.values) == 0 {
		return 0
	}
	return f.values[len(f.values)-1].v
}

// may reports whether the object may hold v at a cut.
func (f *fate) may(v uint64, cut int) bool {
	for i := len(f.values) - 1; i >= 0; i-- {
		x := f.values[i]
		if x.begin > cut {
			continue
		}
		if x.v == v {
			return true
		}
		if x.end != 0 && x.end <= cut {
			return false
		}
	}
	return false
}

// storePower is a store on a recorded pool with a recorded catalog.
type storePower struct {
	t          testing.TB
	dir        string
	log        *dev.CrashLog
	meta, data *dev.Recorder
	catalog    *dev.Recorder
	s          *Store
	e          *fake.Exporter

	mu    sync.Mutex
	fates []*fate // guarded by mu
	seq   uint64  // guarded by mu
}

func (p *storePower) options(root, file string, pool engine.Pool) Options {
	p.e = fake.NewExporter()
	return Options{Root: root, Run: filepath.Join(root, "run"), Catalog: file, Pool: pool, Exporter: p.e, BaseSize: 64 << 20, Logger: quietLogger()}
}

// recordedFiles mounts a file system that records what is written to it, served by a process of its
// own. end ends it, after which recordfs.Load has the records; the end of the test does, too.
func recordedFiles(t testing.TB, dir string) (clock *atomic.Int64, mnt string, end func() error) {
	t.Helper()
	clock, mnt, err := recordfs.Create(dir)
	ok(t, err)
	server := exec.Command("/proc/self/exe", "role-recordfs", dir)
	server.Stderr = os.Stderr
	in, err := server.StdinPipe()
	ok(t, err)
	out, err := server.StdoutPipe()
	ok(t, err)
	ok(t, server.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		server.Wait()
		t.Fatalf("FUSE is there, but recordfs did not mount: %q, %v", line, err)
	}
	end = sync.OnceValue(func() error {
		in.Close()
		return server.Wait()
	})
	t.Cleanup(func() { end() })
	return clock, mnt, end
}

// record runs workers on a store, with everything recorded that pool and catalog write.
func (p *storePower) record(seed uint64, operations int) {
	t := p.t
	ctx := tctx(t)
	clock, mnt, end := recordedFiles(t, p.dir)

	const block, blocks = 64 << 10, 2000
	meta, data := dev.NewMem(1024*4096), dev.NewMem(blocks*block)
	ok(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: block, DataBlocks: blocks}))
	p.log = dev.NewCrashLogOn(clock)
	p.meta, p.data = p.log.WrapOn(meta, meta), p.log.WrapOn(data, data)
	pool, err := user.New(p.meta, p.data, user.Options{CommitInterval: 20 * time.Millisecond, Logger: quietLogger()})
	ok(t, err)
	o := p.options(filepath.Join(p.dir, "root"), filepath.Join(mnt, "catalog.db"), pool)
	p.s, err = open(ctx, o, fakeFiles{p.e}, nil)
	ok(t, err)
	img := p.begin("image", "img")
	importFake(t, p.s)
	p.acked(&img.made)
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			pw := &powerWorker{p: p, w: w, rng: rand.New(rand.NewPCG(seed, uint64(w))), n: must[*SnapStore](t)(p.s.Snaps(fmt.Sprint("w", w), SnapOptions{}))}
			for i := range operations {
				if err := pw.operation(ctx); err != nil {
					t.Errorf("worker %d, operation %d: %v", w, i, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	ok(t, errors.Join(p.s.Close(), pool.Close(), end()))
	recs := must[[]dev.CrashRecord](t)(recordfs.Load(p.dir, "catalog.db"))
	p.catalog = p.log.Load(recs)
	if len(recs) < operations {
		t.Errorf("only %d requests of the catalog were recorded", len(recs))
	}
}

func (p *storePower) begin(kind, name string) *fate {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := &fate{kind: kind, name: name, made: moment{begin: p.log.Now()}}
	p.fates = append(p.fates, f)
	return f
}

// acked notes that something is durable now.
func (p *storePower) acked(m *moment) { m.end = p.log.Now() }

func (p *storePower) newValue() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq++
	return p.seq
}

// A powerWorker has objects of its own.
type powerWorker struct {
	p     *storePower
	w     int
	rng   *rand.Rand
	n     *SnapStore
	seq   int
	boxes []*fate // containers
	snaps map[*fate][]*fate
	image []*fate
	act   []*fate // active snaps
	done  []*fate // committed ones
}

func (w *powerWorker) name(kind string) string {
	w.seq++
	return fmt.Sprintf("%s-%d-%d", kind, w.w, w.seq)
}

func take(rng *rand.Rand, l *[]*fate) *fate {
	i := rng.IntN(len(*l))
	f := (*l)[i]
	*l = slices.Delete(*l, i, i+1)
	return f
}

// write puts a new value into an exported device, flushed or not.
func (w *powerWorker) write(f *fate, d dev.Device) error {
	v := value{v: w.p.newValue(), moment: moment{begin: w.p.log.Now()}}
	f.values = append(f.values, v)
	if _, err := d.WriteAt(binary.LittleEndian.AppendUint64(nil, v.v), contentAt); err != nil {
		return err
	}
	if w.rng.IntN(2) == 0 {
		if err := d.Flush(); err != nil {
			return err
		}
		w.p.acked(&f.values[len(f.values)-1].moment)
	}
	return nil
}

func (w *powerWorker) operation(ctx context.Context) error {
	s, p := w.p.s, w.p
	if w.snaps == nil {
		w.snaps = map[*fate][]*fate{}
	}
	k := w.rng.IntN(20)
	if len(w.boxes) == 0 && k < 12 {
		k = 0
	}
	var box *fate
	if len(w.boxes) > 0 {
		box = w.boxes[w.rng.IntN(len(w.boxes))]
	}
	switch {
	case k < 2:
		f := p.begin("container", w.name("c"))
		f.values = []value{{0, f.made}}
		_, _, err := s.Create(ctx, CreateOptions{Name: f.name, Image: "img"})
		p.acked(&f.made)
		f.values[0].moment = f.made
		w.boxes = append(w.boxes, f)
		return err
	case k == 2:
		f := take(w.rng, &w.boxes)
		f.gone.begin = p.log.Now()
		for _, sn := range w.snaps[f] {
			sn.gone.begin = f.gone.begin
		}
		err := s.Remove(ctx, f.name, RemoveOptions{Snapshots: true})
		p.acked(&f.gone)
		for _, sn := range w.snaps[f] {
			p.acked(&sn.gone)
		}
		delete(w.snaps, f)
		return err
	case k < 6:
		a, err := s.Attach(ctx, box.name, AttachOptions{})
		if err == nil {
			err = w.write(box, p.e.Device(a.Node))
		}
		if err == nil && w.rng.IntN(3) > 0 {
			err = s.Detach(ctx, box.name, DetachOptions{})
		}
		return err
	case k < 8:
		sn := p.begin("snapshot", box.name+"/"+w.name("s"))
		_, err := s.Snapshot(ctx, box.name, SnapshotOptions{Name: strings.TrimPrefix(sn.name, box.name+"/")})
		p.acked(&sn.made)
		sn.values = []value{{box.last(), sn.made}}
		w.snaps[box] = append(w.snaps[box], sn)
		return err
	case k == 8:
		l := w.snaps[box]
		if len(l) == 0 {
			return nil
		}
		sn := take(w.rng, &l)
		w.snaps[box] = l
		sn.gone.begin = p.log.Now()
		err := s.RemoveSnapshot(ctx, box.name, strings.TrimPrefix(sn.name, box.name+"/"))
		p.acked(&sn.gone)
		return err
	case k == 9:
		l := w.snaps[box]
		if len(l) == 0 {
			return nil
		}
		sn := l[w.rng.IntN(len(l))]
		if err := s.Detach(ctx, box.name, DetachOptions{}); err != nil {
			return err
		}
		v := value{sn.last(), moment{begin: p.log.Now()}}
		_, err := s.Rollback(ctx, box.name, strings.TrimPrefix(sn.name, box.name+"/"))
		p.acked(&v.moment)
		box.values = append(box.values, v)
		return err
	case k == 10:
		var names []string
		var fs []*fate
		for range 1 + w.rng.IntN(3) {
			f := p.begin("container", w.name("f"))
			fs, names = append(fs, f), append(names, f.name)
		}
		_, err := s.Fork(ctx, box.name, ForkOptions{Names: names})
		for _, f := range fs {
			p.acked(&f.made)
			f.values = []value{{box.last(), f.made}}
		}
		w.boxes = append(w.boxes, fs...)
		return err
	case k == 11:
		f := p.begin("image", w.name("i"))
		_, err := s.Commit(ctx, box.name, CommitOptions{Image: f.name})
		p.acked(&f.made)
		w.image = append(w.image, f)
		return err
	case k == 12 && len(w.image) > 0:
		f := take(w.rng, &w.image)
		f.gone.begin = p.log.Now()
		err := s.RemoveImage(ctx, f.name)
		p.acked(&f.gone)
		return err
	case k < 15:
		f := p.begin("snap", w.name("a"))
		spec := SnapSpec{Name: f.name}
		v := uint64(0)
		if len(w.done) > 0 && w.rng.IntN(3) > 0 {
			parent := w.done[w.rng.IntN(len(w.done))]
			spec.Parent, v = parent.name, parent.last()
		}
		_, err := w.n.Prepare(ctx, spec)
		p.acked(&f.made)
		f.values = []value{{v, f.made}}
		w.act = append(w.act, f)
		return err
	case k == 15 && len(w.act) > 0:
		f := w.act[w.rng.IntN(len(w.act))]
		rec, err := w.n.record(f.name)
		if err != nil {
			return err
		}
		return w.write(f, s.liveOf(rec.body.ID).t)
	case k < 18 && len(w.act) > 0:
		f := take(w.rng, &w.act)
		c := p.begin("snap", w.name("d"))
		c.moved, f.gone.begin = f, c.made.begin
		c.values = []value{{f.last(), c.made}}
		err := w.n.Commit(ctx, c.name, f.name, "", nil)
		p.acked(&c.made)
		f.gone.end = c.made.end
		c.values[0].moment = c.made
		w.done = append(w.done, c)
		return err
	case len(w.act) > 0:
		f := take(w.rng, &w.act)
		f.gone.begin = p.log.Now()
		err := w.n.Remove(ctx, f.name)
		p.acked(&f.gone)
		return err
	}
	return nil
}

// check opens pool and store as a power cut has left them. Catalog and pool must be in step without
// help: nothing is read-only, broken or foreign, and nothing is left to delete once the queue is
// empty. Every object that was acknowledged is there with a content that it may have.
func (p *storePower) check(dir string, meta, data, catFile *dev.Mem, cut int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	rep, err := thin.Check(meta, thin.CheckOptions{})
	if err != nil {
		return err
	}
	if len(rep.Findings) > 0 {
		return fmt.Errorf("check: %s", rep.Findings[0].String())
	}
	pool, err := user.New(meta, data, user.Options{Logger: quietLogger()})
	if err != nil {
		return err
	}
	defer pool.Close()
	root, err := os.MkdirTemp(dir, "root")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	path := filepath.Join(root, "catalog.db")
	if file := make([]byte, catFile.Size()); len(file) > 0 {
		if _, err := catFile.ReadAt(file, 0); err != nil {
			return err
		}
		if err := os.WriteFile(path, file, 0o600); err != nil {
			return err
		}
	}
	q := &storePower{t: p.t}
	s, err := open(ctx, q.options(root, path, pool), fakeFiles{q.e}, nil)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	defer s.Close()
	if ro := s.cat.ReadOnly(); ro != nil {
		return ro
	}
	select {
	case <-s.base.ready:
	case <-ctx.Done():
		return errors.New("no base after a minute")
	}
	if err := s.WaitQueue(ctx); err != nil {
		return err
	}
	st, err := s.Status(ctx)
	if err != nil {
		return err
	}
	if st.ReadOnly != "" || len(st.Broken)+len(st.Foreign) > 0 || len(st.Queue) > 0 {
		return fmt.Errorf("status: read-only %q, broken %v, foreign %v, queue %v", st.ReadOnly, st.Broken, st.Foreign, st.Queue)
	}
	list, err := pool.Devices(ctx)
	if err != nil {
		return err
	}
	records := map[thin.DevID]bool{}
	err = s.cat.View(func(tx *catalog.Tx) error {
		for _, kind := range []string{kindBase, kindLayer, kindImage, kindContainer, kindSnapshot, kindSnap} {
			err := tx.Each(kind, "", "", func(r catalog.Record) (bool, error) {
				records[r.Device] = r.Device != 0
				return true, nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, d := range list {
		if !records[d.ID] {
			return fmt.Errorf("device %d is left of a removal", d.ID)
		}
	}
	for _, f := range p.fates {
		if err := p.checkFate(ctx, s, pool, f, cut); err != nil {
			return fmt.Errorf("%s %s (made %v, gone %v): %w", f.kind, f.name, f.made, f.gone, err)
		}
	}
	return nil
}

func (p *storePower) checkFate(ctx context.Context, s *Store, pool engine.Pool, f *fate, cut int) error {
	var id thin.DevID
	var err error
	switch f.kind {
	case "image":
		_, err = s.Image(ctx, f.name)
	case "container":
		var c Container
		c, err = s.Container(ctx, f.name)
		id = c.Device
	case "snapshot":
		box, name, _ := strings.Cut(f.name, "/")
		var r record[snapshotBody]
		r, err = s.snapshotRecord(box, name)
		id = r.Device
	case "snap":
		w, _, _ := strings.Cut(f.name[2:], "-")
		var n *SnapStore
		if n, err = s.Snaps("w"+w, SnapOptions{}); err == nil {
			var r record[snapBody]
			r, err = n.record(f.name)
			id = r.Device
		}
	}
	must := f.made.end != 0 && f.made.end <= cut && (f.gone.begin == 0 || f.gone.begin > cut)
	mustNot := f.made.begin > cut || f.gone.end != 0 && f.gone.end <= cut
	switch {
	case err != nil && !errors.Is(err, ErrNotFound):
		return err
	case err != nil && must:
		return fmt.Errorf("is not there: %w", err)
	case err == nil && mustNot:
		return errors.New("is there")
	case err != nil || f.kind == "image":
		return nil
	}
	b := make([]byte, 8)
	d, err := pool.Open(ctx, id, engine.OpenOptions{SizeBytes: 64 << 20, ReadOnly: true})
	switch {
	case errors.Is(err, engine.ErrInUse): // it is attached
		s.mu.Lock()
		for _, l := range s.live {
			if l.dev == id {
				_, err = l.t.ReadAt(b, contentAt)
			}
		}
		s.mu.Unlock()
	case err == nil:
		_, err = d.ReadAt(b, contentAt)
		err = errors.Join(err, d.Close())
	}
	if err != nil {
		return err
	}
	if v := binary.LittleEndian.Uint64(b); !f.may(v, cut) {
		return fmt.Errorf("holds value %d, may hold %v", v, f.values)
	}
	return nil
}

// TestPowerCuts cuts the power under a store: under pool and catalog at once, each with its unflushed
// writes kept, lost, reordered and torn on its own.
func TestPowerCuts(t *testing.T) {
	needRoot(t)
	n, seed := powerEnv(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-layer-")
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &storePower{t: t, dir: dir}
	p.record(seed, 120)
	if t.Failed() {
		return
	}
	rng := rand.New(rand.NewPCG(seed, 99))
	now := p.log.Now()
	var points []int
	for _, e := range p.log.FlushEnds() {
		points = append(points, e-1, e)
	}
	rng.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
	points = points[:min(len(points), n*2/3)]
	for i := range n / 10 { // the first start
		points = append(points, 1+i%40)
	}
	for len(points) < n {
		points = append(points, 1+rng.IntN(now))
	}
	slices.Sort(points)
	begin := time.Now()
	var wg sync.WaitGroup
	for part := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(seed, uint64(100+part)))
			c := p.log.Cursor()
			for i := part; i < len(points) && !t.Failed(); i += 2 {
				c.Seek(points[i])
				mm, dm, cm := dev.AnyCrashMode(rng), dev.AnyCrashMode(rng), dev.AnyCrashMode(rng)
				m, d := c.Image(p.meta, mm, dev.UnitMetadata, rng), c.Image(p.data, dm, dev.Unit512, rng)
				f := c.Image(p.catalog, cm, dev.Unit512, rng)
				if err := p.check(dir, m, d, f, points[i]); err != nil {
					t.Errorf("MICA_POWER_SEED=%d, cut at %d of %d, unflushed writes: metadata %v, data %v, catalog %v: %v", seed, points[i], now, mm, dm, cm, err)
				}
			}
		}()
	}
	wg.Wait()
	t.Logf("%d objects, %d flushes, %d cuts in %.1f s", len(p.fates), len(p.log.FlushEnds()), len(points), time.Since(begin).Seconds())
}
