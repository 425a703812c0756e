package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"mica/internal/mutate"
	"mica/layer/internal/fake"
	"mica/thin"
)

func recordSeeds() [][]byte {
	var out [][]byte
	for _, s := range []string{
		`{"device":65536,"parent":"layer/sha256:00","body":{"a":1}}`, `{"device":16777216}`, `{"device":-1}`, `{"device":1e9}`, `{}`, `null`, `[]`,
		`{"body":null}`, `{"object":"container/a","since":"2026-01-02T03:04:05Z","body":[1,2,3]}`, `{"since":"never"}`, `{"kind":"x","Key":"y"}`, ``,
	} {
		out = append(out, []byte(s))
	}
	return out
}

// FuzzRecord: any bytes as a record or an intent are an error, or something that is written back as
// what reads the same.
func FuzzRecord(f *testing.F) { mutate.Fuzz(f, recordSeeds(), readRecord) }

// TestRecordMutated is FuzzRecord for a moment.
func TestRecordMutated(t *testing.T) {
	mutate.Test(t, "FuzzRecord", recordSeeds(), mutate.Options{Inputs: 5000, AllocBase: 1 << 20, AllocPerByte: 64,
		Words: []string{`"device":`, `"parent":`, `"body":`, `"since":`, `"object":`, `{`, `}`, `[`, `\u0000`}}, readRecord)
}

func readRecord(t *testing.T, b []byte) {
	if r, err := decodeRecord("kind", "key/with/slashes", b); err == nil {
		if r.Kind != "kind" || r.Key != "key/with/slashes" || r.Device > thin.MaxDevID {
			t.Errorf("record %+v", r)
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("record %+v: %v", r, err)
		}
		if r2, err := decodeRecord("kind", "key/with/slashes", again); err != nil || r2.Device != r.Device || r2.Parent != strings.ToValidUTF8(r.Parent, "\ufffd") {
			t.Errorf("record %+v reads back as %+v, %v", r, r2, err)
		}
	}
	if m, err := decodeRemoval(7, b); err == nil {
		if _, err := json.Marshal(m); err != nil {
			t.Errorf("intent %+v: %v", m, err)
		}
	}
	if id, err := parseID(b); err == nil && !bytes.Equal(idKey(id), b) {
		t.Errorf("key %x is id %d, whose key is %x", b, id, idKey(id))
	}
	if kind, key, ok := cutRef(string(b)); ok && kind+"/"+key != string(b) {
		t.Errorf("ref %q is %q and %q", b, kind, key)
	}
}

// fileSeeds are files of catalogs: a new one, one in use with several pages, one with free pages and
// long records, one of another program.
func fileSeeds(tb testing.TB) ([][]byte, *fake.Pool) {
	tb.Helper()
	dir, ctx := tb.TempDir(), context.Background()
	pool := fake.New()
	path := filepath.Join(dir, "c.db")
	c, err := Open(ctx, Options{Path: path, Pool: pool, Logger: quiet()})
	if err != nil {
		tb.Fatal(err)
	}
	var out [][]byte
	keep := func() {
		b, err := os.ReadFile(path)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, b)
	}
	keep()
	for round := range 3 {
		ids, err := c.Alloc(ctx, 30)
		if err != nil {
			tb.Fatal(err)
		}
		var s Step
		for _, id := range ids {
			s.Creates = append(s.Creates, Create{ID: id})
		}
		body, _ := json.Marshal(strings.Repeat("x", 200<<(2*round)))
		s.Apply = func(tx *Tx) error {
			for i, id := range ids {
				if err := tx.Put(Record{Kind: "x", Key: fmt.Sprintf("%d/%d", round, i), Device: id, Parent: fmt.Sprintf("x/%d/%d", round-1, i), Body: body}); err != nil {
					return err
				}
			}
			return nil
		}
		if err := c.Do(ctx, s); err != nil {
			tb.Fatal(err)
		}
		keep()
		if err := c.Do(ctx, Step{Apply: func(tx *Tx) error { return tx.Delete("x", fmt.Sprintf("%d/7", round)) }}); err != nil {
			tb.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		tb.Fatal(err)
	}
	keep()
	db, err := bbolt.Open(filepath.Join(dir, "other"), 0o600, nil)
	if err != nil {
		tb.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("meta")); return err }); err != nil {
		tb.Fatal(err)
	}
	db.Close()
	other, err := os.ReadFile(filepath.Join(dir, "other"))
	if err != nil {
		tb.Fatal(err)
	}
	return append(out, other, nil, []byte("text")), pool
}

// FuzzFile: any bytes as the file. It is refused, or is a catalog that can be read, changed, closed
// and opened again. Never a panic, and nothing is deleted that it does not name.
func FuzzFile(f *testing.F) {
	seeds, pool := fileSeeds(f)
	mutate.Fuzz(f, seeds, openAny(f, pool))
}

// TestFileMutated is FuzzFile for a moment.
func TestFileMutated(t *testing.T) {
	seeds, pool := fileSeeds(t)
	mutate.Test(t, "FuzzFile", seeds, mutate.Options{Inputs: 600, MaxBytes: 1 << 20}, openAny(t, pool))
}

func openAny(tb testing.TB, full *fake.Pool) func(*testing.T, []byte) {
	base := ""
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		base = "/dev/shm"
	}
	dir, err := os.MkdirTemp(base, "catalog-fuzz-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "c.db")
	return func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		pool := full.Copy()
		foreign := thin.DevID(7) // below what a catalog hands out
		if err := pool.CreateThin(ctx, foreign); err != nil {
			t.Fatal(err)
		}
		o := Options{Path: path, Pool: pool, Logger: quiet(), LockWait: time.Millisecond}
		c, err := Open(ctx, o)
		if err != nil {
			return
		}
		use(t, ctx, c)
		if err := c.Close(); err != nil && c.ReadOnly() == nil {
			t.Errorf("close: %v", err)
		}
		if c, err = Open(ctx, o); err != nil {
			t.Fatalf("it was a catalog, and is none after it was used: %v", err)
		}
		c.Close()
		// What a removal intent of the file names may go; what nothing names stays.
		if named := bytes.Contains(b, idKey(foreign)); !named {
			devs, err := pool.Devices(ctx)
			if err != nil || len(devs) == 0 || devs[0].ID != foreign {
				t.Errorf("device %d, which the file does not name, is gone: %v", foreign, err)
			}
		}
	}
}

// use reads everything, and makes and drops a record.
func use(t *testing.T, ctx context.Context, c *Catalog) {
	err := c.View(func(tx *Tx) error { return tx.all(func(Record) error { return nil }) })
	if err != nil {
		t.Errorf("records that were read at open: %v", err)
	}
	if _, err := c.Foreign(ctx); err != nil {
		t.Errorf("foreign devices: %v", err)
	}
	c.AllBroken()
	ids, err := c.Alloc(ctx, 1)
	if err != nil {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("alloc: %v", err)
		}
		return
	}
	err = c.Do(ctx, Step{Creates: []Create{{ID: ids[0]}}, Apply: func(tx *Tx) error {
		return tx.Put(Record{Kind: "x", Key: "new", Device: ids[0], Body: json.RawMessage(`"` + strings.Repeat("y", 9000) + `"`)})
	}})
	if err != nil && !errors.Is(err, ErrReadOnly) {
		t.Errorf("step: %v", err)
	}
}
