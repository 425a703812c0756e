package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mica/dev"
	"mica/export"

	"golang.org/x/sys/unix"
)

// A recorder notes the zeroing that reaches a device, and its block size.
type recorder struct {
	*dev.Mem
	block int64

	mu    sync.Mutex
	zeros []zeroed // guarded by mu
}

type zeroed struct {
	off, n int64
	keep   bool
}

func (r *recorder) BlockSize() int64 { return r.block }

func (r *recorder) WriteZeroes(off, n int64, keep bool) error {
	r.mu.Lock()
	r.zeros = append(r.zeros, zeroed{off, n, keep})
	r.mu.Unlock()
	return r.Mem.WriteZeroes(off, n, keep)
}

func (r *recorder) take() []zeroed {
	r.mu.Lock()
	defer r.mu.Unlock()
	z := r.zeros
	r.zeros = nil
	return z
}

func TestFallocateModes(t *testing.T) {
	s := newSetup(t, false)
	r := &recorder{Mem: dev.NewMem(8 << 20), block: 64 << 10}
	s.attach("fa", r, export.AttachOptions{})
	// The file below the loop device: everything that the kernel passes on.
	f, err := os.OpenFile(filepath.Join(s.dir, "run", "fuse", "fa", "disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ones := bytes.Repeat([]byte{0xff}, 1<<20)
	for _, c := range []struct {
		mode   uint32
		off, n int64
		want   error
		zeros  []zeroed
	}{
		{0x03, 4096, 65536, nil, []zeroed{{4096, 65536, false}}},
		{0x11, 4096, 65536, nil, []zeroed{{4096, 65536, true}}},
		{0x10, 4096, 65536, nil, []zeroed{{4096, 65536, true}}},
		{0x03, 1000, 3, nil, []zeroed{{1000, 3, false}}},
		{0x03, 8<<20 - 512, 4096, nil, []zeroed{{8<<20 - 512, 512, false}}},
		{0x03, 9 << 20, 4096, nil, nil},
		{0x10, 8<<20 - 512, 4096, unix.EFBIG, nil},
		{0x10, 9 << 20, 4096, unix.EFBIG, nil},
		{0x00, 0, 4096, unix.EOPNOTSUPP, nil},
		{0x01, 0, 4096, unix.EOPNOTSUPP, nil},
		{0x08, 0, 65536, unix.EOPNOTSUPP, nil}, // collapse
	} {
		if _, err := f.WriteAt(ones, 0); err != nil {
			t.Fatal(err)
		}
		r.take()
		err := unix.Fallocate(int(f.Fd()), c.mode, c.off, c.n)
		if !errors.Is(err, c.want) {
			t.Errorf("mode %#x [%d, +%d): %v, want %v", c.mode, c.off, c.n, err, c.want)
		}
		if got := r.take(); fmt.Sprint(got) != fmt.Sprint(c.zeros) {
			t.Errorf("mode %#x [%d, +%d): device zeroed %v, want %v", c.mode, c.off, c.n, got, c.zeros)
		}
		if c.want == nil && c.off < 1<<20 {
			got := make([]byte, c.n+2)
			if _, err := f.ReadAt(got, c.off-1); err != nil {
				t.Fatal(err)
			}
			if got[0] != 0xff || got[c.n+1] != 0xff || !allZero(got[1:c.n+1]) {
				t.Errorf("mode %#x [%d, +%d): contents wrong", c.mode, c.off, c.n)
			}
		}
	}
	if _, err := f.WriteAt([]byte{1}, 8<<20); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write behind the end: %v, want ENOSPC", err)
	}
	if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate: %v, want EPERM", err)
	}
	if n, err := f.ReadAt(make([]byte, 100), 8<<20-10); n != 10 {
		t.Errorf("read over the end: %d, %v; want 10", n, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Bsize != 64<<10 {
		t.Errorf("statfs: block size %d, %v; want the pool's", st.Bsize, err)
	}
	if l, err := os.ReadDir(filepath.Join(s.dir, "run", "fuse", "fa")); err != nil || len(l) != 1 || l[0].Name() != "disk" {
		t.Errorf("directory: %v, %v", l, err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "run", "fuse", "fa", "nothing")); !os.IsNotExist(err) {
		t.Errorf("stat of nothing: %v", err)
	}
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func TestSeek(t *testing.T) {
	s := newSetup(t, false)
	d := dev.NewMem(4 << 30)
	s.attach("seek", d, export.AttachOptions{})
	for _, off := range []int64{1 << 20, 3 << 30} {
		if _, err := d.WriteAt(bytes.Repeat([]byte{1}, 8192), off); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(filepath.Join(s.dir, "run", "fuse", "seek", "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, c := range []struct {
		off    int64
		whence int
		want   int64
		err    error
	}{
		{0, unix.SEEK_DATA, 1 << 20, nil},
		{0, unix.SEEK_HOLE, 0, nil},
		{1<<20 + 1, unix.SEEK_DATA, 1<<20 + 1, nil},
		{1<<20 + 1, unix.SEEK_HOLE, 1<<20 + 8192, nil},
		{2 << 20, unix.SEEK_DATA, 3 << 30, nil},
		{3<<30 + 8192, unix.SEEK_DATA, 0, unix.ENXIO},
		{3<<30 + 8192, unix.SEEK_HOLE, 3<<30 + 8192, nil},
		{4 << 30, unix.SEEK_HOLE, 0, unix.ENXIO},
	} {
		got, err := unix.Seek(int(f.Fd()), c.off, c.whence)
		if !errors.Is(err, c.err) || err == nil && got != c.want {
			t.Errorf("seek %d, whence %d: %d, %v; want %d, %v", c.off, c.whence, got, err, c.want, c.err)
		}
	}
}

func TestDiscards(t *testing.T) {
	s := newSetup(t, false)
	needTool(t, "mkfs.ext4", "fstrim", "blkdiscard")
	r := &recorder{Mem: dev.NewMem(1 << 30), block: 256 << 10}
	a := s.attach("discard", r, export.AttachOptions{})
	queue := func(name string) string {
		b, err := os.ReadFile("/sys/block/" + filepath.Base(a.Node()) + "/queue/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	if g := queue("discard_granularity"); g != strconv.Itoa(256<<10) {
		t.Errorf("discard granularity %s, want the pool's block size", g)
	}
	run(t, "mkfs.ext4", "-q", a.Node())
	mnt := filepath.Join(s.dir, "mnt")
	mount(t, a.Node(), mnt)
	full, _ := r.HostBytes()
	if err := writeSync(filepath.Join(mnt, "big"), 100<<20); err != nil {
		t.Fatal(err)
	}
	used, _ := r.HostBytes()
	if used < full+100<<20 {
		t.Fatalf("%d bytes held, want 100 MiB more than %d", used, full)
	}
	if err := os.Remove(filepath.Join(mnt, "big")); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	r.take()
	run(t, "fstrim", mnt)
	var punched int64
	for _, z := range r.take() {
		if z.keep {
			t.Errorf("fstrim zeroed and kept [%d, +%d)", z.off, z.n)
		}
		punched += z.n
	}
	if punched < 100<<20 {
		t.Errorf("fstrim reached the device with %d bytes, want at least 100 MiB", punched)
	}
	if now, _ := r.HostBytes(); now > full+10<<20 {
		t.Errorf("%d bytes held after fstrim, %d before the file", now, full)
	}
	unmountFS(t, mnt)

	ones := bytes.Repeat([]byte{0xff}, 4<<20)
	for _, c := range []struct {
		args []string
		keep bool
	}{
		{[]string{"-z"}, true}, // BLKZEROOUT keeps blocks
		{nil, false},
	} {
		if _, err := r.WriteAt(ones, 0); err != nil {
			t.Fatal(err)
		}
		r.take()
		run(t, append(append([]string{"blkdiscard", "-f"}, c.args...), "-o", "1048576", "-l", "1048576", a.Node())...)
		z := r.take()
		if len(z) == 0 || z[0].keep != c.keep {
			t.Errorf("blkdiscard %v: device zeroed %v", c.args, z)
		}
		got := make([]byte, 4<<20)
		if _, err := r.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !allZero(got[1<<20:2<<20]) || !bytes.Equal(got[:1<<20], ones[:1<<20]) || !bytes.Equal(got[2<<20:], ones[2<<20:]) {
			t.Errorf("blkdiscard %v: wrong bytes are zero", c.args)
		}
	}
}

func TestReadOnly(t *testing.T) {
	s := newSetup(t, false)
	d := dev.NewMem(16 << 20)
	f := dev.NewFault(d)
	a := s.attach("ro", f, export.AttachOptions{ReadOnly: true})
	if b, _ := os.ReadFile("/sys/block/" + filepath.Base(a.Node()) + "/ro"); string(b) != "1\n" {
		t.Errorf("sysfs says ro=%q", b)
	}
	if out, err := tryRun("dd", "if=/dev/zero", "of="+a.Node(), "bs=4096", "count=1", "conv=fsync"); err == nil {
		t.Errorf("written: %s", out)
	}
	if out, err := tryRun("dd", "if=/dev/zero", "of="+filepath.Join(s.dir, "run", "fuse", "ro", "disk"), "bs=4096", "count=1", "conv=notrunc"); err == nil {
		t.Errorf("written: %s", out)
	}
	if out, err := tryRun("blkdiscard", "-f", a.Node()); err == nil {
		t.Errorf("discarded: %s", out)
	}
	if n := f.Counts(); n.Writes+n.Zeroes+n.Discards != 0 {
		t.Errorf("changes reached the device: %+v", n)
	}
}

// A vast device counts the bytes that it is asked to zero, and leaves large ranges alone.
type vast struct {
	*dev.Mem
	zeroed atomic.Int64
}

func (v *vast) WriteZeroes(off, n int64, keep bool) error {
	v.zeroed.Add(n)
	if n > 64<<20 {
		return dev.CheckRange(off, n, v.Size())
	}
	return v.Mem.WriteZeroes(off, n, keep)
}

func TestLargeDevices(t *testing.T) {
	s := newSetup(t, false)
	needTool(t, "mkfs.ext4")
	for _, size := range []int64{1 << 40, 16<<40 - 4096, 16 << 40, 64 << 40} {
		t.Run(fmt.Sprintf("%d", size), func(t *testing.T) {
			d := &vast{Mem: dev.NewMem(size)}
			a := s.attach("large", d, export.AttachOptions{})
			f, err := os.OpenFile(a.Node(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			end, err := f.Seek(0, 2)
			if err != nil || end != size {
				t.Fatalf("node has %d bytes, %v; want %d", end, err, size)
			}
			for _, off := range []int64{0, size/2 + 512, size - 4096} {
				want := []byte(fmt.Sprintf("at %020d", off))
				if _, err := f.WriteAt(want, off); err != nil {
					t.Fatal(err)
				}
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("device holds %q at %d, %v", got, off, err)
				}
			}
			f.Close()
			if size == 1<<40 {
				run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", a.Node())
				mnt := filepath.Join(s.dir, "mnt")
				mount(t, a.Node(), mnt)
				if err := writeSync(filepath.Join(mnt, "f"), 1<<20); err != nil {
					t.Fatal(err)
				}
				unmountFS(t, mnt)
			}
			d.zeroed.Store(0)
			run(t, "blkdiscard", "-f", a.Node())
			if n := d.zeroed.Load(); n != size {
				t.Errorf("discard of everything reached the device with %d bytes of %d", n, size)
			}
			if err := a.Detach(ctx(t)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestGrow(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) { testGrow(t, fs) })
	}
}

// canResizeExt4 reports whether ext4 lets us grow it while it is mounted: CAP_SYS_RESOURCE.
func canResizeExt4() bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	return unix.Capget(&h, &d[0]) == nil && d[unix.CAP_SYS_RESOURCE/32].Effective&(1<<(unix.CAP_SYS_RESOURCE%32)) != 0
}

// awaitFree waits until nobody has a node mounted: a process elsewhere that made itself a mount
// namespace has copies of our mounts for a moment.
func awaitFree(t *testing.T, node string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		fd, err := unix.Open(node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return
		}
		if err != unix.EBUSY || time.Now().After(deadline) {
			t.Fatalf("%s is not free: %v", node, err)
		}
	}
}

func testGrow(t *testing.T, fs string) {
	s := newSetup(t, true)
	needTool(t, "mkfs.ext4", "resize2fs", "mkfs.xfs", "xfs_growfs")
	const first = 320
	d := dev.NewMem(first << 20)
	a := s.attach("grow", d, export.AttachOptions{})
	run(t, "mkfs."+fs, "-q", a.Node())
	mnt := filepath.Join(s.dir, "mnt")
	mount(t, a.Node(), mnt)
	for _, mib := range []int64{400, 512, 512, 600} {
		if err := d.Resize(mib << 20); err != nil {
			t.Fatal(err)
		}
		if err := a.Resize(ctx(t)); err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile("/sys/block/" + filepath.Base(a.Node()) + "/size"); string(b) != fmt.Sprintf("%d\n", mib<<11) {
			t.Fatalf("node has %q sectors, want %d", b, mib<<11)
		}
		switch {
		case fs == "xfs":
			run(t, "xfs_growfs", mnt)
		case canResizeExt4():
			run(t, "resize2fs", a.Node())
		default:
			t.Log("no CAP_SYS_RESOURCE: ext4 is grown unmounted")
			unmountFS(t, mnt)
			awaitFree(t, a.Node())
			run(t, "e2fsck", "-fp", a.Node())
			run(t, "resize2fs", a.Node())
			mount(t, a.Node(), mnt)
		}
		if err := writeSync(filepath.Join(mnt, "f"), 16<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeSync(filepath.Join(mnt, "f"), (first+64)<<20); err != nil {
		t.Fatalf("fill what was added: %v", err)
	}
	if err := d.Resize(first << 20); err != nil {
		t.Fatal(err)
	}
	if err := a.Resize(ctx(t)); err == nil {
		t.Fatal("shrunk")
	}
	if err := d.Resize(600 << 20); err != nil {
		t.Fatal(err)
	}
	// The next server knows the size.
	if err := s.e.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.e, err = New(s.o); err != nil {
		t.Fatal(err)
	}
	if err := d.Resize(700 << 20); err != nil {
		t.Fatal(err)
	}
	if a, err = s.e.Adopt(ctx(t), "grow", d); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile("/sys/block/" + filepath.Base(a.Node()) + "/size"); string(b) != fmt.Sprintf("%d\n", 700<<11) {
		t.Fatalf("adopted node has %q sectors, want %d", b, 700<<11)
	}
	unmountFS(t, mnt)
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
}

func TestSectorSize(t *testing.T) {
	s := newSetup(t, false)
	a := s.attach("4k", dev.NewMem(16<<20), export.AttachOptions{SectorSize: 4096})
	if b, _ := os.ReadFile("/sys/block/" + filepath.Base(a.Node()) + "/queue/logical_block_size"); string(b) != "4096\n" {
		t.Errorf("logical block size %q", b)
	}
}

// TestErrors: what a device says is what the application sees.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want unix.Errno
		file unix.Errno // on the file itself
	}{
		{"no space", fmt.Errorf("thin 7: %w", dev.ErrNoSpace), unix.ENOSPC, unix.ENOSPC},
		{"closed", dev.ErrClosed, unix.EIO, unix.EIO},
		{"medium", unix.EIO, unix.EIO, unix.EIO},
		{"again", unix.EAGAIN, unix.EIO, unix.EIO},
		{"unknown", errors.New("thing"), unix.EIO, unix.EIO},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, fast := range []bool{false, true} {
				s := newSetup(t, false)
				f := dev.NewFault(dev.NewMem(16 << 20))
				var d dev.Device = f
				if fast {
					d = inline(f)
				}
				a, err := s.e.Attach(ctx(t), "err", d, export.AttachOptions{})
				if err != nil {
					t.Fatal(err)
				}
				node, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
				if err != nil {
					t.Fatal(err)
				}
				file, err := os.OpenFile(filepath.Join(s.dir, "run", "fuse", "err", "disk"), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				buf, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				if err != nil {
					t.Fatal(err)
				}
				f.Add(dev.Rule{Err: c.err})
				check := func(what string, err error, want unix.Errno) {
					t.Helper()
					if !errors.Is(err, want) {
						t.Errorf("fast=%v: %s: %v, want %v", fast, what, err, want)
					}
				}
				_, err = node.ReadAt(buf, 0)
				check("read node", err, c.want)
				_, err = node.WriteAt(buf, 0)
				check("write node", err, c.want)
				check("sync node", node.Sync(), unix.EIO)
				_, err = file.ReadAt(buf, 0)
				check("read file", err, c.file)
				_, err = file.WriteAt(buf, 0)
				check("write file", err, c.file)
				check("punch file", unix.Fallocate(int(file.Fd()), 3, 0, 4096), c.file)
				check("sync file", file.Sync(), c.file)
				f.Clear()
				if _, err := node.WriteAt(buf, 0); err != nil {
					t.Errorf("after the fault: %v", err)
				}
				unix.Munmap(buf)
				node.Close()
				file.Close()
				if err := a.Detach(ctx(t)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestWaitingWrites: writes that wait for space leave places for reads, and do not take more
// than half; what does not fit is refused at once if the device can refuse.
func TestWaitingWrites(t *testing.T) {
	s := newSetup(t, false)
	d := &waitsForSpace{Mem: dev.NewMem(256 << 20), gate: make(chan struct{})}
	a := s.attach("full", d, export.AttachOptions{})
	file, err := os.OpenFile(filepath.Join(s.dir, "run", "fuse", "full", "disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var wg sync.WaitGroup
	errs := make(chan error, 400)
	for i := range 400 {
		wg.Go(func() {
			_, err := file.WriteAt(make([]byte, 4096), int64(i)*4096)
			errs <- err
		})
	}
	refused := 0
	for range 400 - maxBackground/2 {
		select {
		case err := <-errs:
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("write: %v, want ENOSPC", err)
			}
			refused++
		case <-time.After(20 * time.Second):
			t.Fatalf("%d writes refused, want %d", refused, 400-maxBackground/2)
		}
	}
	// Reads go on.
	node, err := os.OpenFile(a.Node(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	buf, _ := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if _, err := node.ReadAt(buf, 1<<20); err != nil {
		t.Fatal(err)
	}
	node.Close()
	close(d.gate)
	wg.Wait()
	for range maxBackground / 2 {
		if err := <-errs; err != nil {
			t.Fatalf("a write that waited: %v", err)
		}
	}
}

type waitsForSpace struct {
	*dev.Mem
	gate chan struct{}
}

func (d *waitsForSpace) WriteAt(p []byte, off int64) (int, error) {
	<-d.gate
	return d.Mem.WriteAt(p, off)
}

func (d *waitsForSpace) WriteAtNoWait(p []byte, off int64) (int, error) {
	select {
	case <-d.gate:
		return d.Mem.WriteAt(p, off)
	default:
		return 0, dev.ErrNoSpace
	}
}

// TestIdle: an idle device has no threads and no buffers, and wakes up.
func TestIdle(t *testing.T) {
	needRoot(t)
	s := &setup{t: t, dir: shmDir(t)}
	s.o = Options{RunDir: filepath.Join(s.dir, "run"), HelperCommand: []string{"/proc/self/exe", "role-helper"},
		Logger: quiet(), IdleAfter: 50 * time.Millisecond}
	var err error
	if s.e, err = New(s.o); err != nil {
		t.Fatal(err)
	}
	defer s.e.Close()
	const devices = 20
	list := make([]export.Attachment, devices)
	for i := range list {
		list[i] = s.attach(fmt.Sprint("idle", i), dev.NewMem(16<<20), export.AttachOptions{})
	}
	for round := range 20 {
		if n := settled(0, func() int { return devices - s.e.park.idle() }); n != 0 {
			t.Fatalf("round %d: %d devices do not get idle", round, n)
		}
		for _, a := range list {
			sv := a.(*attachment).s
			sv.mu.Lock()
			running := sv.running
			sv.mu.Unlock()
			if running != 0 {
				t.Fatalf("idle device has %d threads", running)
			}
		}
		if n := settled(spareHands, s.e.crew.threads); n > spareHands {
			t.Fatalf("round %d: no device is busy, and there are %d threads, want at most %d", round, n, spareHands)
		}
		if n := settled(spareHands+spareSmall, s.e.crew.bufs.held); n > spareHands+spareSmall {
			t.Fatalf("round %d: no device is busy, and there are %d buffers, want at most %d", round, n, spareHands+spareSmall)
		}
		// Requests just while devices fall asleep, too.
		var wg sync.WaitGroup
		for _, a := range list {
			wg.Go(func() {
				f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				buf, _ := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				defer unix.Munmap(buf)
				for i := range 3 {
					if _, err := f.WriteAt(buf, int64(i)<<20); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Duration(rand.IntN(70)) * time.Millisecond)
				}
			})
		}
		wg.Wait()
	}
}

// TestNoGarbage: a mapped 4 KiB request allocates nothing.
func TestNoGarbage(t *testing.T) {
	s := newSetup(t, false)
	d := dev.NewMem(16 << 20)
	a := s.attach("allocs", inline(d), export.AttachOptions{})
	f, err := os.OpenFile(a.Node(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	fd := int(f.Fd())
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"read", func() error { _, err := unix.Pread(fd, buf, 8192); return err }},
		{"write", func() error { _, err := unix.Pwrite(fd, buf, 8192); return err }},
	} {
		n := testing.AllocsPerRun(2000, func() {
			if err := c.do(); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations a request", c.name, n)
		}
	}
}

// threads counts the threads that are there.
func (c *crew) threads() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.made
}

// held counts buffers, used or not.
func (p *buffers) held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.out
	for _, l := range p.free {
		n += len(l)
	}
	return n
}
