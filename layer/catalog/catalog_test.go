package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"mica/engine"
	"mica/layer/internal/fake"
	"mica/thin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mustOpen(t *testing.T, o Options) *Catalog {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet()
	}
	c, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func put(t *testing.T, c *Catalog, key, parent string, origin thin.DevID) thin.DevID {
	t.Helper()
	ids, err := c.Alloc(context.Background(), 1)
	if err != nil {
		t.Fatal(err)
	}
	err = c.Do(context.Background(), Step{
		Creates: []Create{{ID: ids[0], Origin: origin}},
		Apply:   func(tx *Tx) error { return tx.Put(Record{Kind: "x", Key: key, Device: ids[0], Parent: parent}) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids[0]
}

func drop(t *testing.T, c *Catalog, key string) {
	t.Helper()
	err := c.Do(context.Background(), Step{Apply: func(tx *Tx) error {
		r, err := tx.Get("x", key)
		if err != nil {
			return err
		}
		if err := tx.Delete("x", key); err != nil {
			return err
		}
		return tx.Remove(Removal{Device: r.Device, Object: key, Since: time.Now()})
	}})
	if err != nil {
		t.Fatal(err)
	}
}

func devices(t *testing.T, p *fake.Pool) int {
	t.Helper()
	d, err := p.Devices(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A lost catalog deletes nothing: every device is foreign to the new one, and none of their ids
// is handed out.
func TestLostCatalogDeletesNothing(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	var ids []thin.DevID
	for i := range 20 {
		ids = append(ids, put(t, c, fmt.Sprint(i), "", 0))
	}
	old := c.StoreID()
	c.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c = mustOpen(t, Options{Path: path, Pool: pool})
		if err := c.ReadOnly(); err != nil {
			t.Fatal(err)
		}
		if c.StoreID() == old {
			t.Error("the new catalog has the old one's id")
		}
		f, err := c.Foreign(context.Background())
		if err != nil || len(f) != 20 {
			t.Fatalf("%d foreign devices (%v), want 20", len(f), err)
		}
		got, err := c.Alloc(context.Background(), 100)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range got {
			for _, id := range ids {
				if g == id {
					t.Fatalf("id %d of a foreign device was handed out", g)
				}
			}
		}
		c.Release(got...)
		c.Close()
	}
	if n := devices(t, pool); n != 20 {
		t.Fatalf("pool has %d devices, want 20", n)
	}
}

// Copies of the file or of the pool from another moment are told apart, change nothing, and are
// taken over only on demand, which deletes nothing either.
func TestRestoredCopies(t *testing.T) {
	for _, tc := range []struct {
		name         string
		steps        int  // between the copy and the restore
		oldPool      bool // restore the pool instead of the catalog
		open         bool // the copy is of an open catalog
		want         string
		forgiven     bool // looks like a crash between pool and file
		removeInStep bool
	}{
		{name: "catalog closed, one step", steps: 1, want: "the catalog is older than the pool"},
		{name: "catalog closed, one removal", steps: 1, removeInStep: true, want: "the catalog is older than the pool"},
		{name: "catalog closed, many steps", steps: 5, want: "the catalog is older than the pool"},
		{name: "catalog open, two steps", steps: 2, open: true, want: "the catalog is older than the pool"},
		{name: "catalog open, one step", steps: 1, open: true, forgiven: true},
		{name: "catalog closed, no step", steps: 0, forgiven: true},
		{name: "pool, one step", steps: 1, oldPool: true, want: "the pool is older than the catalog"},
		{name: "pool, many steps", steps: 7, oldPool: true, want: "the pool is older than the catalog"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := context.Background()
			pool, dir := fake.New(), t.TempDir()
			path, copied := filepath.Join(dir, "c.db"), filepath.Join(dir, "copy.db")
			c := mustOpen(t, Options{Path: path, Pool: pool})
			put(t, c, "a", "", 0)
			put(t, c, "b", "", 0)
			if !tc.open {
				c.Close()
			}
			copyFile(t, path, copied)
			oldPool := pool.Copy()
			if !tc.open {
				c = mustOpen(t, Options{Path: path, Pool: pool})
			}
			for i := range tc.steps {
				if tc.removeInStep {
					drop(t, c, "a")
				} else {
					put(t, c, fmt.Sprint(i), "", 0)
				}
			}
			c.WaitDeletes(ctx)
			c.Close()
			if tc.oldPool {
				pool = oldPool
			} else {
				copyFile(t, copied, path)
			}
			before := devices(t, pool)
			c = mustOpen(t, Options{Path: path, Pool: pool})
			ro := c.ReadOnly()
			if tc.forgiven {
				if ro != nil {
					t.Fatalf("read-only: %v", ro)
				}
				return
			}
			if !errors.Is(ro, ErrReadOnly) || !strings.Contains(ro.Error(), tc.want) {
				t.Fatalf("read-only: %v, want %q", ro, tc.want)
			}
			if _, err := c.Alloc(ctx, 1); !errors.Is(err, ErrReadOnly) {
				t.Errorf("alloc: %v, want ErrReadOnly", err)
			}
			if err := c.Do(ctx, Step{}); !errors.Is(err, ErrReadOnly) {
				t.Errorf("step: %v, want ErrReadOnly", err)
			}
			if err := c.View(func(tx *Tx) error { _, err := tx.Get("x", "b"); return err }); err != nil {
				t.Errorf("read: %v", err)
			}
			c.Close()
			c = mustOpen(t, Options{Path: path, Pool: pool, AcceptPool: true})
			if err := c.ReadOnly(); err != nil {
				t.Fatalf("accepted, still read-only: %v", err)
			}
			put(t, c, "new", "", 0)
			c.WaitDeletes(ctx)
			if n := devices(t, pool); n != before+1 {
				t.Errorf("pool has %d devices, want %d", n, before+1)
			}
		})
	}
}

// A missing device breaks its record and what was made from it, nothing else.
func TestBroken(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	a := put(t, c, "a", "", 0)
	b := put(t, c, "b", "x/a", a)
	put(t, c, "c", "x/b", b)
	put(t, c, "d", "x/a", a)
	c.Close()
	if err := pool.Delete(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	c = mustOpen(t, Options{Path: path, Pool: pool})
	if err := c.ReadOnly(); err != nil {
		t.Fatal(err)
	}
	got := c.AllBroken()
	if len(got) != 2 || got["x/b"] == "" || !strings.Contains(got["x/c"], "made from x/b") {
		t.Fatalf("broken: %v, want b and c", got)
	}
	drop(t, c, "c")
	drop(t, c, "b") // its device is missing: gone is gone
	if err := c.WaitDeletes(context.Background()); err != nil || len(c.Pending()) != 0 {
		t.Fatalf("removal of broken records: %v, pending %v", err, c.Pending())
	}
	put(t, c, "e", "", 0)
}

// Steps that wait together share one transaction id and one commit of the file; one that fails
// does not take the others with it.
func TestGroupCommit(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	ids, err := c.Alloc(context.Background(), 40)
	if err != nil {
		t.Fatal(err)
	}
	before := c.TransactionID()
	gate := make(chan struct{})
	pool.Fail = func(op string) error {
		if op == "set_transaction_id" {
			<-gate
		}
		return nil
	}
	refused := errors.New("refused")
	var wg sync.WaitGroup
	errs := make([]error, len(ids))
	for i, id := range ids {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = c.Do(context.Background(), Step{
				Creates: []Create{{ID: id}},
				Apply: func(tx *Tx) error {
					if i%10 == 3 {
						return refused
					}
					return tx.Put(Record{Kind: "x", Key: fmt.Sprint(i), Device: id})
				},
			})
		}()
	}
	for {
		c.mu.Lock()
		n := len(c.queue)
		c.mu.Unlock()
		if d := devices(t, pool); n+d >= len(ids) && d > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	for i, err := range errs {
		if want := i%10 == 3; want != errors.Is(err, refused) || (!want && err != nil) {
			t.Errorf("step %d: %v", i, err)
		}
	}
	if n := c.TransactionID() - before; n > 2 {
		t.Errorf("%d transaction ids for 40 steps, want 2 at most", n)
	}
	c.WaitDeletes(context.Background())
	if n := devices(t, pool); n != 36 {
		t.Errorf("pool has %d devices, want 36", n)
	}
	c.mu.Lock()
	held := len(c.held)
	c.mu.Unlock()
	if held != 0 {
		t.Errorf("%d ids still held", held)
	}
}

// A device that is open is deleted as soon as it is free; its intent survives a restart.
func TestDeleteWaitsForDevice(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	var gone []Removal
	o := Options{Path: path, Pool: pool, OnDeleted: func(m Removal) { gone = append(gone, m) }}
	c := mustOpen(t, o)
	id := put(t, c, "a", "", 0)
	dev, err := pool.Open(context.Background(), id, engine.OpenOptions{SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	drop(t, c, "a")
	if err := c.WaitDeletes(context.Background()); err != nil {
		t.Fatal(err)
	}
	p := c.Pending()
	if len(p) != 1 || p[0].Object != "a" || p[0].Attempts == 0 || !strings.Contains(p[0].LastErr, "in use") {
		t.Fatalf("pending: %+v", p)
	}
	c.Close()
	o.HoldDeletes = true
	c = mustOpen(t, o)
	dev.Close()
	if p := c.Pending(); len(p) != 1 || p[0].Attempts != 0 {
		t.Fatalf("pending after the restart: %+v", p)
	}
	c.StartDeletes()
	if err := c.WaitDeletes(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := devices(t, pool); n != 0 || len(c.Pending()) != 0 {
		t.Fatalf("%d devices, pending %v", n, c.Pending())
	}
	c.Close()
	if len(gone) != 1 || gone[0].Device != id {
		t.Errorf("told of %v", gone)
	}
}

// A reserved id whose device exists already is somebody else's: left alone, not handed out.
func TestReservedIDTaken(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	ids, err := c.Alloc(context.Background(), 2)
	if err != nil {
		t.Fatal(err)
	}
	pool.CreateThin(context.Background(), ids[0])
	pool.CreateThin(context.Background(), ids[1])
	err = c.Do(context.Background(), Step{Creates: []Create{{ID: ids[0]}}})
	if !errors.Is(err, thin.ErrExists) {
		t.Fatalf("step: %v, want ErrExists", err)
	}
	if err := c.CreateHeld(context.Background(), []Create{{ID: ids[1]}}); !errors.Is(err, thin.ErrExists) {
		t.Fatalf("held: %v, want ErrExists", err)
	}
	got, err := c.Alloc(context.Background(), 200)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range got {
		if g == ids[0] || g == ids[1] {
			t.Errorf("id %d was handed out", g)
		}
	}
	// Crash: the reservation of the rest is open, those two are not in it.
	c.setReadOnly(errCrash)
	c.Close()
	c = mustOpen(t, Options{Path: path, Pool: pool})
	c.WaitDeletes(context.Background())
	if n := devices(t, pool); n != 2 {
		t.Errorf("pool has %d devices, want the 2 foreign ones", n)
	}
}

// A full host disk fails the step, not the catalog: nothing half done, and it goes on when there
// is space again.
func TestHostDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	pool := fake.New()
	c := mustOpen(t, Options{Path: filepath.Join(dir, "c.db"), Pool: pool})
	id := put(t, c, "a", "", 0)
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	if _, err := io.Copy(filler, zeros{}); err == nil {
		t.Fatal("the disk did not fill")
	}
	txid := c.TransactionID()
	ids, err := c.Alloc(context.Background(), 1)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := json.Marshal(strings.Repeat("x", 512<<10))
	big := func(tx *Tx) error { return tx.Put(Record{Kind: "x", Key: "big", Device: ids[0], Body: body}) }
	err = c.Do(context.Background(), Step{Creates: []Create{{ID: ids[0], Origin: id}}, Apply: big})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("step on a full disk: %v, want ENOSPC", err)
	}
	if ro := c.ReadOnly(); ro != nil {
		t.Fatalf("catalog gave up: %v", ro)
	}
	if got := c.TransactionID(); got != txid {
		t.Errorf("transaction id %d, want %d", got, txid)
	}
	c.WaitDeletes(context.Background())
	if n := devices(t, pool); n != 1 {
		t.Errorf("pool has %d devices, want 1", n)
	}
	if err := filler.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if ids, err = c.Alloc(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	body = body[:1024]
	body[1023] = '"'
	if err := c.Do(context.Background(), Step{Creates: []Create{{ID: ids[0], Origin: id}}, Apply: big}); err != nil {
		t.Fatalf("step after space came back: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A second opener waits, then is refused.
func TestLocked(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	mustOpen(t, Options{Path: path, Pool: pool})
	_, err := Open(context.Background(), Options{Path: path, Pool: pool, LockWait: 50 * time.Millisecond, Logger: quiet()})
	if !errors.Is(err, ErrLocked) {
		t.Fatalf("second open: %v, want ErrLocked", err)
	}
}

// Ids come from FirstID up, wrap, and skip what is named.
func TestIDs(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	pool.CreateThin(context.Background(), FirstID+1)
	c := mustOpen(t, Options{Path: path, Pool: pool})
	c.mu.Lock()
	c.next = thin.MaxDevID - 1
	c.mu.Unlock()
	ids, err := c.Alloc(context.Background(), 5)
	if err != nil {
		t.Fatal(err)
	}
	want := []thin.DevID{thin.MaxDevID - 1, thin.MaxDevID, FirstID, FirstID + 2, FirstID + 3}
	for i := range want {
		if ids[i] != want[i] {
			t.Fatalf("ids %v, want %v", ids, want)
		}
	}
}

// A file that is not a catalog, or one of a later version, is refused with a reason.
func TestSchema(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	err := c.Do(context.Background(), Step{Apply: func(tx *Tx) error {
		return tx.tx.Bucket(bucketMeta).Put(keySchema, []byte("99"))
	}})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	_, err = Open(context.Background(), Options{Path: path, Pool: pool, Logger: quiet()})
	if err == nil || !strings.Contains(err.Error(), `schema version "99"`) {
		t.Fatalf("open: %v", err)
	}
	os.WriteFile(path, []byte("not a database at all, but long enough to be looked at"), 0o600)
	if _, err = Open(context.Background(), Options{Path: path, Pool: pool, Logger: quiet()}); err == nil {
		t.Fatal("a text file was opened as a catalog")
	}
}
