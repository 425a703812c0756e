package exporttest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// openNode opens a block device.
func openNode(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// aligned returns n bytes that direct I/O accepts.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func sizeOf(t testing.TB, f *os.File) int64 {
	t.Helper()
	n, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_END)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fill writes a pattern.
func fill(b []byte, seed uint64) []byte {
	r := rand.NewPCG(seed, 1)
	for i := 0; i < len(b); i += 8 {
		v := r.Uint64()
		for j := 0; j < 8 && i+j < len(b); j++ {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		i := 0
		for i < len(got) && i < len(want) && got[i] == want[i] {
			i++
		}
		t.Errorf("%s: differs from byte %d of %d", what, i, len(want))
	}
}

// contents reads from the device itself.
func contents(t testing.TB, d device, off int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if m, err := d.ReadAt(b, off); m < n {
		t.Fatal(err)
	}
	return b
}

func wantErrno(t testing.TB, what string, err error, want ...unix.Errno) {
	t.Helper()
	for _, w := range want {
		if errors.Is(err, w) {
			return
		}
	}
	t.Errorf("%s: %v, want %v", what, err, want)
}
