//go:build guest

package kernel

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/thin"
)

// These tests run inside the test machine (test/kernel builds and starts them).

var ctx = context.Background()

// newDir formats a pool in files on memory.
func newDir(t testing.TB, dataBytes, metadataBytes, bs int64) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "pool-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "data"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "data"), dataBytes); err != nil {
		t.Fatal(err)
	}
	f, err := dev.CreateFile(filepath.Join(dir, "metadata"), metadataBytes, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := thin.Format(f, thin.FormatOptions{DataBlockSize: bs, DataBlocks: uint64(dataBytes / bs)}); err != nil {
		t.Fatal(err)
	}
	f.Close()
	return dir
}

func TestSmoke(t *testing.T) {
	dir := newDir(t, 64<<20, 4<<20, 64<<10)
	p, err := Open(ctx, Source{Dir: dir}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte{1}, 100000), 12345); err != nil {
		t.Fatal(err)
	}
	if err := p.CreateSnap(ctx, 2, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte{2}, 1000), 12345); err != nil {
		t.Fatal(err)
	}
	s, err := p.Open(ctx, 2, engine.OpenOptions{SizeBytes: 8 << 20, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1000)
	if _, err := s.ReadAt(b, 12345); err != nil || b[0] != 1 || b[999] != 1 {
		t.Fatalf("snapshot holds %d, %v", b[0], err)
	}
	if _, err := d.ReadAt(b, 12345); err != nil || b[0] != 2 || b[999] != 2 {
		t.Fatalf("origin holds %d, %v", b[0], err)
	}
	st, err := p.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", st)
	devs, err := p.Devices(ctx)
	t.Logf("%+v %v", devs, err)
	es, err := d.Extents(0, 8<<20)
	t.Logf("%+v %v", es, err)
	u, err := p.Usage(ctx)
	t.Logf("%+v %v", u, err)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := p.Trim(ctx)
	t.Logf("trim %d %v", n, err)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}
