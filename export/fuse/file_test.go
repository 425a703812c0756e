package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

func TestServeFile(t *testing.T) {
	needRoot(t)
	path := filepath.Join(t.TempDir(), "disk.img")
	d := dev.NewMem(8 << 20)
	f, err := ServeFile(path, d, false)
	if err != nil {
		t.Fatal(err)
	}
	i, err := os.Stat(path)
	if err != nil || i.Size() != 8<<20 {
		t.Fatalf("stat: %v, %v", i, err)
	}
	// One mount: a process that is killed leaves no other one than the user knows of.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	st := i.Sys().(*syscall.Stat_t)
	device := fmt.Sprintf(" %d:%d ", unix.Major(st.Dev), unix.Minor(st.Dev))
	if ours := strings.Count(string(mounts), device); ours != 1 {
		t.Errorf("%d mounts, want that of the file:\n%s", ours, mounts)
	}
	open, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("mica"), 3000)
	if _, err := open.WriteAt(want, 5000); err != nil {
		t.Fatal(err)
	}
	if err := open.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 5000); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("device does not hold what was written (%v)", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := f.Close(ctx); !errors.Is(err, export.ErrBusy) {
		t.Errorf("close while the file is open: %v, want ErrBusy", err)
	}
	open.Close()
	if err := f.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

func TestServeFileRefusesWhatIsThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ServeFile(path, dev.NewMem(1<<20), false); err == nil {
		t.Fatal("served over a file with contents")
	}
	if b, _ := os.ReadFile(path); string(b) != "data" {
		t.Fatalf("the file now holds %q", b)
	}
}
