package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEnsure(t *testing.T) {
	dir := t.TempDir()
	sysfs, path := filepath.Join(dir, "sys"), filepath.Join(dir, "dev7")
	if err := os.Mkdir(sysfs, 0o755); err != nil {
		t.Fatal(err)
	}
	says := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(sysfs, "dev"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(what, words string) {
		t.Helper()
		if err := Ensure(path, sysfs, unix.S_IFCHR); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", what, err, words)
		}
	}
	refused("no such device", "no such file")
	says("seven\n")
	refused("no number", "want MAJOR:MINOR")
	says("1:3\n") // what /dev/null is: any host has it
	if n, err := Number(sysfs); err != nil || n != unix.Mkdev(1, 3) {
		t.Errorf("number %#x, %v", n, err)
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: making device files needs root")
	}
	for range 2 { // made, and there already
		if err := Ensure(path, sysfs, unix.S_IFCHR); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Rdev != unix.Mkdev(1, 3) || st.Mode != unix.S_IFCHR|0o600 {
			t.Errorf("%#o %#x, %v", st.Mode, st.Rdev, err)
		}
	}
	says("1:5\n")
	refused("another device's file", "is not device 1:5")
	if err := Ensure(path, sysfs, unix.S_IFBLK); err == nil {
		t.Error("a character device was taken for a block device")
	}
}
