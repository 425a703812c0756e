package dev_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mica/dev"
	"mica/dev/devtest"
)

const testSize = 3<<20 + 4096

func tempDirs(t *testing.T) map[string]string {
	dirs := map[string]string{"disk": t.TempDir()}
	if d, err := os.MkdirTemp("/dev/shm", "dev-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(d) })
		dirs["tmpfs"] = d
	}
	return dirs
}

func TestFileConforms(t *testing.T) {
	for name, dir := range tempDirs(t) {
		t.Run(name, func(t *testing.T) {
			var last string
			n := 0
			devtest.Run(t, testSize, func(t *testing.T) dev.Device {
				n++
				last = filepath.Join(dir, "f"+string(rune('a'+n)))
				f, err := dev.CreateFile(last, testSize, dev.OpenOptions{Lock: true})
				if err != nil {
					t.Fatal(err)
				}
				return f
			}, devtest.Options{DiscardZeroes: true, Reopen: func(t *testing.T) dev.Device {
				f, err := dev.OpenFile(last, dev.OpenOptions{Lock: true})
				if err != nil {
					t.Fatal(err)
				}
				return f
			}})
		})
	}
}

func TestMemConforms(t *testing.T) {
	devtest.Run(t, testSize, func(t *testing.T) dev.Device { return dev.NewMem(testSize) }, devtest.Options{DiscardZeroes: true})
}

func TestDecoratorsConform(t *testing.T) {
	t.Run("fault", func(t *testing.T) {
		devtest.Run(t, testSize, func(t *testing.T) dev.Device { return dev.NewFault(dev.NewMem(testSize)) }, devtest.Options{DiscardZeroes: true})
	})
	t.Run("recorder", func(t *testing.T) {
		devtest.Run(t, testSize, func(t *testing.T) dev.Device {
			r, err := dev.NewCrashLog().Wrap(dev.NewMem(testSize))
			if err != nil {
				t.Fatal(err)
			}
			return r
		}, devtest.Options{DiscardZeroes: true})
	})
}

// loopDevice makes a loop device of sizeBytes for the length of the test, or skips it.
func loopDevice(t *testing.T, sizeBytes int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: block device tests need root for a loop device")
	}
	img := filepath.Join(t.TempDir(), "img")
	f, err := dev.CreateFile(img, sizeBytes, dev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	out, err := exec.Command("losetup", "--find", "--show", img).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no loop device here: %v: %s", err, out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", node).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v: %s", node, err, out)
		}
	})
	return node
}

func TestBlockConforms(t *testing.T) {
	var last string
	devtest.Run(t, testSize, func(t *testing.T) dev.Device {
		last = loopDevice(t, testSize)
		b, err := dev.OpenBlock(last, dev.OpenOptions{Lock: true})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, devtest.Options{Fixed: true, Ops: 500, Reopen: func(t *testing.T) dev.Device {
		b, err := dev.OpenBlock(last, dev.OpenOptions{Lock: true})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}})
}

func TestBlockSecondOpenerRefused(t *testing.T) {
	node := loopDevice(t, testSize)
	b, err := dev.OpenBlock(node, dev.OpenOptions{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := dev.OpenBlock(node, dev.OpenOptions{Lock: true}); !errors.Is(err, dev.ErrLocked) {
		t.Fatalf("second exclusive open: %v, want ErrLocked", err)
	}
	if err := b.Discard(0, 65536); err != nil {
		t.Errorf("discard on a loop device: %v", err)
	}
	if err := b.Resize(testSize * 2); !errors.Is(err, dev.ErrOutOfRange) {
		t.Errorf("growing a block device beyond itself: %v, want ErrOutOfRange", err)
	}
}

func TestFileLockNamesHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := dev.CreateFile(path, 4096, dev.OpenOptions{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = dev.OpenFile(path, dev.OpenOptions{Lock: true})
	var le *dev.LockedError
	if !errors.As(err, &le) || le.PID != os.Getpid() {
		t.Fatalf("second opener: %v, want a LockedError of process %d", err, os.Getpid())
	}
	f.Close()
	g, err := dev.OpenFile(path, dev.OpenOptions{Lock: true})
	if err != nil {
		t.Fatalf("open after the holder closed: %v", err)
	}
	g.Close()
}

func TestFileHostBytesFollowHoles(t *testing.T) {
	for name, dir := range tempDirs(t) {
		f, err := dev.CreateFile(filepath.Join(dir, "h"), 8<<20, dev.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		host := func() int64 {
			n, err := f.HostBytes()
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		if n := host(); n > 64<<10 {
			t.Errorf("%s: empty sparse file occupies %d bytes", name, n)
		}
		f.WriteAt(bytes.Repeat([]byte{1}, 4<<20), 0)
		f.Flush()
		if n := host(); n < 4<<20 {
			t.Errorf("%s: 4 MiB of data occupy %d bytes", name, n)
		}
		if err := f.Discard(0, 3<<20); err != nil {
			t.Fatal(err)
		}
		if n := host(); n > 2<<20 {
			t.Errorf("%s: after a punch of 3 of 4 MiB %d bytes are occupied", name, n)
		}
		if err := f.Allocate(4<<20, 4<<20); err != nil {
			t.Fatal(err)
		}
		if n := host(); n < 5<<20 {
			t.Errorf("%s: after allocation of 4 MiB %d bytes are occupied", name, n)
		}
	}
}

func TestOpenRefusesOtherFiles(t *testing.T) {
	if _, err := dev.Open("/dev/null", dev.OpenOptions{}); err == nil {
		t.Error("a character device was opened")
	}
	if _, err := dev.OpenFile(t.TempDir(), dev.OpenOptions{ReadOnly: true}); err == nil {
		t.Error("a directory was opened")
	}
	if _, err := dev.Open(filepath.Join(t.TempDir(), "none"), dev.OpenOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func TestFaultRules(t *testing.T) {
	f := dev.NewFault(dev.NewMem(1 << 20))
	p := make([]byte, 4096)
	f.Add(dev.Rule{Ops: dev.OpWrite, Skip: 2, Times: 1})
	var got []bool
	for range 5 {
		_, err := f.WriteAt(p, 0)
		got = append(got, errors.Is(err, dev.ErrInjected))
	}
	if want := []bool{false, false, true, false, false}; !equal(got, want) {
		t.Errorf("third write of five: failed %v, want %v", got, want)
	}
	f.Clear()
	own := errors.New("own")
	f.Add(dev.Rule{Ops: dev.OpRead, Off: 8192, Len: 4096, Err: own})
	if _, err := f.ReadAt(p, 4096); err != nil {
		t.Errorf("read beside the range: %v", err)
	}
	for range 3 {
		if _, err := f.ReadAt(p, 12287); !errors.Is(err, own) {
			t.Errorf("read in the range: %v, want own error", err)
		}
	}
	f.Add(dev.Rule{Ops: dev.OpFlush | dev.OpDiscard})
	if f.Flush() == nil || f.Discard(0, 4096) == nil {
		t.Error("flush or discard went through")
	}
	if c, want := f.Counts(), (dev.OpCounts{Reads: 4, Writes: 5, Flushes: 1, Discards: 1}); c != want {
		t.Errorf("counts %+v, want %+v", c, want)
	}
}

func equal(a, b []bool) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

// TestCrashImages writes A, flushes, writes B over half of A and C elsewhere, and looks at what
// each mode leaves.
func TestCrashImages(t *testing.T) {
	log := dev.NewCrashLog()
	r, err := log.Wrap(dev.NewMem(64 << 10))
	if err != nil {
		t.Fatal(err)
	}
	fill := func(c byte, off, n int64) {
		if _, err := r.WriteAt(bytes.Repeat([]byte{c}, int(n)), off); err != nil {
			t.Fatal(err)
		}
	}
	at := func(m *dev.Mem, off int64) byte {
		var b [1]byte
		m.ReadAt(b[:], off)
		return b[0]
	}
	t0 := log.Now()
	fill('A', 0, 8192)
	t1 := log.Now()
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	fill('B', 4096, 4096)
	fill('C', 16384, 8192)
	t2 := log.Now()
	rng := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		cut  int
		mode dev.CrashMode
		want string // at 0, 4096, 16384
	}{
		{t0, dev.CrashKeep, "\x00\x00\x00"},
		{t1, dev.CrashKeep, "AA\x00"},
		{t1, dev.CrashLose, "\x00\x00\x00"},
		{t2, dev.CrashLose, "AA\x00"},
		{t2, dev.CrashKeep, "ABC"},
	} {
		m := log.Image(r, c.cut, c.mode, 512, rng)
		if got := string([]byte{at(m, 0), at(m, 4096), at(m, 16384)}); got != c.want {
			t.Errorf("cut %d, %v: %q, want %q", c.cut, c.mode, got, c.want)
		}
	}
	seen := map[string]bool{}
	tornInside := false
	for range 200 {
		m := log.Image(r, t2, dev.CrashRandom, 512, rng)
		seen[string([]byte{at(m, 0), at(m, 4096), at(m, 16384)})] = true
		m = log.Image(r, t2, dev.CrashTorn, 512, rng)
		if at(m, 0) != 'A' {
			t.Fatal("a flushed write was torn")
		}
		if at(m, 16384) != at(m, 16384+511) {
			t.Fatal("torn inside a unit")
		}
		tornInside = tornInside || at(m, 16384) != at(m, 16384+512)
	}
	if len(seen) != 4 || !tornInside {
		t.Errorf("random cuts gave %d of 4 outcomes, torn %v", len(seen), tornInside)
	}
	if ends := log.FlushEnds(); len(ends) != 1 || ends[0] <= t1 || ends[0] >= t2 {
		t.Errorf("flush ends %v, want one between %d and %d", ends, t1, t2)
	}
}

// TestCrashCursor compares the images of a cursor that goes through a random log with those made
// from the beginning for each cut, and both with what must be in them.
func TestCrashCursor(t *testing.T) {
	const size = 16 << 10
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 1))
		log := dev.NewCrashLog()
		r, err := log.Wrap(dev.NewMem(size))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			off := rng.Int64N(r.Size()/512) * 512
			n := min(r.Size()-off, 512*(1+rng.Int64N(6)))
			switch rng.IntN(8) {
			case 0:
				err = r.Flush()
			case 1:
				err = r.Discard(off, n)
			case 2:
				if r.Size() < 4*size {
					err = r.Resize(r.Size() + 4096)
				}
			default:
				_, err = r.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, int(n)), off)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		c := log.Cursor()
		for cut := range log.Now() {
			c.Seek(cut)
			for mode := dev.CrashKeep; mode <= dev.CrashOnly; mode++ {
				a := c.Image(r, mode, dev.Unit512, rand.New(rand.NewPCG(seed, uint64(cut))))
				b := log.Image(r, cut, mode, 512, rand.New(rand.NewPCG(seed, uint64(cut))))
				if a.Size() != b.Size() || !bytes.Equal(contents(a), contents(b)) {
					t.Fatalf("seed %d, cut %d, %v: the cursor's image differs", seed, cut, mode)
				}
			}
		}
		// Everything kept, at the end: the device itself.
		if !bytes.Equal(contents(c.Image(r, dev.CrashKeep, dev.Unit512, rng)), contents(r)) {
			t.Fatalf("seed %d: the last image is not the device", seed)
		}
	}
}

func contents(d dev.Device) []byte {
	p := make([]byte, d.Size())
	d.ReadAt(p, 0)
	return p
}

// TestCrashGrowth: growth is lost like a write, unless it was flushed or something lasts beyond it.
func TestCrashGrowth(t *testing.T) {
	log := dev.NewCrashLog()
	r, err := log.Wrap(dev.NewMem(4096))
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	if err := r.Resize(8192); err != nil {
		t.Fatal(err)
	}
	grown := log.Now()
	if _, err := r.WriteAt([]byte{1}, 8000); err != nil {
		t.Fatal(err)
	}
	written := log.Now()
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		cut  int
		mode dev.CrashMode
		want int64
	}{{grown, dev.CrashLose, 4096}, {grown, dev.CrashKeep, 8192}, {written, dev.CrashLose, 4096}, {log.Now(), dev.CrashLose, 8192}} {
		if got := log.Image(r, c.cut, c.mode, 512, rng).Size(); got != c.want {
			t.Errorf("cut %d, %v: %d bytes, want %d", c.cut, c.mode, got, c.want)
		}
	}
	// What a failed sync left behind is not made certain by the next one.
	if _, err := r.WriteAt([]byte{2}, 0); err != nil {
		t.Fatal(err)
	}
	r.Forget()
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := contents(log.Image(r, log.Now(), dev.CrashLose, 512, rng)); got[0] != 0 || got[8000] != 1 {
		t.Errorf("after Forget: bytes %d and %d, want 0 and 1", got[0], got[8000])
	}
}

// TestMemClones: clones and their origin do not see each other's changes, also while they are made.
func TestMemClones(t *testing.T) {
	m := dev.NewMem(64 << 10)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := byte(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			m.WriteAt(bytes.Repeat([]byte{i}, 8192), 4096)
			m.WriteZeroes(20000, 3000, i%2 == 0)
		}
	}()
	for range 500 {
		c := m.Clone()
		was := contents(c)
		d := c.Clone()
		if _, err := d.WriteAt([]byte("changed"), 5000); err != nil {
			t.Fatal(err)
		}
		d.Discard(0, d.Size())
		if !bytes.Equal(contents(c), was) {
			t.Fatal("a clone changed with its origin or its own clone")
		}
		if !bytes.Equal(contents(d), make([]byte, d.Size())) {
			t.Fatal("a discarded clone still holds something")
		}
	}
	close(stop)
	<-done
}

func TestCheckRange(t *testing.T) {
	for _, c := range []struct {
		off, n, size int64
		ok           bool
	}{
		{0, 0, 0, true}, {0, 10, 10, true}, {10, 0, 10, true}, {1, 10, 10, false}, {11, 0, 10, false},
		{-1, 1, 10, false}, {0, -1, 10, false}, {1 << 62, 1 << 62, 1<<63 - 1, false}, {1<<63 - 1, 1<<63 - 1, 1<<63 - 1, false},
	} {
		if err := dev.CheckRange(c.off, c.n, c.size); (err == nil) != c.ok {
			t.Errorf("CheckRange(%d, %d, %d) = %v", c.off, c.n, c.size, err)
		}
	}
}
