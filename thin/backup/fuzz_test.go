package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"

	"mica/dev"
	"mica/internal/mutate"
	"mica/thin"
)

func backupSeeds(t testing.TB) [][]byte {
	mem := dev.NewMem(128 << 10)
	const xml = `<superblock uuid="" time="1" transaction="3" flags="0" version="2" data_block_size="128" nr_data_blocks="100">
  <device dev_id="1" mapped_blocks="3" transaction="0" creation_time="0" snap_time="1">
    <range_mapping origin_begin="0" data_begin="5" length="3" time="0"/>
  </device>
</superblock>
`
	if err := thin.Restore(strings.NewReader(xml), mem, thin.RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	v, err := thin.OpenView(mem)
	if err != nil {
		t.Fatal(err)
	}
	var small bytes.Buffer
	if err := compress(context.Background(), v, &small, Options{}); err != nil {
		t.Fatal(err)
	}
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	img := make([]byte, 128<<10)
	if _, err := mem.ReadAt(img, 0); err != nil {
		t.Fatal(err)
	}
	return [][]byte{[]byte(xml), small.Bytes(), img, w.EncodeAll(bytes.Repeat([]byte(" "), 1<<20), nil),
		{0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA8, 0x01, 0x00, 0x00}}
}

// restoreAny: any file is refused, or makes a clean pool.
func restoreAny(t *testing.T, in []byte) {
	to := filepath.Join(fuzzDir(t), fmt.Sprintf("img-%d", fuzzed.Add(1)))
	defer os.Remove(to)
	img, err := unpack(bytes.NewReader(in), to, 4<<20, func() (io.Reader, error) { return bytes.NewReader(in), nil })
	if err != nil {
		return
	}
	defer img.Close()
	out := dev.NewMem(img.Size() + 256<<10)
	if _, err := Restore(img, nil, out, RestoreOptions{}); err != nil {
		if _, err := thin.OpenView(out); !errors.Is(err, thin.ErrNoPool) {
			t.Fatalf("refused, and yet a pool is there: %v", err)
		}
		return
	}
	if c, err := thin.Check(out, thin.CheckOptions{}); err != nil || !c.Clean() {
		t.Fatalf("not clean: %v %v", c.Err(), err)
	}
}

var fuzzed atomic.Int64

// fuzzDir is a directory in memory where there is one.
func fuzzDir(t *testing.T) string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		dir := filepath.Join("/dev/shm", fmt.Sprintf("mica-fuzz-%d", os.Getpid()))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func FuzzBackup(f *testing.F) { mutate.Fuzz(f, backupSeeds(f), restoreAny) }

func TestBackupMutated(t *testing.T) {
	mutate.Test(t, "FuzzBackup", backupSeeds(t), mutate.Options{Inputs: 150, MaxBytes: 160 << 10, AllocBase: 256 << 20}, restoreAny)
}
