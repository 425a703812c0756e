package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/layer/internal/fake"
	"mica/thin"
)

var (
	modelSteps = flag.Int("catalog.steps", 1500, "operations of the catalog model test")
	modelSeed  = flag.Uint64("catalog.seed", 0, "seed of the catalog model test (0: from the clock)")
)

var errCrash = errors.New("crash")

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// world is a pool and a catalog file, with a model of what must be in them.
type world struct {
	t       *testing.T
	rng     *rand.Rand
	pool    engine.Pool
	newPool func() engine.Pool // opens the real pool again; nil: a fake one
	path    string
	cat     *Catalog
	objects map[string]string     // key -> stamp: acknowledged
	unsure  map[string]string     // key -> stamp: a create that crashed
	leaving map[string]bool       // key: a removal that crashed
	foreign map[thin.DevID]string // made behind the catalog's back
	fault   string
	nth     int
	log     []string
	serial  int
	hits    map[string]int
	plain   bool // snapshots and transaction id are two commits
}

// plainPool hides what a pool can do beyond Pool.
type plainPool struct{ Pool }

func (w *world) open() error {
	w.fault = ""
	return w.openFault()
}

func (w *world) openFault() error {
	var pool Pool = w.pool
	if w.plain {
		pool = plainPool{w.pool}
	}
	c, err := Open(context.Background(), Options{Path: w.path, Pool: pool, Logger: quiet(), Fault: w.crashAt})
	if err == nil {
		w.cat = c
	}
	return err
}

var faultMu sync.Mutex

func (w *world) crashAt(point string) error {
	faultMu.Lock()
	defer faultMu.Unlock()
	if point != w.fault {
		return nil
	}
	if w.nth--; w.nth > 0 {
		return nil
	}
	w.hits[point]++
	return errCrash
}

func (w *world) arm(point string, nth int) {
	faultMu.Lock()
	defer faultMu.Unlock()
	w.fault, w.nth = point, nth
}

func (w *world) stampOf(id thin.DevID) string {
	w.t.Helper()
	d, err := w.pool.Open(context.Background(), id, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true})
	if err != nil {
		w.t.Fatalf("device %d: %v", id, err)
	}
	defer d.Close()
	b := make([]byte, 64)
	if _, err := d.ReadAt(b, 0); err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimRight(string(b), "\x00")
}

func (w *world) writeStamp(id thin.DevID, s string) {
	w.t.Helper()
	d, err := w.pool.Open(context.Background(), id, engine.OpenOptions{SizeBytes: 1 << 20})
	if err != nil {
		w.t.Fatalf("device %d: %v", id, err)
	}
	defer d.Close()
	b := make([]byte, 64)
	copy(b, s)
	if _, err := d.WriteAt(b, 0); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) say(format string, a ...any) {
	w.log = append(w.log, fmt.Sprintf(format, a...))
	if len(w.log) > 30 {
		w.log = w.log[1:]
	}
}

func (w *world) die(format string, a ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nlast operations:\n  %s", fmt.Sprintf(format, a...), strings.Join(w.log, "\n  "))
}

// create makes an object; early: the device first (CreateHeld), then stamped, then published.
func (w *world) create(early bool) error {
	ctx := context.Background()
	w.serial++
	key, stamp := fmt.Sprintf("o%d", w.serial), fmt.Sprintf("stamp %d", w.serial)
	w.say("create %s early=%v", key, early)
	var origin thin.DevID
	if keys := slices.Sorted(maps.Keys(w.objects)); len(keys) > 0 && w.rng.IntN(4) > 0 {
		k := keys[w.rng.IntN(len(keys))]
		w.cat.View(func(tx *Tx) error {
			r, err := tx.Get("x", k)
			if err != nil {
				w.die("get %s: %v", k, err)
			}
			origin = r.Device
			return nil
		})
		if !early {
			stamp = w.objects[k]
		}
	}
	if origin == 0 && !early {
		stamp = ""
	}
	ids, err := w.cat.Alloc(ctx, 1)
	if err != nil {
		return err
	}
	w.unsure[key] = stamp
	s := Step{Apply: func(tx *Tx) error {
		body, _ := json.Marshal(stamp)
		return tx.Put(Record{Kind: "x", Key: key, Device: ids[0], Body: body})
	}}
	if early {
		if err := w.cat.CreateHeld(ctx, []Create{{ID: ids[0], Origin: origin}}); err != nil {
			return err
		}
		w.writeStamp(ids[0], stamp)
		s.Consume = ids
	} else {
		s.Creates = []Create{{ID: ids[0], Origin: origin}}
	}
	if err := w.cat.Do(ctx, s); err != nil {
		return err
	}
	delete(w.unsure, key)
	w.objects[key] = stamp
	return nil
}

func (w *world) remove() error {
	keys := slices.Sorted(maps.Keys(w.objects))
	if len(keys) == 0 {
		return nil
	}
	k := keys[w.rng.IntN(len(keys))]
	w.say("remove %s", k)
	w.leaving[k] = true
	err := w.cat.Do(context.Background(), Step{Apply: func(tx *Tx) error {
		r, err := tx.Get("x", k)
		if err != nil {
			return err
		}
		if err := tx.Delete("x", k); err != nil {
			return err
		}
		return tx.Remove(Removal{Device: r.Device, Object: k, Since: time.Now()})
	}})
	if err != nil {
		return err
	}
	delete(w.leaving, k)
	delete(w.objects, k)
	if w.rng.IntN(2) == 0 {
		w.cat.WaitDeletes(context.Background())
	}
	return nil
}

// check holds the rule against pool and file, right after an open.
func (w *world) check() {
	w.t.Helper()
	ctx := context.Background()
	if err := w.cat.WaitDeletes(ctx); err != nil {
		w.die("wait: %v", err)
	}
	if p := w.cat.Pending(); len(p) > 0 {
		w.die("still pending: %+v", p)
	}
	seen := map[string]thin.DevID{}
	byDev := map[thin.DevID]string{}
	w.cat.View(func(tx *Tx) error {
		return tx.Each("x", "", "", func(r Record) (bool, error) {
			seen[r.Key] = r.Device
			if o, ok := byDev[r.Device]; ok {
				w.die("device %d belongs to %s and %s", r.Device, o, r.Key)
			}
			byDev[r.Device] = r.Key
			return true, nil
		})
	})
	for k, stamp := range w.unsure { // all or nothing
		if _, ok := seen[k]; ok {
			w.objects[k] = stamp
		}
		delete(w.unsure, k)
	}
	for k := range w.leaving {
		if _, ok := seen[k]; !ok {
			delete(w.objects, k)
		}
		delete(w.leaving, k)
	}
	for k, stamp := range w.objects {
		id, ok := seen[k]
		if !ok {
			w.die("object %s is gone", k)
		}
		if got := w.stampOf(id); got != stamp {
			w.die("object %s, device %d holds %q, want %q", k, id, got, stamp)
		}
		if b := w.cat.Broken("x/" + k); b != "" {
			w.die("object %s is broken: %s", k, b)
		}
	}
	if len(seen) != len(w.objects) {
		w.die("catalog has %d objects, want %d", len(seen), len(w.objects))
	}
	for id, stamp := range w.foreign {
		if got := w.stampOf(id); got != stamp {
			w.die("foreign device %d holds %q, want %q", id, got, stamp)
		}
	}
	devs, _ := w.pool.Devices(ctx)
	if len(devs) != len(w.objects)+len(w.foreign) {
		w.die("pool has %d devices, want %d of the catalog and %d foreign", len(devs), len(w.objects), len(w.foreign))
	}
	f, err := w.cat.Foreign(ctx)
	if err != nil || len(f) != len(w.foreign) {
		w.die("foreign: %d (%v), want %d", len(f), err, len(w.foreign))
	}
}

// addForeign makes a device as a person with the plumbing commands would. After an orderly close
// any free id is possible, after a crash the low ones that people use.
func (w *world) addForeign(low bool) {
	id := thin.DevID(1 + w.rng.IntN(100))
	if !low {
		id = FirstID + thin.DevID(w.rng.IntN(4*w.serial+200))
	}
	if w.pool.CreateThin(context.Background(), id) != nil {
		return
	}
	w.say("foreign %d", id)
	s := fmt.Sprintf("foreign %d", id)
	w.writeStamp(id, s)
	w.foreign[id] = s
}

var openPoints = []string{"open:before-init", "open:after-init", "open:before-recover", "open:after-recover"}
var points = []string{"step:before-create", "step:after-create", "step:before-txid", "step:after-txid",
	"step:before-commit", "step:after-commit", "held:before-create", "held:after-create",
	"remove:before-delete", "remove:after-delete"}

// reopenPool closes and opens a real pool.
func (w *world) reopenPool() {
	if w.newPool == nil {
		return
	}
	if err := w.pool.Close(); err != nil {
		w.die("close the pool: %v", err)
	}
	w.pool = w.newPool()
}

func newWorld(t *testing.T, seed uint64) *world {
	return &world{t: t, rng: rand.New(rand.NewPCG(seed, 1)), pool: fake.New(),
		path: filepath.Join(t.TempDir(), "catalog.db"), objects: map[string]string{},
		unsure: map[string]string{}, leaving: map[string]bool{}, foreign: map[thin.DevID]string{}, hits: map[string]int{}}
}

// Random operations with a crash at every named point, again and again; after each reopen the
// rule must hold.
func TestModelWithCrashes(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) { modelWithCrashes(t, plain, nil) })
	}
	t.Run("engine=user", func(t *testing.T) {
		meta, data := dev.NewMem(16<<20), dev.NewMem(4096<<16)
		if err := thin.Format(meta, thin.FormatOptions{DataBlockSize: 64 << 10, DataBlocks: 4096}); err != nil {
			t.Fatal(err)
		}
		modelWithCrashes(t, false, func() engine.Pool {
			p, err := user.New(keepOpen{meta}, keepOpen{data}, user.Options{Logger: quiet()})
			if err != nil {
				t.Fatal(err)
			}
			return p
		})
	})
}

// keepOpen is a device that outlives its pools.
type keepOpen struct{ *dev.Mem }

func (keepOpen) Close() error { return nil }

func modelWithCrashes(t *testing.T, plain bool, newPool func() engine.Pool) {
	seed := *modelSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	w := newWorld(t, seed)
	w.plain = plain
	if newPool != nil {
		w.newPool = newPool
		w.pool = newPool()
		defer func() { w.pool.Close() }()
	}
	w.arm("open:before-init", 1)
	if err := w.openFault(); !errors.Is(err, errCrash) {
		t.Fatalf("open: %v, want a crash", err)
	}
	w.arm("open:after-init", 1)
	if err := w.openFault(); !errors.Is(err, errCrash) {
		t.Fatalf("open: %v, want a crash", err)
	}
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	defer func() { w.cat.Close() }()
	crashes, clean := 0, 0
	for i := 0; i < *modelSteps; i++ {
		if w.fault == "" && w.rng.IntN(3) == 0 {
			w.arm(points[w.rng.IntN(len(points))], 1+w.rng.IntN(4))
		}
		var err error
		switch n := w.rng.IntN(100); {
		case n < 35:
			err = w.create(false)
		case n < 55:
			err = w.create(true)
		case n < 95 || len(w.objects) > 60:
			err = w.remove()
		default: // orderly restart
			w.say("close")
			w.arm("", 0)
			if err := w.cat.Close(); err != nil {
				w.die("close: %v", err)
			}
			clean++
			w.reopenPool()
			if w.rng.IntN(2) == 0 {
				w.addForeign(false)
			}
			if err := w.open(); err != nil {
				w.die("open: %v", err)
			}
			w.check()
			continue
		}
		if ro := w.cat.ReadOnly(); ro != nil {
			if !errors.Is(ro, errCrash) {
				w.die("read-only: %v", ro)
			}
			crashes++
			w.say("crash at %s", w.fault)
			w.cat.Close()
			w.reopenPool()
			if w.rng.IntN(3) == 0 {
				w.addForeign(true)
			}
			if w.rng.IntN(4) == 0 { // crash again in the recovery
				w.arm(openPoints[2+w.rng.IntN(2)], 1)
				if err := w.openFault(); !errors.Is(err, errCrash) {
					w.die("open: %v, want a crash", err)
				}
			}
			if err := w.open(); err != nil {
				w.die("open: %v", err)
			}
			w.check()
		} else if err != nil {
			w.die("%v", err)
		}
	}
	t.Logf("%d operations, %d crashes at %d points, %d orderly restarts, %d objects, %d foreign devices",
		*modelSteps, crashes, len(w.hits), clean, len(w.objects), len(w.foreign))
	for _, p := range points {
		if *modelSteps >= 1000 && w.hits[p] == 0 {
			t.Errorf("no crash happened at %s", p)
		}
	}
}
