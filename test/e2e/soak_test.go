package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/layer"
)

var soakTime = flag.Duration("soak", 2*time.Minute, "how long TestSoak puts load on the daemon")

// TestSoak is a day of a host in two minutes: dozens of mounted containers that write, verify and
// delete files; clients that import, fork, commit and remove beside them; copies of busy
// containers compared with what was written; trims, growth and checks of the pool. In the end the
// daemon has the goroutines, descriptors, threads and memory that it had after the first round,
// and the pool holds what it held before.
//
//	go test ./test/e2e -run Soak -soak 8h -timeout 9h
func TestSoak(t *testing.T) {
	length, count := *soakTime, 24
	if testing.Short() {
		length, count = 10*time.Second, 8
	}
	b := newBox(t, "fstrim", "curl")
	b.watchdog.Reset(length + 3*boxLimit)
	b.config = "[pool]\nsize = \"1G\"\n[containers]\nbase_size = \"512M\"\n"
	b.start()
	b.archive("small.tar", ociImage{name: "small", layers: [][]byte{
		tarOf(t, file{name: "etc/"}, file{name: "etc/motd", body: []byte("low\n")}, file{name: "big", body: pattern(1, 256<<10)}),
		tarOf(t, file{name: "etc/"}, file{name: "etc/motd", body: []byte("high\n")}),
	}})
	b.mica("image", "import", b.path("small.tar"), "--name", "soak")
	before := b.figures()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, %v", seed, length)

	// The first round shows what the daemon takes; the rest must not take more.
	round := max(length/4, 5*time.Second)
	var first processFigures
	s := &soak{b: b, size: 1 << 30}
	for n := 0; time.Duration(n)*round < length; n++ {
		s.round(seed+uint64(n)*1000, count, round)
		if t.Failed() {
			return
		}
		now := b.figures()
		if now.used != before.used || now.devices != before.devices || now.containers != 0 {
			t.Fatalf("round %d: %+v, before %+v", n, now, before)
		}
		p := b.process()
		t.Logf("round %d: %d file operations, %d forks compared, %d client operations; daemon: %+v", n, s.files, s.forks, s.ops, p)
		if n == 0 {
			first = p
		} else if err := p.grown(first); err != nil {
			t.Errorf("round %d: %v", n, err)
		}
	}
	if s.files < count*10 || s.forks == 0 || s.ops == 0 {
		t.Errorf("%d file operations, %d forks, %d client operations: too little, the test tests little", s.files, s.forks, s.ops)
	}
	if out := b.mica("pool", "check"); !strings.Contains(out, "clean") {
		t.Errorf("pool check: %s", out)
	}
}

// processFigures is what the daemon uses while nothing is asked of it.
type processFigures struct{ Goroutines, Descriptors, Threads, Memory int }

// grown says what has grown beyond what rests in pools and caches. Threads are never given back by
// Go; what matters is that their number is bounded.
func (p processFigures) grown(first processFigures) error {
	const slack = 6
	switch {
	case p.Goroutines > first.Goroutines+slack:
		return fmt.Errorf("%d goroutines, %d after the first round", p.Goroutines, first.Goroutines)
	case p.Descriptors > first.Descriptors+slack:
		return fmt.Errorf("%d descriptors, %d after the first round", p.Descriptors, first.Descriptors)
	case p.Threads > first.Threads+100:
		return fmt.Errorf("%d threads, %d after the first round", p.Threads, first.Threads)
	case p.Memory > 2*first.Memory+(64<<20):
		return fmt.Errorf("%d bytes of memory, %d after the first round", p.Memory, first.Memory)
	}
	return nil
}

// process asks the daemon's metrics for its figures, when it has come to rest.
func (b *box) process() (least processFigures) {
	b.Helper()
	for n := range 20 {
		var p processFigures
		text := b.sh("curl", "-sS", "--unix-socket", filepath.Join(b.run, "mica.sock"), "http://mica/v1/metrics")
		for l := bufio.NewScanner(strings.NewReader(text)); l.Scan(); {
			name, value, _ := strings.Cut(l.Text(), " ")
			v, err := strconv.ParseFloat(value, 64)
			dst, ok := map[string]*int{"go_goroutines": &p.Goroutines, "process_open_fds": &p.Descriptors,
				"process_threads": &p.Threads, "mica_memory_bytes": &p.Memory}[name]
			if ok && err == nil {
				*dst = int(v)
			}
		}
		if p.Goroutines == 0 || p.Descriptors == 0 || p.Threads == 0 || p.Memory == 0 {
			b.Fatalf("metrics lack a figure: %+v\n%s", p, text)
		}
		if n == 0 || p.Goroutines < least.Goroutines || p.Descriptors < least.Descriptors {
			least = p
		}
		time.Sleep(100 * time.Millisecond)
	}
	return least
}

// A soak is the load and what it has done.
type soak struct {
	b     *box
	size  int64 // of the pool
	files int
	forks int
	ops   int
}

// round puts load on the daemon for a while and takes everything away again.
func (s *soak) round(seed uint64, count int, length time.Duration) {
	b := s.b
	rng := rand.New(rand.NewPCG(seed, 0))
	stop := make(chan struct{})
	var writers []*soakWriter
	for i := range count {
		w := &soakWriter{b: b, name: fmt.Sprintf("soak%d", i), rng: rand.New(rand.NewPCG(seed, uint64(i)+1)), known: map[string]soakFile{}}
		b.mica("create", "soak", w.name)
		w.dir = b.mount(w.name)
		writers = append(writers, w)
	}
	var wg sync.WaitGroup
	for _, w := range writers {
		wg.Go(func() { w.run(stop) })
	}
	churns := []*churn{newChurn(b, fmt.Sprintf("x%d", seed%1e6), seed), newChurn(b, fmt.Sprintf("y%d", seed%1e6), seed+1)}
	for _, c := range churns {
		wg.Go(func() { c.run(stop) })
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !b.Failed(); {
		w := writers[rng.IntN(len(writers))]
		switch rng.IntN(6) {
		case 0, 1:
			s.compareFork(w)
		case 2:
			b.sh("fstrim", w.dir)
		case 3:
			b.mica("pool", "trim")
		case 4:
			if s.size < 2<<30 {
				s.size += 64 << 20
				b.mica("pool", "grow", "--size", fmt.Sprint(s.size))
			}
		case 5:
			if out := b.mica("pool", "check"); !strings.Contains(out, "clean") {
				b.Errorf("pool check under load: %s", out)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	for _, w := range writers {
		w.verifyAll(w.dir)
		s.files += w.ops
		b.mica("umount", w.name)
		b.mica("rm", w.name)
	}
	for _, c := range churns {
		s.ops += c.ops
		for name := range c.containers {
			b.mica("rm", "--snapshots", name)
		}
		for name := range c.images {
			b.mica("image", "rm", name)
		}
	}
}

// compareFork copies a container while the others are busy, and compares the copy with what was
// written to it.
func (s *soak) compareFork(w *soakWriter) {
	b := s.b
	w.mu.Lock()
	defer w.mu.Unlock()
	name := w.name + "-copy"
	level := asJSON[api.ForkResult](b, "fork", w.name, name).Level
	if level != layer.LevelFileSystem {
		b.Errorf("fork of %s: level %q, want %q", w.name, level, layer.LevelFileSystem)
	}
	dir := b.mount(name)
	w.verifyAll(dir)
	b.mica("umount", name)
	b.mica("rm", name)
	s.forks++
}

// soakFile is what a file was made from.
type soakFile struct {
	seed uint64
	size int
}

// A soakWriter works on the files of one mounted container.
type soakWriter struct {
	b         *box
	name, dir string
	rng       *rand.Rand
	ops       int

	mu    sync.Mutex          // held over each operation
	known map[string]soakFile // guarded by mu
}

func (w *soakWriter) run(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		w.mu.Lock()
		err := w.step()
		w.mu.Unlock()
		if err != nil {
			w.b.Errorf("%s, operation %d: %v", w.name, w.ops, err)
			return
		}
		w.ops++
		time.Sleep(time.Duration(w.rng.IntN(60)) * time.Millisecond)
	}
}

// step writes, verifies or deletes a file. Few are kept, so that space comes and goes.
func (w *soakWriter) step() error {
	name := fmt.Sprintf("file%d", w.rng.IntN(6))
	path := filepath.Join(w.dir, name)
	old, there := w.known[name]
	switch k := w.rng.IntN(10); {
	case k < 5 || !there: // write a new one, in place or beside
		f := soakFile{seed: w.rng.Uint64(), size: 1 + w.rng.IntN(1<<20)}
		data := pattern(f.seed, f.size)
		if k%2 == 0 {
			if err := os.WriteFile(path+".new", data, 0o644); err != nil {
				return err
			}
			if err := os.Rename(path+".new", path); err != nil {
				return err
			}
		} else if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
		w.known[name] = f
		if k == 0 {
			return syncFile(path)
		}
		return nil
	case k < 8:
		return verifyFile(path, old)
	default:
		delete(w.known, name)
		return os.Remove(path)
	}
}

// verifyAll compares all files below dir with what is known of them.
func (w *soakWriter) verifyAll(dir string) {
	var list []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "file") {
			list = append(list, e.Name())
			err = errors.Join(err, verifyFile(filepath.Join(dir, e.Name()), w.known[e.Name()]))
		}
	}
	if err != nil {
		w.b.Errorf("%s: %v", dir, err)
	}
	if want := names(keys(w.known), func(s string) string { return s }); !slices.Equal(list, want) {
		w.b.Errorf("%s: files %v, want %v", dir, list, want)
	}
}

func keys[V any](m map[string]V) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	return list
}

func verifyFile(path string, f soakFile) error {
	// From the device, not from the page cache.
	if fd, err := os.Open(path); err == nil {
		fd.Sync()
		unix.Fadvise(int(fd.Fd()), 0, 0, unix.FADV_DONTNEED)
		fd.Close()
	}
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	want := pattern(f.seed, f.size)
	if len(got) != len(want) {
		return fmt.Errorf("%s: %d bytes, want %d", path, len(got), len(want))
	}
	if i := differsAt(got, want); i >= 0 {
		return fmt.Errorf("%s: byte %d of %d is %#x, want %#x", path, i, len(want), got[i], want[i])
	}
	return nil
}

func differsAt(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
