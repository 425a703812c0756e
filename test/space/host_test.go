package space

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/internal/trial"
	"mica/thin"
)

// A host is a small file system for a pool.
type host struct {
	dir  string
	grow func() // makes it larger
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting file systems needs root")
	}
}

// unmount tries for a while: programs that look at all mounts hold them for a moment.
func unmount(dir string) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		out, err := exec.Command("umount", dir).CombinedOutput()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("umount %s: %w\n%s", dir, err, out)
		}
	}
}

func unmountLater(t testing.TB, dir string) {
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

func tmpfsHost(t *testing.T) host {
	dir := shm(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Skipf("SKIPPED: cannot mount a tmpfs: %v", err)
	}
	unmountLater(t, dir)
	return host{dir, func() { must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=96m")) }}
}

// loopHost is a real file system in a file in memory, with a file in it that takes most of it.
func loopHost(t *testing.T, fs string, mib int) host {
	base := shm(t)
	img, dir := filepath.Join(base, "img"), filepath.Join(base, "mnt")
	must(t, os.Mkdir(dir, 0o700))
	f, err := os.Create(img)
	must(t, err)
	must(t, errors.Join(f.Truncate(int64(mib)<<20), f.Close()))
	args := map[string][]string{"ext4": {"-q", "-F", "-m", "0", img}, "xfs": {"-q", img}}[fs]
	if out, err := exec.Command("mkfs."+fs, args...).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: mkfs.%s: %v: %s", fs, err, out)
	}
	if out, err := exec.Command("mount", "-t", fs, "-o", "loop", img, dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: cannot mount %s: %v: %s", fs, err, out)
	}
	unmountLater(t, dir)
	filler := filepath.Join(dir, "filler")
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	f, err = os.Create(filler)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-16<<20))
	must(t, errors.Join(f.Sync(), f.Close()))
	return host{dir, func() { must(t, os.Remove(filler)) }}
}

// TestHostFull: the file system under a sparse pool runs full while several devices are written. That
// is a state and no failure: writes wait, reads and overwrites go on, flushes succeed, discards
// give space back and wake who waits, and so does the host when it has room again.
func TestHostFull(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name string
		make func(t *testing.T) host
	}{
		{"tmpfs", tmpfsHost},
		{"ext4", func(t *testing.T) host { return loopHost(t, "ext4", 128) }},
		{"xfs", func(t *testing.T) host { return loopHost(t, "xfs", 320) }},
	} {
		t.Run(c.name, func(t *testing.T) { hostFull(t, c.make(t)) })
	}
}

// TestHostFullTimesOut: a write that waits for the host gets its error when its time is over, however
// busily others overwrite what they have, which needs no space.
func TestHostFullTimesOut(t *testing.T) {
	needRoot(t)
	h := tmpfsHost(t)
	loc := user.Location{Dir: filepath.Join(h.dir, "pool")}
	must(t, user.Format(ctx, loc, user.FormatOptions{DataBytes: 64 << 20, MetadataBytes: 2 << 20}))
	p, err := user.Open(ctx, loc, user.Options{CommitInterval: 10 * time.Millisecond, NoSpaceTimeout: 300 * time.Millisecond, Logger: trial.Quiet, NoJournal: true})
	must(t, err)
	defer func() { must(t, p.Close()) }()
	must(t, p.CreateThin(ctx, 1))
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 64 << 20})
	must(t, err)
	defer func() { must(t, d.Close()) }()
	b := make([]byte, blockSize)
	rand.NewChaCha8([32]byte{}).Read(b)
	_, err = d.WriteAt(b, 0)
	must(t, err)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := d.WriteAt(b[:4096], 8192); err != nil {
				t.Errorf("overwrite: %v", err)
				return
			}
		}
	}()
	begin := time.Now()
	for vb := int64(1); err == nil && vb < 1000; vb++ {
		_, err = d.WriteAt(b, vb*blockSize)
	}
	close(stop)
	wg.Wait()
	if !errors.Is(err, dev.ErrNoSpace) || !strings.Contains(err.Error(), "on the host (waited 300ms)") {
		t.Errorf("after %v: %v, want ErrNoSpace of the host after 300 ms", time.Since(begin), err)
	}
	must(t, d.Flush())
}

func hostFull(t *testing.T, h host) {
	loc := user.Location{Dir: filepath.Join(h.dir, "pool")}
	must(t, user.Format(ctx, loc, user.FormatOptions{DataBytes: 64 << 20, MetadataBytes: 2 << 20}))
	o := user.Options{CommitInterval: 20 * time.Millisecond, NoSpaceTimeout: time.Hour, Logger: trial.Quiet, JournalDirs: []string{shm(t)}}
	p, err := user.Open(ctx, loc, o)
	must(t, err)
	defer func() { p.Close() }()
	const devices, blocks = 3, 250 // of 64 KiB: 47 MiB together
	type device struct {
		h      engine.Thin
		mu     sync.Mutex
		stamps map[int64]uint64
	}
	write := func(d *device, vb int64, stamp uint64) error {
		b := make([]byte, blockSize)
		for i := 0; i < len(b); i += 8 {
			binary.LittleEndian.PutUint64(b[i:], stamp)
		}
		if _, err := d.h.WriteAt(b, vb*blockSize); err != nil {
			return err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.stamps[vb] = stamp
		return nil
	}
	check := func(d *device) {
		t.Helper()
		d.mu.Lock()
		defer d.mu.Unlock()
		b := make([]byte, blockSize)
		for vb, stamp := range d.stamps {
			_, err := d.h.ReadAt(b, vb*blockSize)
			must(t, err)
			for i := 0; i < len(b); i += 8 {
				if got := binary.LittleEndian.Uint64(b[i:]); got != stamp {
					t.Fatalf("thin %d, block %d holds %#x, want %#x", d.h.ID(), vb, got, stamp)
				}
			}
		}
	}
	var ds []*device
	for id := thin.DevID(1); id <= devices; id++ {
		must(t, p.CreateThin(ctx, id))
		hd, err := p.Open(ctx, id, engine.OpenOptions{SizeBytes: blocks * blockSize})
		must(t, err)
		d := &device{h: hd, stamps: map[int64]uint64{}}
		ds = append(ds, d)
		must(t, write(d, 0, uint64(id))) // each has a block of its own, however quick the others are
	}
	var wg sync.WaitGroup
	errs := make(chan error, devices)
	for i, d := range ds {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for n, vb := range rng.Perm(blocks) {
				if err := write(d, int64(vb), uint64(i)<<32|uint64(n)|1<<60); err != nil {
					errs <- fmt.Errorf("thin %d: %w", d.h.ID(), err)
					return
				}
			}
		}()
	}
	status := func() engine.Status {
		st, err := p.Status(ctx)
		must(t, err)
		return st
	}
	stuck := func() bool { return status().WaitingForSpace == devices }
	eventually(t, "all writers wait for the host", func() bool { return stuck() || len(errs) > 0 })
	if len(errs) > 0 {
		t.Fatal(<-errs)
	}
	for _, d := range ds {
		check(d)
		must(t, d.h.Flush())
		d.mu.Lock()
		var own int64 = -1
		for vb := range d.stamps {
			own = vb
		}
		d.mu.Unlock()
		must(t, write(d, own, 77<<40)) // an overwrite
		must(t, d.h.Flush())
	}
	if st := status(); st.Mode != "out_of_data_space" || st.NeedsCheck || st.FailReason != "" {
		t.Fatalf("status: %+v", st)
	}
	// A snapshot, and with it a commit, needs no new space of the host.
	must(t, p.CreateSnap(ctx, 50, 1))
	must(t, p.Delete(ctx, 50))
	// What a discard gives back is used.
	d := ds[0]
	d.mu.Lock()
	n, before := 0, 0
	for vb := range d.stamps {
		if n++; n <= 12 {
			must(t, d.h.Discard(vb*blockSize, blockSize))
			delete(d.stamps, vb)
		}
	}
	d.mu.Unlock()
	count := func() (n int) {
		for _, d := range ds {
			d.mu.Lock()
			n += len(d.stamps)
			d.mu.Unlock()
		}
		return n
	}
	before = count()
	must(t, d.h.Flush())
	eventually(t, "writers go on with what was discarded", func() bool { return count() >= before+8 })
	eventually(t, "all writers wait again", stuck)
	h.grow()
	wg.Wait()
	if len(errs) > 0 {
		t.Fatal(<-errs)
	}
	eventually(t, "the pool is well", func() bool { return status().Mode == "rw" })
	for _, d := range ds {
		check(d)
		must(t, d.h.Flush())
		must(t, d.h.Close())
	}
	must(t, p.Close())
	p, err = user.Open(ctx, loc, o)
	must(t, err)
	for i, d := range ds {
		d.h, err = p.Open(ctx, thin.DevID(i+1), engine.OpenOptions{SizeBytes: blocks * blockSize, ReadOnly: true})
		must(t, err)
		check(d)
		must(t, d.h.Close())
	}
	must(t, p.Close())
	m, err := dev.Open(loc.MetadataPath(), dev.OpenOptions{ReadOnly: true})
	must(t, err)
	defer m.Close()
	rep, err := thin.Check(m, thin.CheckOptions{})
	must(t, err)
	var found []string
	for _, f := range rep.Findings {
		found = append(found, f.String())
	}
	if len(found) > 0 {
		t.Errorf("check: %s", strings.Join(found, "; "))
	}
}
