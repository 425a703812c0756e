package signature

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// image makes a file of 4 MiB with b at off.
func image(t *testing.T, b []byte, off int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	return path
}

// swapHeader is the first page of a swap area of 1,024 pages.
func swapHeader() []byte {
	b := make([]byte, 4096)
	b[1024] = 1                   // version
	b[1028], b[1029] = 0xff, 0x03 // last page
	copy(b[4086:], "SWAPSPACE2")
	return b
}

func TestCheck(t *testing.T) {
	tests := []struct {
		name string
		data []byte
		off  int64
		want string // in the error; empty: nothing found
	}{
		{"zeros", nil, 0, ""},
		{"content that is no signature", []byte("hello"), 5000, ""},
		{"LVM label", append([]byte("LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00 \x00\x00\x00LVM2 001"), make([]byte, 480)...), 512, "LVM2_member"},
		{"xfs", append([]byte("XFSB\x00\x00\x10\x00"), make([]byte, 500)...), 0, ""}, // the magic alone is no xfs
		{"swap", swapHeader(), 0, "swap"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := Check(context.Background(), image(t, tt.data, tt.off))
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("Check: %v, want nil", err)
			case tt.want != "" && (!errors.Is(err, ErrFound) || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("Check: %v, want ErrFound naming %s", err, tt.want)
			}
		})
	}
}

// TestCheckEnds is the check of hosts that have neither tool.
func TestCheckEnds(t *testing.T) {
	for _, tt := range []struct {
		off  int64
		want bool // found
	}{{0, true}, {4<<20 - 1, true}, {2 << 20, false}} {
		err := checkEnds(image(t, []byte{1}, tt.off))
		if got := errors.Is(err, ErrFound); got != tt.want {
			t.Errorf("one byte at %d: %v, want ErrFound %v", tt.off, err, tt.want)
		}
	}
}
