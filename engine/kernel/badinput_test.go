//go:build guest

package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export/loop"
	"mica/internal/dmioctl"
	"mica/thin"
)

// opens expects Open to fail, with an error that is want and says what to do, and with nothing
// left behind.
func opens(t *testing.T, src Source, o Options, want error, says ...string) {
	t.Helper()
	before := leftOver(t)
	if o.LockWait == 0 {
		o.LockWait = 1
	}
	p, err := Open(ctx, src, o)
	if err == nil {
		p.Close()
		t.Fatalf("%s was opened", src)
	}
	if want != nil && !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", src, err, want)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %q does not say %q", src, err, s)
		}
	}
	if after := leftOver(t); fmt.Sprint(len(after)) != fmt.Sprint(len(before)) {
		t.Errorf("%s: in the kernel are %v, were %v", src, after, before)
	}
}

// good opens and closes the pool that a failure must have left as it was.
func good(t *testing.T, src Source) {
	t.Helper()
	p, err := Open(ctx, src, Options{})
	if err != nil {
		t.Fatalf("the pool is not as it was: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBadPools(t *testing.T) {
	dir := newDir(t, 16<<20, 2<<20, 64<<10)
	src := Source{Dir: dir}
	for _, s := range []Source{{}, {Dir: dir, Pool: "x"}, {Dir: dir, Data: "x", Metadata: "y"}, {Data: "x"}, {Metadata: "x"}} {
		opens(t, s, Options{}, nil)
	}
	opens(t, Source{Dir: "/no/such/dir"}, Options{}, os.ErrNotExist)
	opens(t, src, Options{BlockSize: 128 << 10}, nil, "65536 bytes, not of 131072", "keeps the block size")
	opens(t, Source{Data: "/dev/null", Metadata: dir + "/metadata"}, Options{}, nil, "neither a regular file nor a block device")
	good(t, src)

	// Damaged, too short, not a pool.
	short := newDir(t, 16<<20, 2<<20, 64<<10)
	if err := os.Truncate(short+"/data", 1<<20); err != nil {
		t.Fatal(err)
	}
	opens(t, Source{Dir: short}, Options{}, nil, "too short", "256 blocks of 65536 bytes")
	bad := newDir(t, 16<<20, 2<<20, 64<<10)
	f, err := os.OpenFile(bad+"/metadata", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte{1, 2, 3}, 100)
	f.Close()
	opens(t, Source{Dir: bad}, Options{}, thin.ErrCorrupt)
	none := newDir(t, 16<<20, 2<<20, 64<<10)
	os.Truncate(none+"/metadata", 0)
	os.Truncate(none+"/metadata", 2<<20)
	opens(t, Source{Dir: none}, Options{}, nil, "no thin pool") // the kernel would format it
	b, _ := os.ReadFile(none + "/metadata")
	if len(strings.Trim(string(b), "\x00")) > 0 {
		t.Error("an empty metadata device was formatted")
	}
	deep := newDir(t, 16<<20, 2<<20, 64<<10) // damage that only the kernel finds
	f, err = os.OpenFile(deep+"/metadata", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(4096); off < 64<<10; off += 4096 {
		f.WriteAt([]byte{9, 9, 9}, off+50)
	}
	f.Close()
	opens(t, Source{Dir: deep}, Options{}, nil, "damaged", "pool check")
}

func TestHeldPools(t *testing.T) {
	dir := newDir(t, 16<<20, 2<<20, 64<<10)
	src := Source{Dir: dir}
	// By this engine, by the other one, by a loop device in use.
	p, err := Open(ctx, src, Options{})
	if err != nil {
		t.Fatal(err)
	}
	opens(t, src, Options{}, dev.ErrLocked, fmt.Sprintf("process %d", os.Getpid()))
	if _, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{LockWait: 1}); !errors.Is(err, dev.ErrLocked) {
		t.Errorf("the user engine opens a pool that the kernel has: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	u, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{})
	if err != nil {
		t.Fatal(err)
	}
	opens(t, src, Options{}, dev.ErrLocked, "process")
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := loop.Attach(ctx, loop.Config{Backing: dir + "/data"})
	if err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(l.Node, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(ctx, src, Options{LockWait: 1})
	if !errors.Is(err, loop.ErrBusy) {
		t.Errorf("data is under somebody else's loop device: %v, want ErrBusy", err)
	}
	if _, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{LockWait: 1}); !errors.Is(err, dev.ErrLocked) || !strings.Contains(err.Error(), l.Node) {
		t.Errorf("the user engine opens a pool whose data is under a loop device: %v", err)
	}
	held.Close()
	good(t, src)

	// Block devices: mounted, part of another device.
	dm, err := dmioctl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dm.Close()
	s := newFaultStore(t, newDir(t, 32<<20, 2<<20, 64<<10), 2<<20)
	devices := Source{Data: s.data.Node, Metadata: s.node}
	good(t, devices)
	info, err := dm.Activate("holder", "", false, dmioctl.LinearTarget(s.data.Node, 0, 128))
	if err != nil {
		t.Fatal(err)
	}
	opens(t, devices, Options{}, dev.ErrLocked, s.data.Node, "dm-", "take it out")
	_ = info
	if err := dm.Remove("holder", false); err != nil {
		t.Fatal(err)
	}
	good(t, devices)
	if out, err := exec.Command("mke2fs", "-q", "-F", s.data.Node).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	if err := unix.Mount(s.data.Node, "/mnt", "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	opens(t, devices, Options{}, dev.ErrLocked, "mounted on /mnt", "unmount it")
	if err := unix.Unmount("/mnt", 0); err != nil {
		t.Fatal(err)
	}
	good(t, devices)
}

// TestFailedPool: a pool in mode Fail is not taken over; what to do is said. Once it is checked it
// opens again.
func TestFailedPool(t *testing.T) {
	s := newFaultStore(t, newDir(t, 16<<20, 2<<20, 64<<10), 2<<20)
	src := Source{Data: s.data.Node, Metadata: s.node}
	p, err := Open(ctx, src, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.CreateThin(ctx, 1); err != nil {
		t.Fatal(err)
	}
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	events, cancel := p.Events()
	defer cancel()
	// All writes fail, those of the superblock too: the pool cannot even be marked.
	if err := s.dm.Reload(s.name, false, true, true, dmioctl.Target{Length: s.sectors, Type: "flakey",
		Params: s.meta.Node + " 0 0 3600 1 error_writes"}); err != nil {
		t.Fatal(err)
	}
	d.WriteAt(make([]byte, 4096), 0)
	if err := d.Flush(); err == nil {
		t.Error("a flush of a failing pool was acknowledged")
	}
	st, err := p.Status(ctx)
	if err != nil || st.Mode != "Fail" && st.Mode != "ro" || st.FailReason == "" || st.DataBlocks != 256 || st.BlockSize != 64<<10 {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := p.CreateThin(ctx, 2); !errors.Is(err, engine.ErrFailed) && !errors.Is(err, dev.ErrReadOnly) {
		t.Errorf("create in a failed pool: %v", err)
	}
	if _, err := d.WriteAt(make([]byte, 4096), 512<<10); err == nil {
		t.Error("a failed pool has taken a write")
	}
	if err := p.Commit(ctx); err == nil {
		t.Error("a failed pool has committed")
	}
	if !d.(*Thin).Lost() {
		t.Error("nobody is told that writes were lost")
	}
	select {
	case e := <-events:
		if e.Kind != engine.EventMode {
			t.Errorf("event %+v", e)
		}
	default:
		t.Error("no event")
	}
	d.(*Thin).KeepNode(true)
	d.Close()
	if err := p.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if st.Mode == "Fail" {
		_, err := Open(ctx, src, Options{})
		if !errors.Is(err, engine.ErrFailed) || !strings.Contains(err.Error(), "check") {
			t.Errorf("take over a failed pool: %v, want ErrFailed", err)
		}
	}
	s.Fail(t, false)
	if err := errors.Join(s.dm.Remove(thinName(p.id, 1), false), s.dm.Remove(p.name, false)); err != nil {
		t.Fatal(err)
	}
	m := s.Metadata(t)
	if rep, err := thin.Check(m, thin.CheckOptions{RepairLeaks: true, ClearNeedsCheck: true}); err != nil || !rep.Clean() {
		t.Errorf("check: %v %v", rep, err)
	}
	m.Close()
	good(t, src)
}

// TestRefusedTable: a table that the kernel refuses leaves the pool as it was.
func TestRefusedTable(t *testing.T) {
	s := newFaultStore(t, newDir(t, 16<<20, 2<<20, 64<<10), 2<<20)
	p, err := Open(ctx, Source{Data: s.data.Node, Metadata: s.node}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.GrowData(ctx, 64<<20); !errors.Is(err, dev.ErrOutOfRange) || !strings.Contains(err.Error(), "make the device longer first") {
		t.Errorf("grow beyond the device: %v", err)
	}
	if err := p.GrowMetadata(ctx, 64<<20); !errors.Is(err, dev.ErrOutOfRange) {
		t.Errorf("grow the metadata beyond the device: %v", err)
	}
	other := p.table(512)
	if err := p.dm.Reload(p.name, false, true, true, other); err == nil {
		t.Error("the kernel has taken a table that is longer than the data device")
	}
	wrong := p.table(256)
	wrong.Params = strings.Replace(wrong.Params, number(p.data.rdev), number(p.meta.rdev), 1)
	if err := p.dm.Reload(p.name, false, true, true, wrong); err == nil {
		t.Error("the kernel has taken a table with another data device")
	} else if err := p.refused(err); !strings.Contains(err.Error(), "dmesg") {
		t.Errorf("refused table: %v", err)
	}
	if info, err := p.dm.Info(p.name); err != nil || info.Suspended() {
		t.Fatalf("the pool is left suspended: %+v, %v", info, err)
	}
	use(t, p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestNoTargets: without device-mapper, or without its targets, the error says what to load.
func TestNoTargets(t *testing.T) {
	dir := newDir(t, 16<<20, 2<<20, 64<<10)
	if err := os.Rename("/dev/mapper/control", "/dev/mapper/control.away"); err != nil {
		t.Fatal(err)
	}
	_, err := Open(ctx, Source{Dir: dir}, Options{})
	active, aerr := Active(Source{Dir: dir})
	if err := os.Rename("/dev/mapper/control.away", "/dev/mapper/control"); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "dm_mod") {
		t.Errorf("without device-mapper: %v", err)
	}
	if active || aerr != nil {
		t.Errorf("without device-mapper a pool is active: %v, %v", active, aerr)
	}
	targets = append(targets, "mica-no-such")
	defer func() { targets = targets[:len(targets)-1] }()
	if _, err := Open(ctx, Source{Dir: dir}, Options{}); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "dm_thin_pool") {
		t.Errorf("without the target: %v", err)
	}
}

// TestWaitingJournal: what the user engine acknowledged before its process was killed is not
// overtaken.
func TestWaitingJournal(t *testing.T) {
	dir := newDir(t, 16<<20, 2<<20, 64<<10)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), userChildDir+"="+dir)
	out, err := cmd.CombinedOutput() // it kills itself
	if err == nil || !strings.Contains(string(out), "written") {
		t.Fatalf("child: %v, %s", err, out)
	}
	opens(t, Source{Dir: dir}, Options{}, ErrJournal, "open it once with the user engine")
	u, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(ctx, Source{Dir: dir}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := d.ReadAt(b, 100); err != nil || string(b) != "hello" {
		t.Errorf("device holds %q, %v", b, err)
	}
	if err := errors.Join(d.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}
}

// userChild acknowledges a write that no commit knows of, and dies.
func userChild(dir string) error {
	p, err := user.Open(ctx, user.Location{Dir: dir}, user.Options{CommitInterval: 1 << 40})
	if err != nil {
		return err
	}
	if err := p.CreateThin(ctx, 1); err != nil {
		return err
	}
	d, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: 1 << 20})
	if err != nil {
		return err
	}
	if _, err := d.WriteAt([]byte("hello"), 100); err != nil {
		return err
	}
	fmt.Println("written")
	return unix.Kill(os.Getpid(), unix.SIGKILL)
}

// TestNodeInTheWay: a pool whose node cannot be had is not left active, nor its loop devices.
func TestNodeInTheWay(t *testing.T) {
	src := Source{Dir: newDir(t, 16<<20, 1<<20, 64<<10)}
	var made []string
	clear := func() {
		for _, path := range made {
			os.Remove(path)
		}
		made = nil
	}
	defer clear()
	for n := range 32 {
		path := fmt.Sprintf("/dev/dm-%d", n)
		if f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			f.Close()
			made = append(made, path)
		}
	}
	if p, err := Open(ctx, src, Options{}); err == nil {
		p.Close()
		t.Fatal("opened although something else has the name of its node")
	}
	if active, err := Active(src); err != nil || active {
		t.Errorf("active after the failure: %v, %v", active, err)
	}
	for _, path := range []string{src.dataPath(), src.metadataPath()} {
		m := &medium{path: path}
		if loops := m.loops(); len(loops) > 0 {
			t.Errorf("%s is under loop devices %v", path, loops)
		}
	}
	clear()
	p, err := Open(ctx, src, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
