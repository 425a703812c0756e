package exporttest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mica/export"

	"golang.org/x/sys/unix"
)

// Modes of RunUdev, in the environment: "with" the rules that are shipped, or "without" them.
const udevVar = "MICA_UDEVD"

// udevCycles is how often a device is attached and detached; MICA_UDEV_CYCLES says otherwise.
const udevCycles = 10

// RunUdev tests that udevd leaves the nodes alone, on a machine where it runs. Without the shipped
// rules it must be seen to meddle, if udev knows the kind of node at all (known).
func RunUdev(t *testing.T, d Driver, known bool) {
	mode := os.Getenv(udevVar)
	if mode == "" {
		t.Skipf("SKIPPED here, runs in the test machine with udevd (test/kernel)")
	}
	o := options("/run/mica-udevtest")
	o.LinkDir, o.Patience = "/dev/mica", 30*time.Second
	t.Cleanup(func() {
		if left := d.Left(o.Dir); len(left) > 0 {
			t.Errorf("left in the kernel: %q", left)
		}
		if d.End != nil {
			d.End(o)
		}
		os.RemoveAll(o.Dir)
	})
	r := &rig{t: t, d: d, o: o}
	r.open()

	uuid := "6d696361-0000-4000-8000-" + strings.Repeat("0", 11) + "1"
	m, reads := udevDisk(t, uuid)
	link := "/dev/disk/by-uuid/" + uuid
	a, err := r.e.Attach(within(t, time.Minute), "probe", m, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node := a.Node()
	settle(t)
	if mode == "without" {
		if known && missing(link) {
			t.Errorf("udevd makes no %s without the rules: this test sees nothing", link)
		}
		if known && reads.Load() == 0 {
			t.Error("udevd reads nothing without the rules: this test sees nothing")
		}
		detachPatiently(t, a)
		return
	}
	if n := reads.Load(); n > 0 {
		t.Errorf("%d reads of a node that nobody has asked for", n)
	}
	if !missing(link) {
		to, _ := os.Readlink(link)
		t.Errorf("%s leads to %s", link, to)
	}
	props, err := exec.Command("udevadm", "info", "--query=property", "--name="+node).CombinedOutput()
	if err != nil {
		t.Fatalf("udevadm info: %v\n%s", err, props)
	}
	for _, want := range []string{"SYSTEMD_READY=0", "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG=1"} {
		if !strings.Contains(string(props), want) {
			t.Errorf("%s lacks %s:\n%s", node, want, props)
		}
	}
	for _, bad := range []string{"ID_FS_UUID", "ID_FS_USAGE", "by-uuid"} {
		if strings.Contains(string(props), bad) {
			t.Errorf("%s has %s:\n%s", node, bad, props)
		}
	}
	if watched(t, node) {
		t.Errorf("udevd watches %s", node)
	}
	r.detach(a)

	// Whoever detaches after the last close can. udevd itself has the node open while it handles an
	// event (it locks every block device), which is what a detach waits for; it has no reason to come
	// back.
	n := number("MICA_UDEV_CYCLES", udevCycles)
	begin, longest := time.Now(), time.Duration(0)
	for i := range n {
		reads.Store(0)
		a, err := r.e.Attach(within(t, time.Minute), "cycle", m, export.AttachOptions{})
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		f, err := os.OpenFile(a.Link(), os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		if _, err := f.WriteAt(aligned(t, 4096), 1<<20); err != nil {
			t.Errorf("cycle %d: %v", i, err)
		}
		f.Close() // after a write: whoever watches the node looks at it now
		last := time.Now()
		if err := a.Detach(within(t, time.Minute)); err != nil {
			t.Fatalf("cycle %d: %v", i, err)
		}
		longest = max(longest, time.Since(last))
		if reads.Load() > 0 {
			t.Fatalf("cycle %d: somebody read the node", i)
		}
	}
	settle(t)
	if !missing(link) {
		t.Errorf("%s is there after %d cycles", link, n)
	}
	t.Logf("%d cycles of attach, write and detach without EBUSY in %v, longest detach %v", n, time.Since(begin).Round(time.Millisecond), longest.Round(time.Millisecond))
}

// udevDisk is a disk with an ext4 file system, and the number of its reads. The first page is not
// counted: whoever opens a node may make the kernel look there for partitions.
func udevDisk(t *testing.T, uuid string) (*disk, *atomic.Int64) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-U", uuid, file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m, reads := newDisk(int64(len(b))), &atomic.Int64{}
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	m.setBefore(func(write bool, off int64) error {
		if !write && off > 0 {
			reads.Add(1)
		}
		return nil
	})
	return m, reads
}

// settle waits until udevd has nothing to do.
func settle(t *testing.T) {
	t.Helper()
	time.Sleep(100 * time.Millisecond) // a watch answers a close with an event of its own
	if out, err := exec.Command("udevadm", "settle", "--timeout=60").CombinedOutput(); err != nil {
		t.Fatalf("udevadm settle: %v\n%s", err, out)
	}
}

// watched reports whether udevd has an inotify watch on a node.
func watched(t *testing.T, node string) bool {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		t.Fatal(err)
	}
	list, _ := os.ReadDir("/run/udev/watch")
	id := fmt.Sprintf("b%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, f := range list {
		if to, err := os.Readlink("/run/udev/watch/" + f.Name()); err == nil && (to == id || f.Name() == id) {
			return true
		}
	}
	return false
}

func detachPatiently(t *testing.T, a export.Attachment) {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = a.Detach(within(t, time.Minute)); err == nil {
			return
		}
	}
	t.Error(err)
}
