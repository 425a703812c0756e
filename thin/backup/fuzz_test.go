package backup

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"mica/dev"
	"mica/internal/mutate"
	"mica/thin"
)

func backupSeeds(t testing.TB) [][]byte {
	mem := dev.NewMem(1 << 20)
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
	return [][]byte{[]byte(xml), small.Bytes(), w.EncodeAll(bytes.Repeat([]byte(" "), 1<<20), nil),
		{0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA8, 0x01, 0x00, 0x00}}
}

// restoreAny: any file is refused and leaves no pool, or makes a clean one.
func restoreAny(t *testing.T, in []byte) {
	r, err := decompress(bytes.NewReader(in))
	if err != nil {
		return
	}
	if z, ok := r.(*zstd.Decoder); ok {
		defer z.Close()
	}
	out := dev.NewMem(256 << 10)
	if _, err := Restore(r, nil, out, RestoreOptions{}); err != nil {
		if _, err := thin.OpenView(out); !errors.Is(err, thin.ErrNoPool) {
			t.Fatalf("refused, and yet a pool is there: %v", err)
		}
		return
	}
	if c, err := thin.Check(out, thin.CheckOptions{}); err != nil || !c.Clean() {
		t.Fatalf("not clean: %v %v", c.Err(), err)
	}
}

func FuzzBackup(f *testing.F) { mutate.Fuzz(f, backupSeeds(f), restoreAny) }

func TestBackupMutated(t *testing.T) {
	mutate.Test(t, "FuzzBackup", backupSeeds(t), mutate.Options{Inputs: 1000, MaxBytes: 8 << 10, AllocBase: 160 << 20}, restoreAny)
}
