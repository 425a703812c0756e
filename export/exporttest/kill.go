package exporttest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// serve is a daemon as small as can be: it adopts or attaches "disk", served from a file, and says
// so. A line on its standard input says how to end: "detach", or "leave" as its end does.
//
//	suite-serve DIR FILE [inline]
func serve(d Driver, args []string) error {
	e, err := d.New(options(args[0]))
	if err != nil {
		return err
	}
	f, err := dev.Open(args[1], dev.OpenOptions{})
	if err != nil {
		return err
	}
	served := f.(device)
	if len(args) > 2 {
		served = inline{f, f.(dev.Zeroer), f.(dev.Descriptor).Descriptor()}
	}
	names, err := e.Survivors(context.Background())
	if err != nil {
		return err
	}
	how := "attached"
	var a export.Attachment
	if len(names) > 0 {
		how = "adopted"
		a, err = e.Adopt(context.Background(), names[0], served)
	} else {
		a, err = e.Attach(context.Background(), "disk", served, export.AttachOptions{})
	}
	if err != nil {
		return err
	}
	fmt.Println(how, a.Node())
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	if line == "detach\n" {
		if err := a.Detach(context.Background()); err != nil {
			return err
		}
	}
	return e.Close()
}

// inline makes a file or a disk a device that does everything at once, or tells where it is. What is
// on a disk is never in the page cache.
type inline struct {
	dev.Device
	dev.Zeroer
	fd int
}

func (d inline) PlaceRead(off, n int64) (dev.Place, bool) {
	unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED)
	return dev.Place{FD: d.fd, Off: off, Pinner: d}, true
}

func (d inline) Unpin(uint32) {}

func (d inline) TryFlush() error { return d.Flush() }

func (d inline) TryReadAt(p []byte, off int64) error {
	_, err := d.Device.ReadAt(p, off)
	return err
}

func (d inline) TryWriteAt(p []byte, off int64) error {
	_, err := d.Device.WriteAt(p, off)
	return err
}

// churn attaches and detaches until it is killed.
//
//	suite-churn DIR
func churn(d Driver, args []string) error {
	e, err := d.New(options(args[0]))
	if err != nil {
		return err
	}
	names, err := e.Survivors(context.Background())
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := e.Drop(context.Background(), name); err != nil {
			return err
		}
	}
	fmt.Println("attached", "several")
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for i := 0; ; i++ {
				a, err := e.Attach(context.Background(), fmt.Sprintf("c%d-%d", w, i), newDisk(1<<20), export.AttachOptions{})
				if err == nil {
					err = a.Detach(context.Background())
				}
				if err != nil {
					fmt.Fprintln(os.Stderr, "churn:", err)
					os.Exit(1)
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// A child is a server process.
type child struct {
	c   *exec.Cmd
	in  io.WriteCloser
	how string
	at  string // node
}

func start(t *testing.T, args ...string) *child {
	t.Helper()
	c := exec.Command("/proc/self/exe", args...)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ch := &child{c: c, in: in}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		ch.kill(t)
		t.Fatalf("server said %q: %v", line, err)
	}
	ch.how, ch.at, _ = strings.Cut(strings.TrimSpace(line), " ")
	return ch
}

// kill ends the server with SIGKILL. It must be dead soon, whatever its devices are doing.
func (c *child) kill(t *testing.T) {
	t.Helper()
	c.c.Process.Kill()
	done := make(chan struct{})
	go func() { c.c.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("server does not die of SIGKILL")
	}
}

func (c *child) finish(t *testing.T, how string) {
	t.Helper()
	io.WriteString(c.in, how+"\n")
	c.in.Close()
	if err := c.c.Wait(); err != nil {
		t.Fatalf("server: %v", err)
	}
}

// backing makes the file that a server serves.
func backing(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// A writer writes numbered blocks and reads them back, for as long as it may. It never sees an
// error, and everything that was acknowledged is there.
type writer struct {
	base   int64 // bytes
	blocks []uint64
	count  atomic.Uint64
	err    error
}

const writerBlock = 4096

// block is what block i holds after its write number n.
func block(b []byte, base int64, i int, n uint64) []byte {
	fill(b, n<<20|uint64(i))
	binary.LittleEndian.PutUint64(b, n)
	binary.LittleEndian.PutUint64(b[8:], uint64(base)+uint64(i))
	return b
}

func (w *writer) run(f *os.File, seed uint64, buf []byte, stop <-chan struct{}) {
	rnd := rand.New(rand.NewPCG(seed, uint64(w.base)))
	got, want := buf[:writerBlock], make([]byte, writerBlock)
	for {
		select {
		case <-stop:
			return
		default:
		}
		i := rnd.IntN(len(w.blocks))
		off := w.base + int64(i)*writerBlock
		switch rnd.IntN(8) {
		default:
			n := w.count.Add(1)
			if _, err := f.WriteAt(block(got, w.base, i, n), off); err != nil {
				w.err = fmt.Errorf("write: %w", err)
				return
			}
			w.blocks[i] = n
		case 0:
			if err := f.Sync(); err != nil {
				w.err = fmt.Errorf("fsync: %w", err)
				return
			}
		case 1, 2:
			if _, err := f.ReadAt(got, off); err != nil {
				w.err = fmt.Errorf("read: %w", err)
				return
			}
			if n := w.blocks[i]; n > 0 && !bytes.Equal(got, block(want, w.base, i, n)) {
				w.err = fmt.Errorf("block %d at %d: has number %d, want %d", i, off, binary.LittleEndian.Uint64(got), n)
				return
			}
		}
	}
}

// A load is some writers on one node.
type load struct {
	t       *testing.T
	writers []*writer
	files   []*os.File
	stop    chan struct{}
	wg      sync.WaitGroup
}

const (
	loadWriters = 6
	loadBlocks  = 64
	loadSize    = loadWriters * loadBlocks * writerBlock
)

func startLoad(t *testing.T, node string) *load {
	t.Helper()
	l := &load{t: t, stop: make(chan struct{})}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for i := range loadWriters {
		w := &writer{base: int64(i) * loadBlocks * writerBlock, blocks: make([]uint64, loadBlocks)}
		f := openNode(t, node, os.O_RDWR|unix.O_DIRECT)
		buf := aligned(t, writerBlock)
		l.writers, l.files = append(l.writers, w), append(l.files, f)
		l.wg.Go(func() { w.run(f, seed, buf, l.stop) })
	}
	return l
}

func (l *load) count() (n uint64) {
	for _, w := range l.writers {
		n += w.count.Load()
	}
	return n
}

// goesOn waits until every writer has come on.
func (l *load) goesOn() {
	l.t.Helper()
	var was []uint64
	for _, w := range l.writers {
		was = append(was, w.count.Load())
	}
	deadline := time.Now().Add(time.Minute)
	for i, w := range l.writers {
		for w.count.Load() < was[i]+3 {
			if time.Now().After(deadline) {
				l.t.Fatalf("the writer at %d does not come on: %d writes, %v", w.base, w.count.Load(), w.err)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// end stops the writers and closes their files. path holds what must have arrived.
func (l *load) end(path string) {
	l.t.Helper()
	close(l.stop)
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		l.t.Fatal("writers hang")
	}
	for _, f := range l.files {
		f.Close()
	}
	b, err := os.ReadFile(path)
	if err != nil {
		l.t.Fatal(err)
	}
	want := make([]byte, writerBlock)
	for _, w := range l.writers {
		if w.err != nil {
			l.t.Errorf("writer at %d, after %d writes: %v", w.base, w.count.Load(), w.err)
			continue
		}
		for i, n := range w.blocks {
			if n > 0 && !bytes.Equal(b[w.base+int64(i)*writerBlock:][:writerBlock], block(want, w.base, i, n)) {
				l.t.Errorf("block %d of the writer at %d is not what was acknowledged last", i, w.base)
			}
		}
	}
	l.t.Logf("%d writes", l.count())
}

// restarts runs servers one after the other under load; each is ended by end.
func restarts(t *testing.T, d Driver, n int, mode string, end func(c *child)) {
	dir := ground(t, d).Dir
	restartsOn(t, d, dir, backing(t, dir, loadSize), n, mode, end)
}

// restartsOn serves a file or a disk.
func restartsOn(t *testing.T, d Driver, dir, file string, n int, mode string, end func(c *child)) {
	args := []string{"suite-serve", dir, file}
	if mode != "" {
		args = append(args, mode)
	}
	c := start(t, args...)
	if c.how != "attached" {
		t.Fatalf("first server: %s", c.how)
	}
	node, link := c.at, filepath.Join(options(dir).Links(), "disk")
	l := startLoad(t, link)
	for i := range n {
		l.goesOn()
		time.Sleep(time.Duration(20+rand.IntN(200)) * time.Millisecond)
		end(c)
		if missing(link) {
			t.Errorf("restart %d: the link is gone", i)
		}
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		c = start(t, args...)
		if c.how != "adopted" || c.at != node {
			t.Fatalf("restart %d: %s %s, want adopted %s", i, c.how, c.at, node)
		}
	}
	l.goesOn()
	l.end(file)
	c.finish(t, "detach")
	if !missing(link) {
		t.Error("the link is still there after the detach")
	}
}

// testKill kills the server in the middle of verified writes, again and again. MICA_DISK names a block
// device that may be overwritten, to serve that too.
func testKill(t *testing.T, d Driver) {
	n := number("MICA_KILLS", 5)
	t.Run("workers", func(t *testing.T) { restarts(t, d, n, "", func(c *child) { c.kill(t) }) })
	t.Run("inline", func(t *testing.T) { restarts(t, d, n, "inline", func(c *child) { c.kill(t) }) })
	if disk := os.Getenv("MICA_DISK"); disk != "" {
		t.Run("disk", func(t *testing.T) {
			restartsOn(t, d, ground(t, d).Dir, disk, n, "inline", func(c *child) { c.kill(t) })
		})
	}
}

// testRestart ends servers in order, under load.
func testRestart(t *testing.T, d Driver) {
	restarts(t, d, number("MICA_KILLS", 5), "inline", func(c *child) { c.finish(t, "leave") })
}

// testKillIdle: a device that nobody uses survives as well, and is adopted by a process that finds
// it under its name.
func testKillIdle(t *testing.T, d Driver) {
	r := &rig{t: t, d: d, o: ground(t, d)}
	file := backing(t, r.o.Dir, 1<<20)
	c := start(t, "suite-serve", r.o.Dir, file)
	c.kill(t)
	r.open()
	l, err := r.e.Survivors(within(t, time.Minute))
	if err != nil || len(l) != 1 || l[0] != "disk" {
		t.Fatalf("survivors %q, %v", l, err)
	}
	if _, err := r.e.Attach(within(t, time.Minute), "disk", newDisk(1<<20), export.AttachOptions{}); !errors.Is(err, export.ErrExists) {
		t.Errorf("attach a survivor's name: %v", err)
	}
	if _, err := r.e.Adopt(within(t, time.Minute), "disk", newDisk(1<<19)); err == nil {
		t.Error("adopted with a device that is too short")
	}
	m := newDisk(1 << 20)
	a, err := r.e.Adopt(within(t, time.Minute), "disk", m)
	if err != nil {
		t.Fatal(err)
	}
	f := openNode(t, a.Link(), os.O_RDWR)
	if _, err := f.WriteAt([]byte("adopted"), 512); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	f.Close()
	same(t, "adopted", contents(t, m, 512, 7), []byte("adopted"))
	r.detach(a)
	if left := d.Left(r.o.Dir); len(left) > 0 {
		t.Errorf("left in the kernel: %q", left)
	}
}

// testDrop: a survivor that nobody can serve is dropped: what waits for it fails, and it is gone.
func testDrop(t *testing.T, d Driver) {
	r := &rig{t: t, d: d, o: ground(t, d)}
	file := backing(t, r.o.Dir, 1<<20)
	c := start(t, "suite-serve", r.o.Dir, file)
	f := openNode(t, c.at, os.O_RDWR|unix.O_DIRECT)
	b := aligned(t, 4096)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	c.kill(t)
	waits := make(chan error, 1)
	go func() {
		_, err := f.WriteAt(b, 4096)
		waits <- err
	}()
	select {
	case err := <-waits:
		t.Errorf("a write without a server: %v; want it to wait", err)
	case <-time.After(300 * time.Millisecond):
	}
	r.open()
	if err := r.e.Drop(within(t, time.Minute), "disk"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-waits:
		if err == nil {
			t.Error("a write to what was dropped succeeded")
		}
	case <-time.After(time.Minute):
		t.Fatal("a write to what was dropped still waits")
	}
	if !missing(filepath.Join(r.o.Links(), "disk")) {
		t.Error("the link is still there")
	}
	f.Close()
	if l, err := r.e.Survivors(within(t, time.Minute)); err != nil || len(l) > 0 {
		t.Errorf("survivors %q, %v", l, err)
	}
	for end := time.Now().Add(20 * time.Second); len(d.Left(r.o.Dir)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("left in the kernel: %q", d.Left(r.o.Dir))
		}
	}
}

// testChurn kills a server that attaches and detaches, wherever it is. The next one starts, and
// what is left can be dropped.
func testChurn(t *testing.T, d Driver) {
	dir := ground(t, d).Dir
	for range number("MICA_KILLS", 5) {
		c := start(t, "suite-churn", dir)
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		c.kill(t)
	}
	r := &rig{t: t, d: d, o: options(dir)}
	r.open()
	l, err := r.e.Survivors(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range l {
		if err := r.e.Drop(within(t, time.Minute), name); err != nil {
			t.Error(err)
		}
	}
	for end := time.Now().Add(20 * time.Second); len(d.Left(dir)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("left in the kernel: %q", d.Left(dir))
		}
	}
	if links, _ := filepath.Glob(filepath.Join(r.o.Links(), "c*")); len(links) > 0 {
		t.Errorf("links are left: %q", links)
	}
}
