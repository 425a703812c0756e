package catalog

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"mica/layer/internal/fake"
	"mica/thin"
)

// TestExpected: steps that are expected share one commit, however late they come within the limit; one
// that does not come holds nobody up for longer, and one that is given up not at all.
func TestExpected(t *testing.T) {
	pool, path := fake.New(), filepath.Join(t.TempDir(), "c.db")
	c := mustOpen(t, Options{Path: path, Pool: pool})
	ctx := context.Background()
	if _, err := c.Alloc(ctx, 1); err != nil { // reserves
		t.Fatal(err)
	}
	do := func(key string, e *Expected) error {
		ids, err := c.Alloc(ctx, 1)
		if err != nil {
			return err
		}
		return c.Do(ctx, Step{Creates: []Create{{ID: ids[0]}}, Expected: e, Apply: func(tx *Tx) error {
			return tx.Put(Record{Kind: "x", Key: key, Device: ids[0]})
		}})
	}
	ran := func(fn func()) (steps uint64, took time.Duration) {
		before, begin := c.TransactionID(), time.Now()
		fn()
		return c.TransactionID() - before, time.Since(begin)
	}
	c.mu.Lock()
	c.gatherLimit = time.Minute
	c.mu.Unlock()
	n, _ := ran(func() {
		var list []*Expected
		for range 20 {
			list = append(list, c.Expect())
		}
		var wg sync.WaitGroup
		for i, e := range list {
			if i%5 == 4 {
				continue // given up below
			}
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				if err := do(fmt.Sprint("together", i), e); err != nil {
					t.Error(err)
				}
			})
		}
		for i := 4; i < len(list); i += 5 {
			list[i].End()
			list[i].End() // counts once
		}
		wg.Wait()
	})
	if n != 1 {
		t.Errorf("%d commits for steps that were expected, want 1", n)
	}
	if n, took := ran(func() {
		if err := do("alone", c.Expect()); err != nil {
			t.Fatal(err)
		}
	}); n != 1 || took > 30*time.Second {
		t.Errorf("alone: %d commits in %v", n, took)
	}
	c.mu.Lock()
	coming := c.coming
	c.gatherLimit = time.Millisecond
	c.mu.Unlock()
	if coming != 0 {
		t.Errorf("%d steps are still expected", coming)
	}
	never := c.Expect()
	defer never.End()
	if err := do("with one that does not come", nil); err != nil {
		t.Fatal(err)
	}
}

// TestExpectedReserve: a reservation of ids does not wait for those who wait for it.
func TestExpectedReserve(t *testing.T) {
	c := mustOpen(t, Options{Path: filepath.Join(t.TempDir(), "c.db"), Pool: fake.New()})
	c.mu.Lock()
	c.gatherLimit = time.Minute
	c.mu.Unlock()
	e := c.Expect()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := c.Alloc(ctx, 3*reserveBatch); err != nil {
		t.Errorf("a reservation by one who is expected: %v", err)
	}
	e.End()
}

// TestNameDevices: a message about many devices stays short.
func TestNameDevices(t *testing.T) {
	many := make([]thin.DevID, 1000)
	for i := range many {
		many[i] = thin.DevID(2000 - i)
	}
	for want, ids := range map[string][]thin.DevID{"device 7": {7}, "devices [7 9]": {7, 9}, "1000 devices, 1001 to 2000": many} {
		if got := nameDevices(ids); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
