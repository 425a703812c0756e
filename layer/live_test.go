package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/layer/helper"
)

// numberedWriter writes files 0, 1, 2 ... each with fsync, until stopped.
type numberedWriter struct {
	dir   string
	acked atomic.Int64 // files that are complete and synced
	stop  atomic.Bool
	err   error
	wg    sync.WaitGroup
}

func startWriter(dir string) *numberedWriter {
	w := &numberedWriter{dir: dir}
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		for i := int64(0); !w.stop.Load(); i++ {
			if w.err = w.write(i); w.err != nil {
				return
			}
			w.acked.Store(i + 1)
		}
	}()
	return w
}

func numbered(i int64) string { return fmt.Sprintf("n%06d", i) }

func (w *numberedWriter) write(i int64) error {
	f, err := os.Create(filepath.Join(w.dir, numbered(i)))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Repeat(numbered(i), 200)); err != nil {
		return err
	}
	return f.Sync()
}

func (w *numberedWriter) end(t testing.TB) int64 {
	w.stop.Store(true)
	w.wg.Wait()
	ok(t, w.err)
	return w.acked.Load()
}

// prefix checks that files 0..k-1 are there and whole, and no later one but perhaps one that was
// being written; it returns k.
func prefix(t testing.TB, m map[string]string) int64 {
	t.Helper()
	k := int64(0)
	for m[numbered(k)] == strings.Repeat(numbered(k), 200) {
		k++
	}
	extra := int64(0)
	for name := range m {
		if strings.HasPrefix(name, "n") && name >= numbered(k) {
			extra++
		}
	}
	if extra > 1 {
		t.Errorf("%d files after the first gap at %d", extra, k)
	}
	return k
}

// fsck checks the file system of a container's device as it is, without replaying its journal or log.
func (r *rig) fsck(name string) {
	r.t.Helper()
	ctx := tctx(r.t)
	a := must[Attachment](r.t)(r.s.Attach(ctx, name, AttachOptions{ReadOnly: true}))
	check := []string{"e2fsck", "-fn", a.Link}
	if a.FSType == "xfs" {
		check = []string{"xfs_repair", "-n", a.Link} // fails also if the log is not empty
	}
	if out, err := exec.Command(check[0], check[1:]...).CombinedOutput(); err != nil {
		r.t.Errorf("%s of %s: %v\n%s", check[0], name, err, out)
	}
	ok(r.t, r.s.Detach(ctx, name, DetachOptions{}))
}

// Snapshots and forks of a container that is written to hold a prefix of the writes, with all
// that was acknowledged before, and are clean file systems.
func TestLiveFork(t *testing.T) { eachFS(t, testLiveFork) }

func testLiveFork(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	create(t, s, "src", "a")
	dir := r.mount("src")
	w := startWriter(dir)
	var acked []int64
	for i := range 4 {
		for begin := w.acked.Load(); w.acked.Load() < begin+5; {
			time.Sleep(time.Millisecond)
		}
		acked = append(acked, w.acked.Load())
		f, err := s.Fork(ctx, "src", ForkOptions{Names: []string{fmt.Sprintf("f%da", i), fmt.Sprintf("f%db", i)}})
		ok(t, err)
		if f.Level != LevelFileSystem {
			t.Errorf("fork is of level %s", f.Level)
		}
		snap := must[Snapshot](t)(s.Snapshot(ctx, "src", SnapshotOptions{Name: fmt.Sprintf("s%d", i)}))
		if snap.Level != LevelFileSystem {
			t.Errorf("snapshot is of level %s", snap.Level)
		}
	}
	total := w.end(t)
	r.unmount("src", dir)
	for i, n := range acked {
		a, b := fmt.Sprintf("f%da", i), fmt.Sprintf("f%db", i)
		r.fsck(a)
		r.fsck(b)
		ma, mb := contents(r, a), contents(r, b)
		k := prefix(t, ma)
		if k < n || k > total || len(ma) != len(mb) || prefix(t, mb) != k {
			t.Errorf("fork %d holds %d and %d files, %d were acknowledged before it", i, k, prefix(t, mb), n)
		}
		if ma["a"] != "a" {
			t.Error("the image's file is gone")
		}
	}
	// A rollback to the second snapshot.
	must[Container](t)(s.Rollback(ctx, "src", "s1"))
	r.fsck("src")
	if k := prefix(t, contents(r, "src")); k < acked[1] || k > acked[2] {
		t.Errorf("rolled back to %d files, want %d to %d", k, acked[1], acked[2])
	}
	if left, _ := os.ReadDir(s.freezes); len(left) != 0 {
		t.Errorf("records of freezes are left: %v", left)
	}
}

// An unlinked file that is still open is in no copy: orphans are dropped before a copy shows.
func TestForkDropsOrphans(t *testing.T) { eachFS(t, testForkDropsOrphans) }

func testForkDropsOrphans(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	create(t, s, "src", "a")
	dir := r.mount("src")
	f, err := os.Create(filepath.Join(dir, "orphan"))
	ok(t, err)
	_, err = f.WriteString(strings.Repeat("x", 1<<20))
	ok(t, err)
	ok(t, f.Sync())
	ok(t, os.Remove(f.Name()))
	res := must[ForkResult](t)(s.Fork(ctx, "src", ForkOptions{Names: []string{"f1", "f2"}}))
	ok(t, f.Close())
	r.unmount("src", dir)
	if res.Level != LevelFileSystem {
		t.Errorf("level %s", res.Level)
	}
	for _, n := range []string{"f1", "f2"} {
		c := must[Container](t)(s.Container(ctx, n))
		if clean, err := s.isClean(ctx, c.Device, c.SizeBytes, fs); err != nil || !clean {
			t.Errorf("%s is not clean (%v)", n, err)
		}
		r.fsck(n)
	}
}

// A busy detach names the mount, changes nothing, and goes through when the mount is gone; a
// deferred one goes on by itself, and so does a deferred removal.
func TestBusy(t *testing.T) {
	r := newRig(t)
	s, ctx := r.openImage()
	before := r.used()
	create(t, s, "c", "a")
	dir := r.mount("c")
	a := must[Container](t)(s.Container(ctx, "c")).Attachment
	if a == nil || len(a.Mounts) != 1 || a.Mounts[0] != dir {
		t.Errorf("attachment %+v", a)
	}
	begin := time.Now()
	wantErr(t, s.Detach(ctx, "c", DetachOptions{}), ErrBusy, dir, `"c"`)
	wantErr(t, s.Remove(ctx, "c", RemoveOptions{}), ErrBusy, dir)
	_, err := s.Rollback(ctx, "c", "x")
	wantErr(t, err, ErrNotFound)
	must[Snapshot](t)(s.Snapshot(ctx, "c", SnapshotOptions{Name: "x"}))
	_, err = s.Rollback(ctx, "c", "x")
	wantErr(t, err, ErrInUse, "detach it first")
	if d := time.Since(begin); d > 20*time.Second {
		t.Errorf("busy errors took %v", d)
	}
	write(t, dir, "still", "works")
	wantErr(t, s.Detach(ctx, "c", DetachOptions{Deferred: true}), ErrBusy)
	q := s.Queue()
	if len(q) != 1 || q[0].Kind != "detach" || q[0].Object != "container/c" {
		t.Errorf("queue %+v", q)
	}
	ok(t, unix.Unmount(dir, 0))
	waitFor(t, "the deferred detach", func() bool {
		return must[Container](t)(s.Container(ctx, "c")).Attachment == nil && len(s.Queue()) == 0
	})
	dir = r.mount("c")
	wantErr(t, s.Remove(ctx, "c", RemoveOptions{Deferred: true}), ErrInUse, "snapshots")
	ok(t, s.Remove(ctx, "c", RemoveOptions{Deferred: true, Snapshots: true}))
	_, err = s.Container(ctx, "c")
	wantErr(t, err, ErrNotFound)
	write(t, dir, "still", "mounted")
	create(t, s, "c", "a") // another of that name
	waitFor(t, "a look at the queue", func() bool {
		q := s.Queue()
		return len(q) == 2 && q[0].Object == "container/c" && strings.Contains(q[0].LastErr+q[1].LastErr, dir)
	})
	ok(t, unix.Unmount(dir, 0))
	waitFor(t, "the deferred removal", func() bool { return len(s.Queue()) == 0 })
	ok(t, s.Remove(ctx, "c", RemoveOptions{}))
	if n := r.used(); n != before {
		t.Errorf("pool uses %d blocks, want %d", n, before)
	}
}

// Attachments outlive the store: with a holder the very mount goes on.
func TestRestart(t *testing.T) { eachFS(t, testRestart) }

func testRestart(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	r.holder = true
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	create(t, s, "gone", "a")
	dir, goneDir := r.mount("c"), r.mount("gone")
	write(t, dir, "x", "before")
	ok(t, s.Remove(ctx, "gone", RemoveOptions{Deferred: true}))
	a := must[Container](t)(s.Container(ctx, "c")).Attachment
	own := must[Container](t)(s.Container(ctx, "c")).UsedBytes
	s = r.reopen()
	b := must[Container](t)(s.Container(ctx, "c"))
	if b.Attachment == nil || b.Attachment.Link != a.Link || b.Attachment.Node != a.Node {
		t.Fatalf("attachment %+v, want %+v", b.Attachment, a)
	}
	if b.UsedBytes < own {
		t.Errorf("uses %d bytes, %d before the restart", b.UsedBytes, own)
	}
	ok(t, os.WriteFile(filepath.Join(dir, "y"), []byte("after"), 0o644))
	write(t, goneDir, "z", "still there")
	if q := s.Queue(); len(q) == 0 {
		t.Error("the deferred removal is not in the queue")
	}
	ok(t, unix.Unmount(goneDir, 0))
	waitFor(t, "the deferred removal", func() bool { return len(s.Queue()) == 0 })
	r.unmount("c", dir)
	if got := contents(r, "c"); got["x"] != "before" || got["y"] != "after" {
		t.Errorf("contents %v", got)
	}
	n, err := r.pool.OwnBlocks(ctx, b.Device)
	ok(t, err)
	if got := must[Container](t)(s.Container(ctx, "c")).UsedBytes; got != int64(n)*s.block {
		t.Errorf("uses %d bytes, a count says %d", got, int64(n)*s.block)
	}
}

// Usage is right at the first call after a crash as well.
func TestUsageAfterCrash(t *testing.T) { eachFS(t, testUsageAfterCrash) }

func testUsageAfterCrash(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	crash := errors.New("crash")
	crashed := false
	r.fault = func(string) error {
		if crashed {
			return crash
		}
		return nil
	}
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	dir := r.mount("c")
	write(t, dir, "x", strings.Repeat("x", 3<<20))
	unix.Sync()
	before := must[Container](t)(s.Container(ctx, "c")).UsedBytes
	if before < 3<<20 {
		t.Fatalf("uses %d bytes after 3 MiB were written", before)
	}
	ok(t, unix.Unmount(dir, 0))
	crashed = true
	s.Detach(ctx, "c", DetachOptions{}) // the record keeps saying "attached"
	r.close()
	r.fault = nil
	s = r.open()
	c := must[Container](t)(s.Container(ctx, "c"))
	n, err := r.pool.OwnBlocks(ctx, c.Device)
	ok(t, err)
	if c.UsedBytes < before || c.UsedBytes != int64(n)*s.block {
		t.Errorf("uses %d bytes, %d before, %d counted", c.UsedBytes, before, int64(n)*s.block)
	}
	ok(t, s.Detach(ctx, "c", DetachOptions{}))
	if got := must[Container](t)(s.Container(ctx, "c")).UsedBytes; got != int64(n)*s.block {
		t.Errorf("uses %d bytes after the detach, want %d", got, int64(n)*s.block)
	}
}

// A container grows detached; attached and mounted where the machine allows it.
func TestResize(t *testing.T) { eachFS(t, testResize) }

func testResize(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	big, _, err := s.Create(ctx, CreateOptions{Name: "big", Image: "a", SizeBytes: 20 << 30})
	ok(t, err)
	if big.SizeBytes != 20<<30 {
		t.Errorf("size %d", big.SizeBytes)
	}
	space := func(dir string) int64 {
		var st unix.Statfs_t
		ok(t, unix.Statfs(dir, &st))
		return int64(st.Blocks) * st.Bsize
	}
	r.mounted("big", func(dir string) {
		if n := space(dir); n < 19<<30 {
			t.Errorf("file system of %d bytes on 20 GiB", n)
		}
		if m := tree(t, dir); m["a"] != "a" {
			t.Errorf("contents %v", m)
		}
	})
	r.fsck("big")
	t.Logf("growing from 2 to 20 GiB costs %d KiB", must[Container](t)(s.Container(ctx, "big")).UsedBytes>>10)
	_, created, err := s.Create(ctx, CreateOptions{Name: "big", Image: "a", SizeBytes: 20 << 30})
	if err != nil || created {
		t.Errorf("again: %v %v", created, err)
	}

	create(t, s, "c", "a")
	c := must[Container](t)(s.Resize(ctx, "c", 5<<30))
	if c.SizeBytes != 5<<30 {
		t.Errorf("size %d", c.SizeBytes)
	}
	dir := r.mount("c")
	if n := space(dir); n < 4<<30 {
		t.Errorf("file system of %d bytes on 5 GiB", n)
	}
	c, err = s.Resize(ctx, "c", 7<<30)
	if errors.Is(err, unix.EPERM) {
		t.Log("SKIPPED: growing a mounted ext4 needs CAP_SYS_RESOURCE, which this machine does not give")
		if got := must[Container](t)(s.Container(ctx, "c")); got.SizeBytes != 5<<30 {
			t.Errorf("size after a failed resize: %d", got.SizeBytes)
		}
	} else {
		ok(t, err)
		if n := space(dir); n < 6<<30 {
			t.Errorf("file system of %d bytes on 7 GiB", n)
		}
	}
	write(t, dir, "b", "b")
	r.unmount("c", dir)
	r.fsck("c")
}

// Time over: the container goes by itself, but not while somebody uses it.
func TestTTL(t *testing.T) {
	r := newRig(t)
	s, ctx := r.openImage()
	events, cancel := s.Events(0)
	defer cancel()
	c, _, err := s.Create(ctx, CreateOptions{Name: "c", Image: "a", TTL: 50 * time.Millisecond})
	ok(t, err)
	if c.Expires == nil {
		t.Fatal("no time")
	}
	waitFor(t, "expiry", func() bool { _, err := s.Container(ctx, "c"); return errors.Is(err, ErrNotFound) })
	waitEvent(t, events, EventExpire, "container/c")
	ok(t, second(s.Create(ctx, CreateOptions{Name: "d", Image: "a"})))
	dir := r.mount("d")
	short := 10 * time.Millisecond
	must[Container](t)(s.Update(ctx, "d", UpdateOptions{TTL: &short}))
	waitFor(t, "a try", func() bool {
		q := s.Queue()
		return len(q) == 1 && q[0].Kind == "expire" && strings.Contains(q[0].LastErr, dir)
	})
	// More time was given: it stays.
	long := time.Hour
	must[Container](t)(s.Update(ctx, "d", UpdateOptions{TTL: &long}))
	ok(t, unix.Unmount(dir, 0))
	s = r.reopen()
	must[Container](t)(s.Container(ctx, "d"))
	zero := time.Duration(0)
	if c := must[Container](t)(s.Update(ctx, "d", UpdateOptions{TTL: &zero})); c.Expires != nil {
		t.Errorf("expires %v", c.Expires)
	}
	// One whose time comes while nothing runs.
	ok(t, second(s.Create(ctx, CreateOptions{Name: "e", Image: "a", TTL: time.Second})))
	r.close()
	time.Sleep(time.Second)
	s = r.open()
	waitFor(t, "expiry", func() bool { _, err := s.Container(ctx, "e"); return errors.Is(err, ErrNotFound) })
}

func waitEvent(t testing.TB, ch <-chan Event, kind, object string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case e := <-ch:
			if e.Kind == kind && e.Object == object {
				return
			}
		case <-deadline:
			t.Fatalf("no event %s of %s", kind, object)
		}
	}
}

// What a helper that was killed, or a daemon, left frozen is thawed: by the record, in the
// background or at the next start.
func TestFrozenLeftovers(t *testing.T) { eachFS(t, testFrozenLeftovers) }

func testFrozenLeftovers(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	r.holder = true
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	dir := r.mount("c")
	freeze := func() {
		f, err := os.Open(dir)
		ok(t, err)
		defer f.Close()
		ok(t, unix.IoctlSetInt(int(f.Fd()), 0xc0045877, 0)) // FIFREEZE
	}
	c := must[Container](t)(s.Container(ctx, "c"))
	freeze()
	_, err := s.noteFreeze(frozenRecord{ID: c.ID, Node: c.Attachment.Node, FSType: fs, Since: now()})
	ok(t, err)
	s = r.reopen()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(dir, "x"), []byte("x"), 0o644) }()
	select {
	case err := <-done:
		ok(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("still frozen after the start")
	}
	if left, _ := os.ReadDir(s.freezes); len(left) != 0 {
		t.Errorf("records are left: %v", left)
	}
	// Somebody else has frozen it: an error, and it is not thawed behind their back.
	freeze()
	_, err = s.Snapshot(ctx, "c", SnapshotOptions{Name: "s"})
	if err == nil || !errors.Is(err, unix.EBUSY) {
		t.Errorf("snapshot of what somebody else froze: %v", err)
	}
	fd, err := os.Open(dir)
	ok(t, err)
	unix.IoctlSetInt(int(fd.Fd()), 0xc0045878, 0)
	fd.Close()
	r.unmount("c", dir)
}

// A freeze that takes too long is not a snapshot of the level that it says.
func TestFreezeTooLong(t *testing.T) {
	r := newRig(t)
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	dir := r.mount("c")
	before := r.used()
	s.files.(*helper.Client).Freeze = time.Millisecond
	write(t, dir, "x", "x")
	n := 0
	for range few(20) {
		snap, err := s.Snapshot(ctx, "c", SnapshotOptions{Name: fmt.Sprintf("s%d", n)})
		if errors.Is(err, helper.ErrTimeout) {
			n++
			continue
		}
		ok(t, err)
		ok(t, s.RemoveSnapshot(ctx, "c", snap.Name))
	}
	t.Logf("%d of %d snapshots ran out of time", n, few(20))
	s.files.(*helper.Client).Freeze = time.Second
	snap, err := s.Snapshot(ctx, "c", SnapshotOptions{Name: "crash", QuiesceOptions: QuiesceOptions{CrashOK: true}})
	ok(t, err)
	if snap.Level != LevelCrash && snap.Level != LevelFileSystem {
		t.Errorf("level %s", snap.Level)
	}
	snap, err = s.Snapshot(ctx, "c", SnapshotOptions{Name: "mine", QuiesceOptions: QuiesceOptions{Quiesced: true}})
	ok(t, err)
	if snap.Level != LevelCaller {
		t.Errorf("level %s, want %s", snap.Level, LevelCaller)
	}
	ok(t, s.RemoveSnapshot(ctx, "c", "crash"))
	ok(t, s.RemoveSnapshot(ctx, "c", "mine"))
	r.unmount("c", dir)
	if n := r.used(); n < before {
		t.Errorf("pool uses %d blocks, %d before", n, before)
	}
}

// An NBD attachment makes the file system the guest's: the host keeps its hands off unless told.
func TestGuestOwned(t *testing.T) {
	r := newRig(t)
	nbd := &fakeNBD{clients: map[string]int{}}
	r.o.NBD = nbd
	s, ctx := r.openImage()
	create(t, s, "vm", "a")
	a := must[Attachment](t)(s.Attach(ctx, "vm", AttachOptions{As: AsNBD}))
	if a.URI == "" || a.Node != "" {
		t.Errorf("attachment %+v", a)
	}
	_, err := s.Attach(ctx, "vm", AttachOptions{})
	wantErr(t, err, ErrInUse, "nbd")
	nbd.clients[a.ID] = 2
	wantErr(t, s.Detach(ctx, "vm", DetachOptions{}), ErrBusy, "2 NBD clients")
	snap := must[Snapshot](t)(s.Snapshot(ctx, "vm", SnapshotOptions{Name: "s"}))
	if snap.Level != LevelCrash || !snap.GuestOwned {
		t.Errorf("snapshot %+v", snap)
	}
	nbd.clients[a.ID] = 0
	s = r.reopen()
	c := must[Container](t)(s.Container(ctx, "vm"))
	if c.Attachment == nil || c.Attachment.URI != a.URI || !c.GuestOwned {
		t.Errorf("after a restart: %+v", c.Attachment)
	}
	ok(t, s.Detach(ctx, "vm", DetachOptions{}))
	_, err = s.Attach(ctx, "vm", AttachOptions{})
	wantErr(t, err, ErrGuestOwned)
	_, err = s.Diff(ctx, "vm", errWriter{}, DiffOptions{})
	wantErr(t, err, ErrGuestOwned)
	cr := must[CommitResult](t)(s.Commit(ctx, "vm", CommitOptions{Image: "guest"}))
	l := must[Layer](t)(s.Layer(ctx, cr.Image.ChainID))
	if l.DiffID != "" || !strings.HasPrefix(l.ChainID, "block:") {
		t.Errorf("layer %+v", l)
	}
	if c := create(t, s, "vm2", "guest"); !c.GuestOwned {
		t.Error("a container of a guest's image is not guest-owned")
	}
	must[Container](t)(s.Resize(ctx, "vm", 4<<30))
	must[Attachment](t)(s.Attach(ctx, "vm", AttachOptions{TrustGuest: true}))
	ok(t, s.Detach(ctx, "vm", DetachOptions{}))
	must[CommitResult](t)(s.Commit(ctx, "vm", CommitOptions{Image: "trusted", QuiesceOptions: QuiesceOptions{TrustGuest: true}}))
}

// TestAttachOverTCP: only where asked for, and so again after a restart.
func TestAttachOverTCP(t *testing.T) {
	r := newRig(t)
	nbd := &fakeNBD{clients: map[string]int{}, tcp: map[string]bool{}}
	r.o.NBD = nbd
	s, ctx := r.openImage()
	create(t, s, "near", "a")
	create(t, s, "far", "a")
	_, err := s.Attach(ctx, "far", AttachOptions{TCP: true})
	wantErr(t, err, ErrInvalid, "block")
	near := must[Attachment](t)(s.Attach(ctx, "near", AttachOptions{As: AsNBD}))
	far := must[Attachment](t)(s.Attach(ctx, "far", AttachOptions{As: AsNBD, TCP: true, ReadOnly: true}))
	for range 2 {
		if nbd.tcp[near.ID] || !nbd.tcp[far.ID] || near.TCP || !far.TCP {
			t.Errorf("over TCP: %v; attachments %+v, %+v", nbd.tcp, near, far)
		}
		clear(nbd.tcp)
		s = r.reopen()
		far = *must[Container](t)(s.Container(ctx, "far")).Attachment
	}
	_, err = s.Attach(ctx, "far", AttachOptions{As: AsNBD, ReadOnly: true})
	wantErr(t, err, ErrInUse, "nbd over TCP, read-only")
}

type errWriter struct{}

func (errWriter) Write([]byte) (int, error) { return 0, errors.New("not to be written") }

type fakeNBD struct {
	clients map[string]int
	tcp     map[string]bool
}

type fakeNBDExport struct {
	n    *fakeNBD
	name string
}

func (n *fakeNBD) Serve(_ context.Context, name string, _ dev.Device, o NBDOptions) (NBDExport, error) {
	if n.tcp != nil {
		n.tcp[name] = o.TCP
	}
	return &fakeNBDExport{n, name}, nil
}
func (e *fakeNBDExport) URI() string                 { return "nbd+unix:///" + e.name + "?socket=/run/nbd.sock" }
func (e *fakeNBDExport) Clients() int                { return e.n.clients[e.name] }
func (e *fakeNBDExport) Close(context.Context) error { return nil }

// The node taken away by somebody else: the next attach makes another.
func TestNodeTakenAway(t *testing.T) { eachFS(t, testNodeTakenAway) }

func testNodeTakenAway(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	a := must[Attachment](t)(s.Attach(ctx, "c", AttachOptions{}))
	mounts, err := os.ReadFile("/proc/self/mounts")
	ok(t, err)
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], r.dir) && strings.Contains(f[1], a.ID) {
			unix.Unmount(f[1], unix.MNT_FORCE)
			unix.Unmount(f[1], unix.MNT_DETACH)
		}
	}
	waitFor(t, "notice", func() bool {
		c := must[Container](t)(s.Container(ctx, "c"))
		return c.Attachment == nil || c.Attachment.Node == ""
	})
	b := must[Attachment](t)(s.Attach(ctx, "c", AttachOptions{}))
	if b.Node == "" {
		t.Errorf("attachment %+v", b)
	}
	ok(t, s.Detach(ctx, "c", DetachOptions{}))
}

// TestCrashLevel: a copy of what was not unmounted in order says so, and is replayed; one of what was is of
// the file system's level.
func TestCrashLevel(t *testing.T) { eachFS(t, testCrashLevel) }

func testCrashLevel(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	s, ctx := r.openImage()
	create(t, s, "c", "a")
	r.mounted("c", func(dir string) { write(t, dir, "x", "x") })
	if snap := must[Snapshot](t)(s.Snapshot(ctx, "c", SnapshotOptions{Name: "clean"})); snap.Level != LevelFileSystem {
		t.Errorf("a copy of what was unmounted is of level %s", snap.Level)
	}
	dir := r.mount("c")
	f, err := os.Create(filepath.Join(dir, "y"))
	ok(t, err)
	_, err = f.WriteString("synced")
	ok(t, errors.Join(err, f.Sync(), f.Close()))
	c := must[Container](t)(s.Container(ctx, "c"))
	node := filepath.Join(r.host.Run, "fuse", c.ID) // goes away under the mount, as in a power cut
	unix.Unmount(node, unix.MNT_FORCE)
	unix.Unmount(node, unix.MNT_DETACH)
	unix.Unmount(dir, unix.MNT_DETACH)
	waitFor(t, "the node's end", func() bool { return s.Detach(ctx, "c", DetachOptions{}) == nil })
	snap := must[Snapshot](t)(s.Snapshot(ctx, "c", SnapshotOptions{Name: "dirty"}))
	if snap.Level != LevelCrash {
		t.Errorf("a copy of what was not unmounted is of level %s", snap.Level)
	}
	must[Container](t)(s.Rollback(ctx, "c", "dirty"))
	r.fsck("c")
	if m := contents(r, "c"); m["x"] != "x" || m["y"] != "synced" {
		t.Errorf("the copy holds %v", m)
	}
}

// A full pool: an import fails with the reason and leaves nothing, a snapshot of a mounted
// container fails before anything is frozen, removing works, and then all goes on.
func TestPoolFull(t *testing.T) { eachFS(t, testPoolFull) }

func testPoolFull(t *testing.T, fs string) {
	r := newRig(t)
	r.o.FSType = fs
	r.o.BaseSize = 320 << 20
	r.dataBytes, r.noSpaceWait = 32<<20, 300*time.Millisecond
	s := r.open()
	ctx := tctx(t)
	ok(t, r.pool.CreateThin(ctx, 1))
	importImage(t, s, "a", []file{{name: "a", data: strings.Repeat("a", 4<<20)}})
	create(t, s, "c", "a")
	before := r.used()
	tarball, diff := layerTar(t, file{name: "b", data: strings.Repeat("b", 40<<20)})
	im := must[Import](t)(s.BeginImport(ctx))
	_, err := im.ApplyLayer(ctx, LayerSpec{ChainID: diff, DiffID: diff}, strings.NewReader(string(tarball)))
	wantErr(t, err, ErrNoSpace, "data blocks", diff)
	tarball, diff = layerTar(t, file{name: "b", data: strings.Repeat("b", 300<<20)})
	ok(t, r.pool.GrowData(ctx, 384<<20))
	_, err = im.ApplyLayer(ctx, LayerSpec{ChainID: diff, DiffID: diff}, strings.NewReader(string(tarball)))
	wantErr(t, err, ErrNoSpace, "in the file system")
	ok(t, im.Abort(ctx))
	if n := r.used(); n != before {
		t.Errorf("pool uses %d blocks, want %d", n, before)
	}
	dir := r.mount("c")
	full, err := s.pool.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 30}) // fills the pool
	ok(t, err)
	for off := int64(0); err == nil; off += 1 << 20 {
		_, err = full.WriteAt(make([]byte, 1<<20), off)
	}
	ok(t, full.Close())
	_, err = s.Snapshot(ctx, "c", SnapshotOptions{Name: "s"})
	wantErr(t, err, ErrNoSpace, "blocks free")
	create(t, s, "d", "a") // needs no data block
	write(t, dir, "x", "lost")
	if f, err := os.Open(dir + "/x"); err == nil {
		f.Sync()
		f.Close()
	}
	unix.Unmount(dir, unix.MNT_DETACH)
	waitFor(t, "removal", func() bool { return s.Remove(ctx, "c", RemoveOptions{}) == nil })
	ok(t, r.pool.Delete(ctx, 1))
	ok(t, s.Remove(ctx, "d", RemoveOptions{}))
	create(t, s, "e", "a")
	if m := contents(r, "e"); len(m["a"]) != 4<<20 {
		t.Errorf("contents %d", len(m["a"]))
	}
}
