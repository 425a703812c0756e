package power

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export"
	"mica/export/fuse"
	"mica/internal/trial"
	"mica/layer/helper"
	"mica/thin"
)

// needRoot skips a test that cannot run here, loudly.
func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting, FUSE and loop devices need root")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here: %v", p, err)
		}
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed (scripts/setup.sh)", tool)
		}
	}
}

func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "mica-power-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

// A fsRig is a file system on a thin device of a recorded pool.
type fsRig struct {
	t          testing.TB
	fs         string
	size       int64
	dir        string
	log        *dev.CrashLog
	meta, data *dev.Recorder
	made       int // clock when the file system was made
	files      *fileHistory
	snaps      []fsSnap
}

// A fsSnap is a snapshot taken while the load was running.
type fsSnap struct {
	id         thin.DevID
	begin, end int
}

const fsBlock = 64 << 10

// record makes a file system with the project's own options, mounts it through FUSE and a loop
// device, runs the load, takes snapshots in between, and unmounts.
func (r *fsRig) record(seed uint64, steps int) {
	t := r.t
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	blocks := uint64(3 * r.size / fsBlock)
	meta, data := dev.NewMem(1024*4096), dev.NewMem(int64(blocks)*fsBlock)
	must(thin.Format(meta, thin.FormatOptions{DataBlockSize: fsBlock, DataBlocks: blocks}))
	r.log = dev.NewCrashLog()
	r.meta, r.data = r.log.WrapOn(meta, meta), r.log.WrapOn(data, data)
	pool, err := user.New(r.meta, r.data, user.Options{CommitInterval: 50 * time.Millisecond, Logger: trial.Quiet})
	must(err)
	defer func() { must(pool.Close()) }()
	must(pool.CreateThin(ctx, 1))
	h, err := pool.Open(ctx, 1, engine.OpenOptions{SizeBytes: r.size})
	must(err)
	defer h.Close()
	e, err := fuse.New(fuse.Options{RunDir: filepath.Join(r.dir, "run"), HelperCommand: []string{"/proc/self/exe", "role-fuse-helper"}, Logger: trial.Quiet})
	must(err)
	defer e.Close()
	a, err := e.Attach(ctx, "fs", h, export.AttachOptions{})
	must(err)
	defer func() { must(a.Detach(context.Background())) }()
	hc := &helper.Client{Command: []string{"/proc/self/exe", "role-helper"}, Dir: mkdir(t, filepath.Join(r.dir, "mnt")), Timeout: time.Minute}
	must(hc.Mkfs(ctx, a.Node(), r.fs, "5b1e6f52-0000-4000-8000-000000000001"))
	r.made = r.log.Now()
	dir := mkdir(t, filepath.Join(r.dir, "fs"))
	must(command("mount", "-t", r.fs, a.Node(), dir))
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}()
	r.files, err = load(r.log, dir, seed, steps, func(step int) error {
		if step%40 != 20 {
			return nil
		}
		s := fsSnap{id: thin.DevID(10 + len(r.snaps)), begin: r.log.Now()}
		err := pool.CreateSnap(ctx, s.id, 1)
		s.end = r.log.Now()
		r.snaps = append(r.snaps, s)
		return err
	})
	must(err)
	must(unmount(dir))
	mounted = false
}

func mkdir(t testing.TB, dir string) string {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// unmount tries for a while: programs that look at all mounts hold them for a moment.
func unmount(dir string) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := command("umount", dir)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

// released waits until no loop device is on a file any more. A file system that was unmounted here
// lives on for a moment if somebody has made a copy of all mounts meanwhile, and its log is not
// written yet.
func released(img string) error {
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		used := ""
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == img {
				used = f
			}
		}
		if used == "" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s is still used: %s", img, used)
		}
	}
}

// check is one cut: the pool is clean and opens; the file system's journal is replayed by mounting
// it, its files are as they must be, and then the file system's own check finds nothing. On some
// cuts a snapshot that was taken while files were written is looked at instead.
func (r *fsRig) check(dir string, meta, data *dev.Mem, cut, nth int) error {
	rep, err := thin.Check(meta, thin.CheckOptions{})
	if err != nil {
		return err
	}
	if len(rep.Findings) > 0 {
		return fmt.Errorf("check: %s", rep.Findings[0].String())
	}
	pool, err := user.New(meta, data, user.Options{Logger: trial.Quiet})
	if err != nil {
		return err
	}
	defer pool.Close()
	if cut < r.made {
		return nil // the pool is well; nobody promised a file system
	}
	id, at := thin.DevID(1), cut
	var ripe []fsSnap
	for _, s := range r.snaps {
		if s.end <= cut {
			ripe = append(ripe, s)
		}
	}
	if len(ripe) > 0 && nth%5 == 4 {
		s := ripe[nth/5%len(ripe)]
		id, at = s.id, s.begin
	}
	img := filepath.Join(dir, "img")
	if err := copyOut(pool, id, r.size, img); err != nil {
		return err
	}
	defer os.Remove(img)
	mnt := filepath.Join(dir, "mnt")
	opts := "loop"
	if r.fs == "xfs" {
		opts = "loop,nouuid"
	}
	if err := command("mount", "-t", r.fs, "-o", opts, img, mnt); err != nil {
		return err
	}
	err = r.files.check(mnt, at)
	if uerr := errors.Join(unmount(mnt), released(img)); uerr != nil {
		return errors.Join(err, uerr)
	}
	if err != nil {
		return fmt.Errorf("thin %d: %w", id, err)
	}
	if r.fs == "xfs" {
		err = command("xfs_repair", "-n", img)
	} else {
		err = command("e2fsck", "-fn", img)
	}
	if err != nil {
		return fmt.Errorf("thin %d: %w", id, err)
	}
	return nil
}

// copyOut writes a device to a sparse file.
func copyOut(pool *user.Pool, id thin.DevID, size int64, path string) error {
	h, err := pool.Open(context.Background(), id, engine.OpenOptions{SizeBytes: size, ReadOnly: true})
	if err != nil {
		return err
	}
	defer h.Close()
	f, err := dev.CreateFile(path, size, dev.OpenOptions{})
	if err != nil {
		return err
	}
	defer f.Close()
	buf, zero := make([]byte, fsBlock), make([]byte, fsBlock)
	for off := int64(0); off < size; {
		es, err := h.Extents(off, size-off)
		if err != nil {
			return err
		}
		for _, e := range es {
			for at := e.Off; !e.Hole && at < e.Off+e.Len; at += fsBlock {
				b := buf[:min(fsBlock, e.Off+e.Len-at)]
				if _, err := h.ReadAt(b, at); err != nil {
					return err
				}
				if !slices.Equal(b, zero[:len(b)]) {
					if _, err := f.WriteAt(b, at); err != nil {
						return err
					}
				}
			}
			off = e.Off + e.Len
		}
	}
	return nil
}

// cuts cuts the power n times, two at a time, most of them after the file system was made.
func (r *fsRig) cuts(seed uint64, n int) {
	var points []int
	rng := rand.New(rand.NewPCG(seed, 8))
	now := r.log.Now()
	for _, e := range r.log.FlushEnds() {
		if e > r.made {
			points = append(points, e-1, e)
		}
	}
	rng.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
	points = points[:min(len(points), n/2)]
	for len(points) < n {
		points = append(points, r.made+rng.IntN(now-r.made))
	}
	for i := range n / 20 {
		points[i] = 1 + rng.IntN(r.made)
	}
	slices.Sort(points)
	var wg sync.WaitGroup
	begin := time.Now()
	for part := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(seed, uint64(10+part)))
			dir := mkdir(r.t, filepath.Join(r.dir, fmt.Sprint("cut", part)))
			mkdir(r.t, filepath.Join(dir, "mnt"))
			cursor := r.log.Cursor()
			for i := part; i < len(points) && !r.t.Failed(); i += 2 {
				cursor.Seek(points[i])
				mm, dm := dev.AnyCrashMode(rng), dev.AnyCrashMode(rng)
				m, d := cursor.Image(r.meta, mm, dev.UnitMetadata, rng), cursor.Image(r.data, dm, dev.Unit512, rng)
				if err := r.check(dir, m, d, points[i], i); err != nil {
					r.t.Errorf("%s=%d, %s, cut at %d of %d (mkfs until %d), unflushed writes: metadata %v, data %v: %v",
						envSeed, seed, r.fs, points[i], now, r.made, mm, dm, err)
				}
			}
		}()
	}
	wg.Wait()
	r.t.Logf("%s: %d files, %d snapshots, %d flushes; %d cuts in %.1f s", r.fs, len(r.files.made), len(r.snaps), len(r.log.FlushEnds()), len(points), time.Since(begin).Seconds())
}

// TestFileSystems cuts the power under real ext4 and xfs file systems, which were made, mounted
// and written through the engine.
func TestFileSystems(t *testing.T) {
	needRoot(t, "mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair")
	seed := seed(t)
	for _, c := range []struct {
		fs    string
		size  int64
		steps int
		cuts  int
	}{{"ext4", 128 << 20, 500, 200}, {"xfs", 320 << 20, 200, 20}} {
		t.Run(c.fs, func(t *testing.T) {
			r := &fsRig{t: t, fs: c.fs, size: c.size, dir: shm(t)}
			r.record(seed, c.steps)
			n := c.cuts
			if raceEnabled {
				n /= 10
			} else {
				n = max(n, n*cuts(t)/100_000)
			}
			r.cuts(seed, n)
		})
	}
}
