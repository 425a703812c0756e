package user

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/dev/signature"
	"mica/engine"
	"mica/thin"
)

// holdEnv makes the test binary open the pool in this directory, say so, and wait for its stdin.
const holdEnv = "MICA_TEST_HOLD_POOL"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdEnv); dir != "" {
		p, err := Open(ctx, Location{Dir: dir}, Options{})
		fmt.Println("opened", err)
		bufio.NewReader(os.Stdin).ReadString('\n')
		if err == nil {
			p.Close()
		}
		os.Exit(0)
	}
	if plan := os.Getenv(killEnv); plan != "" {
		fmt.Fprintln(os.Stderr, runKilled(plan))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func smallPool(t *testing.T) Location {
	t.Helper()
	l := Location{Dir: filepath.Join(shm(t), "pool")}
	must(t, Format(ctx, l, FormatOptions{DataBytes: 64 << 20}))
	return l
}

func TestFormatDirectory(t *testing.T) {
	l := smallPool(t)
	d, err := os.Stat(l.DataPath())
	must(t, err)
	m, err := os.Stat(l.MetadataPath())
	must(t, err)
	if d.Size() != 64<<20 || m.Size() != 2<<20 {
		t.Errorf("data %d bytes, metadata %d", d.Size(), m.Size())
	}
	f, err := dev.OpenFile(l.MetadataPath(), dev.OpenOptions{ReadOnly: true})
	must(t, err)
	if n, err := f.HostBytes(); err != nil || n < 2<<20 {
		t.Errorf("the metadata file occupies %d bytes (%v), want all of it", n, err)
	}
	f.Close()
	p, err := Open(ctx, l, Options{})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 40})
	must(t, err)
	write(t, h, fill(1, 3<<20), 1<<39)
	must(t, h.Flush())
	s, err := p.Status(ctx)
	must(t, err)
	if s.HostBytes < 3<<20 || s.HostBytes > 4<<20 || s.DataUsed != 48 || s.DataBlocks != 1024 {
		t.Errorf("status %+v", s)
	}
	must(t, h.Discard(0, 1<<40))
	must(t, p.Commit(ctx))
	if s, _ = p.Status(ctx); s.HostBytes > 64<<10 || s.DataUsed != 0 {
		t.Errorf("status after a discard of everything: %+v", s)
	}
	h.Close()
	must(t, p.Close())
	if _, err := os.Stat(filepath.Join(l.Dir, "pid")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pid file after close: %v", err)
	}
	if err := Format(ctx, l, FormatOptions{}); !errors.Is(err, thin.ErrExists) {
		t.Errorf("format over a pool: %v, want ErrExists", err)
	}
	must(t, Format(ctx, l, FormatOptions{Force: true}))
	p, err = Open(ctx, l, Options{})
	must(t, err)
	if devs, _ := p.Devices(ctx); len(devs) != 0 {
		t.Errorf("devices after a forced format: %v", devs)
	}
	must(t, p.Close())
}

func TestDefaultSizes(t *testing.T) {
	for _, c := range []struct{ data, bs, want int64 }{
		{1 << 20, 64 << 10, 2 << 20},
		{100 << 30, 64 << 10, 75 << 20},
		{1 << 40, 64 << 10, 768 << 20},
		{1 << 50, 64 << 10, thin.MaxMetadataBytes},
		{1 << 40, 1 << 30, 2 << 20},
	} {
		if got := MetadataBytes(c.data, c.bs); got != c.want {
			t.Errorf("metadata of %d bytes in blocks of %d: %d, want %d", c.data, c.bs, got, c.want)
		}
	}
}

func TestFormatRefusals(t *testing.T) {
	dir := shm(t)
	if err := Format(ctx, Location{Dir: dir, Data: "x"}, FormatOptions{}); err == nil {
		t.Error("a directory and a device were accepted")
	}
	if err := Format(ctx, Location{Data: filepath.Join(dir, "d")}, FormatOptions{}); err == nil {
		t.Error("a data device alone was accepted")
	}
	for _, bs := range []int64{1, 4096, 100 << 10, 2 << 30} {
		if err := Format(ctx, Location{Dir: filepath.Join(dir, "p")}, FormatOptions{BlockSize: bs}); err == nil {
			t.Errorf("block size %d was accepted", bs)
		}
	}
	if err := Format(ctx, Location{Dir: filepath.Join(dir, "none", "p")}, FormatOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("format below a missing directory: %v", err)
	}
	// A metadata file too small for its data: nothing is left behind.
	p := Location{Dir: filepath.Join(dir, "small")}
	if err := Format(ctx, p, FormatOptions{DataBytes: 1 << 40, MetadataBytes: 64 << 10}); err == nil {
		t.Error("16 metadata blocks for 2^24 data blocks were accepted")
	}
	if _, err := os.Stat(p.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed format left %s: %v", p.Dir, err)
	}
	same := filepath.Join(dir, "same")
	must(t, os.WriteFile(same, make([]byte, 4<<20), 0o600))
	if err := Format(ctx, Location{Data: same, Metadata: same}, FormatOptions{}); err == nil {
		t.Error("one file for data and metadata was accepted")
	}
	if _, err := Open(ctx, Location{Dir: dir}, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open of no pool: %v", err)
	}
	junk := Location{Data: same, Metadata: filepath.Join(dir, "junk")}
	must(t, os.WriteFile(junk.Metadata, fill('j', 4<<20), 0o600))
	if _, err := Open(ctx, junk, Options{}); !errors.Is(err, thin.ErrCorrupt) {
		t.Errorf("open of junk: %v, want ErrCorrupt", err)
	}
}

func TestShortDataDeviceIsRefused(t *testing.T) {
	l := smallPool(t)
	must(t, os.Truncate(l.DataPath(), 63<<20))
	if _, err := Open(ctx, l, Options{}); err == nil || !strings.Contains(err.Error(), "1024 blocks") {
		t.Errorf("open with a data file cut short: %v", err)
	}
}

func TestSecondOpenerIsRefused(t *testing.T) {
	l := smallPool(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdEnv+"="+l.Dir)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { in.Close(); cmd.Wait() }()
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line != "opened <nil>\n" {
		t.Fatalf("the holder says %q", line)
	}
	_, err = Open(ctx, l, Options{LockWait: 60 * time.Millisecond})
	if !errors.Is(err, dev.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", cmd.Process.Pid)) {
		t.Errorf("second opener: %v, want ErrLocked naming process %d", err, cmd.Process.Pid)
	}
	if err := Format(ctx, l, FormatOptions{Force: true}); !errors.Is(err, dev.ErrLocked) {
		t.Errorf("format of a pool in use: %v, want ErrLocked", err)
	}
	b, err := os.ReadFile(filepath.Join(l.Dir, "pid"))
	if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(cmd.Process.Pid) {
		t.Errorf("pid file %q, %v", b, err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Open(cancelled, l, Options{}); !errors.Is(err, context.Canceled) || !errors.Is(err, dev.ErrLocked) {
		t.Errorf("cancelled opener: %v", err)
	}
	// One that waits gets in when the holder dies, however it dies.
	got := make(chan error, 1)
	go func() {
		p, err := Open(ctx, l, Options{LockWait: 20 * time.Second})
		if err == nil {
			err = p.Close()
		}
		got <- err
	}()
	must(t, cmd.Process.Kill())
	must(t, <-got)
}

// loop makes a loop device of sizeBytes for the length of the test, or skips it.
func loop(t *testing.T, sizeBytes int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: block devices as pool devices need root for loop devices")
	}
	img := filepath.Join(shm(t), "img")
	must(t, os.WriteFile(img, nil, 0o600))
	must(t, os.Truncate(img, sizeBytes))
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

func TestBlockDevicePool(t *testing.T) {
	l := Location{Data: loop(t, 64<<20), Metadata: loop(t, 4<<20)}
	if out, err := exec.Command("mkfs.ext4", "-q", l.Data).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	if err := Format(ctx, l, FormatOptions{}); !errors.Is(err, signature.ErrFound) || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("format over ext4: %v, want ErrFound naming it", err)
	}
	if err := Format(ctx, Location{Data: l.Metadata, Metadata: l.Data}, FormatOptions{}); !errors.Is(err, signature.ErrFound) {
		t.Errorf("metadata over ext4: %v, want ErrFound", err)
	}
	must(t, Format(ctx, l, FormatOptions{Force: true, BlockSize: 128 << 10}))
	if err := Format(ctx, l, FormatOptions{}); err == nil {
		t.Error("a pool on block devices was formatted again")
	}
	p, err := Open(ctx, l, Options{})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 30})
	must(t, err)
	// The device held a file system: no byte of it may show.
	for i := range int64(300) {
		write(t, h, fill(1, 512), i*3<<20)
		if p := read(t, h, 128<<10, i*3<<20); string(p[512:]) != string(zeroBuf[:len(p)-512]) {
			t.Fatalf("old contents of the data device show in block %d", i)
		}
		must(t, h.WriteZeroes(i*3<<20, 4096, false))
		if i%100 == 99 {
			must(t, h.Discard(0, 1<<30))
			must(t, p.Commit(ctx))
		}
	}
	if _, err := Open(ctx, l, Options{LockWait: time.Millisecond}); !errors.Is(err, dev.ErrLocked) {
		t.Errorf("second opener: %v, want ErrLocked", err)
	}
	h.Close()
	must(t, p.Close())
	p, err = Open(ctx, l, Options{})
	must(t, err)
	if devs, _ := p.Devices(ctx); len(devs) != 1 {
		t.Errorf("devices after reopening: %v", devs)
	}
	must(t, p.Close())
	m, err := dev.Open(l.Metadata, dev.OpenOptions{ReadOnly: true})
	must(t, err)
	defer m.Close()
	if rep, err := thin.Check(m, thin.CheckOptions{}); err != nil || len(rep.Findings) > 0 {
		t.Errorf("check: %v, %+v", err, rep)
	}
}

func TestGrowFiles(t *testing.T) {
	l := smallPool(t)
	p, err := Open(ctx, l, Options{ErrorIfNoSpace: true})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 30})
	must(t, err)
	write(t, h, fill(1, 60<<20), 0)
	if err := p.GrowData(ctx, 32<<20); err == nil {
		t.Error("the data device was shrunk")
	}
	must(t, p.GrowData(ctx, 200<<20))
	must(t, p.GrowMetadata(ctx, 6<<20))
	if err := p.GrowMetadata(ctx, 4<<20); err == nil {
		t.Error("the metadata device was shrunk")
	}
	write(t, h, fill(2, 100<<20), 80<<20)
	wantBytes(t, h, 1, 60<<20, 0)
	wantBytes(t, h, 2, 100<<20, 80<<20)
	h.Close()
	must(t, p.Close())
	p, err = Open(ctx, l, Options{})
	must(t, err)
	s, err := p.Status(ctx)
	must(t, err)
	if s.DataBlocks != 3200 || s.MetaBlocks != 1536 || s.DataUsed != 2560 {
		t.Errorf("status after growth and reopening: %+v", s)
	}
	must(t, p.Close())
}

func TestTrimGivesBackWhatACrashLeft(t *testing.T) {
	l := smallPool(t)
	f, err := dev.OpenFile(l.DataPath(), dev.OpenOptions{})
	must(t, err)
	write(t, f, fill(9, 10<<20), 20<<20) // in no block of any device
	f.Close()
	p, err := Open(ctx, l, Options{})
	must(t, err)
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 64 << 20})
	must(t, err)
	write(t, h, fill(1, 1<<20), 0)
	n, err := p.Trim(ctx)
	must(t, err)
	if n != 10<<20 {
		t.Errorf("trim passed %d bytes down, want 10 MiB", n)
	}
	if n, _ = p.Trim(ctx); n != 0 {
		t.Errorf("second trim passed %d bytes down", n)
	}
	if s, _ := p.Status(ctx); s.HostBytes > 2<<20 {
		t.Errorf("the data file occupies %d bytes after a trim", s.HostBytes)
	}
	wantBytes(t, h, 1, 1<<20, 0)
	write(t, h, fill(2, 60<<20), 1<<20)
	h.Close()
	must(t, p.Close())
}

func TestOpenThinRefusals(t *testing.T) {
	tp := newPool(t, poolSize{}, Options{})
	tp.create(1)
	for _, c := range []struct {
		id   thin.DevID
		size int64
		want error
	}{
		{2, 1 << 20, thin.ErrNotFound},
		{1, 0, dev.ErrOutOfRange},
		{1, 1000, dev.ErrOutOfRange},
		{1, -512, dev.ErrOutOfRange},
		{1, 1<<63 - 512, dev.ErrOutOfRange},
	} {
		if _, err := tp.p.Open(ctx, c.id, engine.OpenOptions{SizeBytes: c.size}); !errors.Is(err, c.want) {
			t.Errorf("open of thin %d with %d bytes: %v, want %v", c.id, c.size, err, c.want)
		}
	}
	h := tp.thin(1, 1<<55)
	write(t, h, fill(1, 1<<20), 1<<54)
	wantBytes(t, h, 1, 1<<20, 1<<54)
	must(t, h.Discard(0, 1<<55))
	es, err := h.Extents(0, 1<<55)
	must(t, err)
	if len(es) != 1 || !es[0].Zero {
		t.Errorf("extents of an empty device of 2^55 bytes: %v", es)
	}
	if err := tp.p.Delete(ctx, 1); !errors.Is(err, engine.ErrInUse) {
		t.Errorf("delete of an open device: %v, want ErrInUse", err)
	}
	if err := tp.p.Close(); !errors.Is(err, engine.ErrInUse) {
		t.Errorf("close with an open device: %v, want ErrInUse", err)
	}
	if err := tp.p.CreateThin(ctx, 1); !errors.Is(err, thin.ErrExists) {
		t.Errorf("second creation: %v, want ErrExists", err)
	}
	if err := tp.p.CreateThin(ctx, 1<<24); err == nil {
		t.Error("a device id of 25 bits was accepted")
	}
	if err := tp.p.CreateSnap(ctx, 1<<24, 1); err == nil {
		t.Error("a snapshot id of 25 bits was accepted")
	}
	if err := tp.p.CreateSnap(ctx, 5, 99); !errors.Is(err, thin.ErrNotFound) {
		t.Errorf("snapshot of nothing: %v, want ErrNotFound", err)
	}
	if err := tp.p.CreateSnaps(ctx, []engine.SnapPair{{ID: 5, Origin: 1}, {ID: 1, Origin: 1}}); !errors.Is(err, thin.ErrExists) {
		t.Errorf("snapshots of which one exists: %v, want ErrExists", err)
	}
	if _, err := tp.p.Device(ctx, 5); !errors.Is(err, thin.ErrNotFound) {
		t.Errorf("the other one: %v, want ErrNotFound", err)
	}
	if err := tp.p.Delete(ctx, 77); !errors.Is(err, thin.ErrNotFound) {
		t.Errorf("delete of nothing: %v, want ErrNotFound", err)
	}
	if err := tp.p.SetTransactionID(ctx, 7, 8); err == nil {
		t.Error("a wrong transaction id was accepted")
	}
	h.Close()
	if _, err := h.WriteAt([]byte{1}, 0); !errors.Is(err, dev.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
}
