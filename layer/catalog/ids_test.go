package catalog

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"mica/layer/internal/fake"
	"mica/thin"
)

// TestIDsRunOut uses up a small space of device ids, of which some belong to foreign devices. Who
// finds none gets a clear error and takes nothing away from who needs fewer; a removal gives its id
// back once the device is deleted, and not before; in the end every id has served.
func TestIDsRunOut(t *testing.T) {
	ctx := context.Background()
	pool := fake.New()
	const space = 100
	foreign := map[thin.DevID]bool{}
	for _, id := range []thin.DevID{FirstID, FirstID + 7, FirstID + space - 1} {
		foreign[id] = true
		if err := pool.CreateThin(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	c := mustOpen(t, Options{Path: filepath.Join(t.TempDir(), "c.db"), Pool: pool, HoldDeletes: true, lastID: FirstID + space - 1})
	const most = space - 3
	ids, err := c.Alloc(ctx, most+1)
	if err == nil || !strings.Contains(err.Error(), "no free device id") {
		t.Fatalf("%d ids of %d: %v, want an error", most+1, most, err)
	}
	if ids, err = c.Alloc(ctx, most); err != nil {
		t.Fatalf("%d ids after a request for too many: %v", most, err)
	}
	seen := map[thin.DevID]bool{}
	for _, id := range ids {
		if foreign[id] || seen[id] || id < FirstID || id >= FirstID+space {
			t.Errorf("id %d was handed out", id)
		}
		seen[id] = true
	}
	if _, err := c.Alloc(ctx, 1); err == nil {
		t.Fatal("an id was handed out when there was none")
	}
	c.Release(ids...)
	for i := range most {
		put(t, c, fmt.Sprint(i), "", 0)
	}
	for i := range 10 {
		drop(t, c, fmt.Sprint(i))
	}
	if _, err := c.Alloc(ctx, 1); err == nil {
		t.Fatal("an id was handed out before its device was deleted")
	}
	c.StartDeletes()
	if err := c.WaitDeletes(ctx); err != nil {
		t.Fatal(err)
	}
	if ids, err = c.Alloc(ctx, 10); err != nil {
		t.Fatalf("ids of deleted devices: %v", err)
	}
	c.Release(ids...)
	for i := 10; i < most; i++ {
		drop(t, c, fmt.Sprint(i))
	}
	if err := c.WaitDeletes(ctx); err != nil {
		t.Fatal(err)
	}

	// At the edge, from several sides: no id is held twice, and none is lost.
	var mu sync.Mutex
	held := map[thin.DevID]bool{}
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for range 200 {
				ids, err := c.Alloc(ctx, 1+rng.IntN(40))
				if err != nil {
					continue
				}
				mu.Lock()
				for _, id := range ids {
					if held[id] || foreign[id] {
						t.Errorf("id %d is held twice, or foreign", id)
					}
					held[id] = true
				}
				mu.Unlock()
				mu.Lock()
				for _, id := range ids {
					delete(held, id)
				}
				c.Release(ids...)
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	if ids, err = c.Alloc(ctx, most); err != nil {
		t.Errorf("after all: %v", err)
	}
	c.Release(ids...)
	if n := devices(t, pool); n != len(foreign) {
		t.Errorf("%d devices in the pool, want the %d foreign ones", n, len(foreign))
	}
}
