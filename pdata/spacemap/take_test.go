package spacemap

import (
	"testing"

	"mica/dev"
	"mica/pdata/block"
	"mica/pdata/txn"
)

// TestTake reserves given blocks: only free ones, each once, and Alloc stays away from them.
func TestTake(t *testing.T) {
	mem := dev.NewMem(64 * block.Size)
	tm := txn.New(mem, block.NewCache(mem, 1<<20))
	if _, err := FormatMeta(tm, 64); err != nil {
		t.Fatal(err)
	}
	d, err := FormatData(tm, 8)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Take(3) || d.Take(3) || d.Take(8) || d.Take(1<<40) {
		t.Fatal("take: want true for block 3 once, false again and beyond the end")
	}
	if b, n := d.Alloc(2, 8); b != 4 || n != 4 {
		t.Errorf("alloc around a taken block: %d+%d, want 4+4", b, n)
	}
	if err := d.Map(3); err != nil {
		t.Errorf("map a taken block: %v", err)
	}
	if d.Take(3) || d.Take(5) {
		t.Error("a mapped or reserved block was taken")
	}
	if err := d.Dec(3); err != nil {
		t.Fatal(err)
	}
	if d.Take(3) {
		t.Error("a block was taken that the open transaction has freed")
	}
	d.CloseTxn()
	d.Thaw(3, 1)
	if !d.Take(3) {
		t.Error("a block that is free again was not taken")
	}
	if s := d.Space(); s.Reserved != 5 || s.Mapped != 0 {
		t.Errorf("space %+v, want 5 reserved", s)
	}
}
