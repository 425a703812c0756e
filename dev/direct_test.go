package dev

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// onDisk makes a file where direct I/O works, or skips the test.
func onDisk(t *testing.T, size int64) *File {
	t.Helper()
	f, err := CreateFile(filepath.Join(t.TempDir(), "f"), size, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if f.direct == nil {
		t.Skip("SKIPPED: the temporary directory has no direct I/O (memory?)")
	}
	return f
}

// page-aligned memory.
func pages(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func flushes(t *testing.T, d Device, n int) {
	t.Helper()
	for range n {
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDirectWhileThereAreSyncs: large aligned writes go past the page cache while there are syncs, and
// only they, and only then.
func TestDirectWhileThereAreSyncs(t *testing.T) {
	f := onDisk(t, 8<<20)
	buf := pages(t, 1<<20+4096)
	write := func(what string, p []byte, off int64, want bool) {
		t.Helper()
		before := f.direct.writes.Load()
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		if got := f.direct.writes.Load() > before; got != want {
			t.Errorf("%s: direct %v, want %v", what, got, want)
		}
	}
	write("1 MiB, no syncs", buf[:1<<20], 0, false)
	flushes(t, f, busyFlushes)
	write("1 MiB, a few syncs", buf[:1<<20], 0, false)
	flushes(t, f, 1)
	write("1 MiB, syncs", buf[:1<<20], 0, true)
	write("directMin", buf[:directMin], 4096, true)
	write("below directMin", buf[:directMin-4096], 0, false)
	write("offset not aligned", buf[:1<<20], 512, false)
	write("length not aligned", buf[:1<<20+512], 0, false)
	write("memory not aligned", buf[8:8+1<<20], 0, false)
	f.direct.until.Store(int64(time.Since(epoch)))
	write("1 MiB, the syncs are over", buf[:1<<20], 0, false)
	flushes(t, f, busyFlushes+1)
	f.direct.failed.Store(true)
	write("the file system refused once", buf[:1<<20], 0, false)

	mem, err := CreateFile(filepath.Join("/dev/shm", "mica-direct-test"), 1<<20, OpenOptions{})
	if err == nil {
		defer os.Remove(mem.Path())
		defer mem.Close()
		if mem.direct != nil {
			t.Error("a file in memory has a second descriptor")
		}
	}
}

// TestDirectRefused: where the file system refuses a direct write, it goes through the page cache.
func TestDirectRefused(t *testing.T) {
	f := onDisk(t, 4<<20)
	buf := pages(t, 1<<20)[8 : 8+512<<10] // memory that no file system takes
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	if _, err := unix.Pwrite(f.direct.fd, buf, 4096); err != unix.EINVAL {
		t.Skipf("SKIPPED: the file system takes memory that is not aligned (%v)", err)
	}
	n, err := f.direct.past(f.fd, buf, 4096)
	if n != len(buf) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
	got := make([]byte, len(buf))
	if _, err := f.ReadAt(got, 4096); err != nil || !bytes.Equal(got, buf) {
		t.Errorf("read back: %v, equal %v", err, bytes.Equal(got, buf))
	}
	if !f.direct.failed.Load() {
		t.Error("it would be tried again")
	}
}

// TestDirectStripes: a direct write excludes those that overlap it, and locks in one order whatever the
// range.
func TestDirectStripes(t *testing.T) {
	var d direct
	for _, c := range []struct {
		off  int64
		n    int
		want int
	}{
		{0, 1, 1}, {0, directPiece, 1}, {directPiece - 1, 2, 2}, {directPiece, 4 * directPiece, 4},
		{(directStripes - 1) * directPiece, 2 * directPiece, 2}, // over the end of the table
		{directPiece / 2, directStripes * directPiece, directStripes},
		{0, 3 * directStripes * directPiece, directStripes},
	} {
		var order []*sync.RWMutex
		d.each(c.off, c.n, func(m *sync.RWMutex) { order = append(order, m) })
		if len(order) != c.want {
			t.Errorf("[%d, +%d): %d stripes, want %d", c.off, c.n, len(order), c.want)
		}
		at := func(m *sync.RWMutex) int {
			for i := range d.stripes {
				if &d.stripes[i] == m {
					return i
				}
			}
			return -1
		}
		for i := 1; i < len(order); i++ {
			if at(order[i]) <= at(order[i-1]) {
				t.Errorf("[%d, +%d): stripe %d after %d", c.off, c.n, at(order[i]), at(order[i-1]))
			}
		}
	}
}

// TestDirectBesideBuffered lets direct and buffered writes hit the same places, with syncs and reads
// between. The kernel would fail a sync if a page became dirty under a direct write.
func TestDirectBesideBuffered(t *testing.T) {
	t.Run("file", func(t *testing.T) {
		f := onDisk(t, 4<<20)
		directBesideBuffered(t, f, f.direct)
	})
	t.Run("block device", func(t *testing.T) {
		f := onDisk(t, 4<<20)
		node := loopOn(t, f.Path())
		b, err := OpenBlock(node, OpenOptions{Lock: true})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		directBesideBuffered(t, b, b.direct)
	})
}

// loopOn puts a loop device on a file until the test ends.
func loopOn(t *testing.T, file string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: loop devices need root")
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no loop device to be had: %v: %s", err, out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", node).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", node, err, out)
		}
	})
	return node
}

func directBesideBuffered(t *testing.T, f Device, d *direct) {
	const size = 4 << 20
	flushes(t, f, busyFlushes+1)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	end := time.Now().Add(time.Second)
	for w := range 6 {
		buf := pages(t, 1<<20)
		for i := range buf {
			buf[i] = byte(w + 1)
		}
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for time.Now().Before(end) {
				var err error
				switch {
				case w < 2: // direct
					_, err = f.WriteAt(buf, rnd.Int64N(size-int64(len(buf)))&^4095)
				case w < 4: // buffered
					_, err = f.WriteAt(buf[:4096], rnd.Int64N(size-4096)&^511)
				case w < 5:
					_, err = f.ReadAt(buf[:4096], rnd.Int64N(size-4096))
				default:
					err = f.Flush()
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
	flushes(t, f, 1)
	if d.writes.Load() == 0 {
		t.Error("no write was direct")
	}
	// What is there was written by somebody, in whole sectors.
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < size; i += 512 {
		if got[i] > 4 || !bytes.Equal(got[i:i+512], bytes.Repeat(got[i:i+1], 512)) {
			t.Fatalf("sector at %d is torn or of nobody: %x...", i, got[i:i+8])
		}
	}
}
