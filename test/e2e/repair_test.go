package e2e

import (
	"bytes"
	"crypto/sha256"
	"os"
	"strings"
	"testing"

	"mica/pdata/block"
	"mica/thin"
)

// TestRepairDevices: a pool on block devices is repaired into a file, which is then written over its
// metadata device; what was there is kept.
func TestRepairDevices(t *testing.T) {
	b := newBox(t)
	b.noCheck = true // there is no pool but the one of devices
	data, meta := b.loopDevice("data", 64<<20), b.loopDevice("meta", 4<<20)
	pool := []string{"--data", data, "--metadata", meta}
	b.mica(append([]string{"pool", "create"}, pool...)...)
	b.mica(append([]string{"thin", "create", "1"}, pool...)...)
	text := bytes.Repeat([]byte("contents "), 1<<19)
	b.input(text, append([]string{"thin", "write", "1"}, pool...)...)
	b.mica(append([]string{"thin", "snap", "2", "1"}, pool...)...)

	// The superblock and a leaf are damaged.
	whole := b.readFile(meta)
	sb := thin.DecodeSuperblock(whole)
	root := le64(whole[int(sb.MappingRoot)*block.Size+2048:])
	f, err := os.OpenFile(meta, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{700, root*block.Size + 100} {
		if _, err := f.WriteAt([]byte{0x55}, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	damaged := b.readFile(meta)
	b.fails(append([]string{"thin", "read", "1"}, pool...), "superblock")

	out, keep := b.path("repaired"), b.path("kept")
	repair := append([]string{"pool", "repair", "--output", out}, pool...)
	report, stderr, code := b.try(repair...)
	if code != 1 || !strings.Contains(report, "thin 1: gone") || !strings.Contains(report, "superblock checksum") || stderr != "" {
		t.Errorf("exit status %d\n%s%s", code, report, stderr)
	}
	if !bytes.Equal(b.readFile(meta), damaged) {
		t.Error("the repair has written to the device")
	}
	b.misused(append([]string{"pool", "repair", "--swap", "--output", out}, pool...), "--keep")
	b.mica(append([]string{"pool", "repair", "--swap", "--output", out, "--keep", keep}, pool...)...)
	checkMetadata(b, meta)
	if !bytes.Equal(b.readFile(keep), damaged) {
		t.Error("what was there is not kept")
	}
	if st, err := os.Stat(keep); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	b.mica(append([]string{"thin", "create", "3"}, pool...)...)

	// With what was kept repaired by hand, everything is there again, the data untouched.
	kept := b.readFile(keep)
	copy(kept[700:], whole[700:701])
	copy(kept[root*block.Size+100:], whole[root*block.Size+100:root*block.Size+101])
	b.put(b.path("byhand"), kept)
	b.mica(append([]string{"pool", "repair", "--swap", "--output", b.path("byhand"), "--keep", b.path("kept2")}, pool...)...)
	got := b.mica(append([]string{"thin", "read", "1", "--length", "4718592"}, pool...)...)
	if sha256.Sum256([]byte(got)) != sha256.Sum256(text[:len(got)]) || len(got) < 4<<20 {
		t.Error("the contents differ")
	}
}

func le64(b []byte) (v int64) {
	for i := 7; i >= 0; i-- {
		v = v<<8 | int64(b[i])
	}
	return v
}
