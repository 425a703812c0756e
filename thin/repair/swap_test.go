package repair

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/pdata/block"
)

func TestSwapFiles(t *testing.T) {
	dir := t.TempDir()
	path, repaired, keep := filepath.Join(dir, "metadata"), filepath.Join(dir, "metadata.repaired"), filepath.Join(dir, "metadata.old")
	put := func(p, s string) {
		t.Helper()
		if err := os.WriteFile(p, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(path, "old")
	put(repaired, "new")
	if err := Swap(path, repaired, keep); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{path: "new", keep: "old"} {
		if b, err := os.ReadFile(p); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v", p, b, err)
		}
	}
	if _, err := os.Stat(repaired); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", repaired, err)
	}
	put(repaired, "newer")
	if err := Swap(path, repaired, keep); !errors.Is(err, os.ErrExist) {
		t.Errorf("an older copy was to be overwritten: %v", err)
	}
	if err := Swap(path, filepath.Join(dir, "none"), keep+"2"); err == nil {
		t.Error("swapped with nothing")
	}
	if b, _ := os.ReadFile(path); string(b) != "new" {
		t.Errorf("%q after a swap that failed", b)
	}
	if _, err := os.Stat(keep + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Error("a swap that failed has left a copy")
	}
}

// TestReplaceContent: cut anywhere, the device holds no pool, or the new one whole.
func TestReplaceContent(t *testing.T) {
	p := newPool(t, 20, 512, 10000)
	p.fill(1)
	fresh := newPool(t, 21, 512, 10000)
	want := content(t, fresh.mem)
	for cut := int64(1); ; cut++ {
		mem := p.mem.Clone()
		f := dev.NewFault(mem)
		f.Add(dev.Rule{Ops: dev.OpWrite | dev.OpFlush, Skip: int(cut - 1)})
		err := replaceContent(f, fresh.mem)
		got := content(t, mem)
		if err == nil {
			if !bytes.Equal(got, want) {
				t.Error("the contents differ")
			}
			break
		}
		if cut > 1 && !bytes.Equal(got[:block.Size], make([]byte, block.Size)) && !bytes.Equal(got, want) {
			t.Errorf("cut at step %d: a superblock without its pool", cut)
		}
	}
}
