package containerd

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestLife is the whole life of an image and its containers. At the end the pool holds what it held
// at the beginning.
func TestLife(t *testing.T) {
	eachFS(t, func(t *testing.T, b *box) {
		b.up()
		before := b.settled()
		b.load(b.testImage())
		image := b.settled()
		t.Logf("the image: %d blocks of 64 KiB", image.Pool.DataUsed-before.Pool.DataUsed)
		if got := b.in(imageName, "first", "cat /etc/greeting; ls /big; echo new > /etc/new; cat /etc/new"); got != "hello again\nnew\n" {
			t.Errorf("the container says %q", got)
		}
		if got := b.in(imageName, "second", "ls /etc/new || true"); got != "" {
			t.Errorf("another container sees %q", got)
		}
		b.wantBack(image)
		out := b.ctr("run", "--rm", "--snapshotter", "mica", "--snapshotter-label", "containerd.io/snapshot/mica.size=3G",
			imageName, "large", "/bin/df", "-k", "/")
		if f := strings.Fields(out); len(f) < 9 || len(f[8]) < 7 || f[8] < "2800000" {
			t.Errorf("a container of 3 GiB says:\n%s", out)
		}

		// A committed container: snapshots are made from it.
		b.run(imageName, "base", "echo kept > /kept; dd if=/kept of=/kept2 conv=fsync; sleep 1000")
		b.waitFor("the file", func() bool { return strings.Contains(b.exec("base", "ls /"), "kept2") })
		b.ctr("tasks", "kill", "-s", "SIGKILL", "base")
		b.waitFor("the end", func() bool { return b.stopped("base") })
		b.ctr("tasks", "rm", "base")
		b.ctr("snapshots", "--snapshotter", "mica", "commit", "kept", "base")
		b.root("kept")
		b.ctr("snapshots", "--snapshotter", "mica", "prepare", "again", "kept")
		b.root("again")
		if got := b.readSnapshot("again", "kept"); got != "kept\n" {
			t.Errorf("the committed snapshot holds %q", got)
		}
		b.ctr("snapshots", "--snapshotter", "mica", "view", "look", "kept")
		b.root("look")
		if got := b.readSnapshot("look", "etc/greeting"); got != "hello again\n" {
			t.Errorf("a view shows %q", got)
		}
		b.ctr("snapshots", "--snapshotter", "mica", "rm", "again")
		b.ctr("snapshots", "--snapshotter", "mica", "rm", "look")
		b.ctr("snapshots", "--snapshotter", "mica", "rm", "kept")
		b.ctr("containers", "rm", "base")
		b.wantBack(image)

		b.crowd(20)
		b.wantBack(image)
		b.ctr("images", "rm", "--sync", imageName)
		b.wantBack(before)
		if out := b.ctr("snapshots", "--snapshotter", "mica", "ls"); strings.Count(out, "\n") != 1 {
			t.Errorf("snapshots are left:\n%s", out)
		}
	})
}

// root keeps a snapshot that nothing refers to from containerd's garbage collection.
func (b *box) root(key string) {
	b.Helper()
	b.ctr("snapshots", "--snapshotter", "mica", "label", key, "containerd.io/gc.root=test")
}

// crowd runs containers at once, each writing, and removes them.
func (b *box) crowd(n int) {
	b.Helper()
	var wg sync.WaitGroup
	var names []string
	errs := make(chan error, n)
	start := time.Now()
	for i := range n {
		name := fmt.Sprintf("w%d", i)
		names = append(names, name)
		wg.Go(func() {
			_, err := b.tryCtr(time.Minute, "run", "-d", "--snapshotter", "mica", imageName, name, "/bin/sh", "-c",
				fmt.Sprintf("echo %d > /mine; dd if=/bin/busybox of=/copy conv=fsync 2>/dev/null; sleep 1000", i))
			errs <- err
		})
	}
	wg.Wait()
	for range n {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
	b.Logf("%d containers at once: %v", n, time.Since(start).Round(time.Millisecond))
	for i, name := range names {
		b.waitFor("the copy", func() bool { return strings.Contains(b.exec(name, "ls /"), "copy") })
		if got := b.exec(name, "cat /mine; cat /etc/greeting"); got != fmt.Sprintf("%d\nhello again\n", i) {
			b.Errorf("%s holds %q", name, got)
		}
	}
	b.kill(names...)
}

// readSnapshot mounts a snapshot as ctr says and reads a file.
func (b *box) readSnapshot(key, name string) string {
	b.Helper()
	dir, err := os.MkdirTemp(b.dir, "m")
	if err != nil {
		b.Fatal(err)
	}
	argv := strings.Fields(b.ctr("snapshots", "--snapshotter", "mica", "mounts", dir, key))
	if len(argv) < 5 || argv[0] != "mount" {
		b.Fatalf("mounts of %s: %q", key, argv)
	}
	if _, err := run(time.Minute, argv...); err != nil {
		b.Fatal(err)
	}
	text, err := os.ReadFile(dir + "/" + name)
	if _, uerr := run(time.Minute, "umount", dir); uerr != nil {
		b.Error(uerr)
	}
	if err != nil {
		b.Error(err)
	}
	return string(text)
}

// TestMetrics: the daemon's figures count what containerd did.
func TestMetrics(t *testing.T) {
	r := releases(t)[0]
	b := newBox(t, r).up()
	b.load(b.testImage())
	page := b.metrics()
	for _, want := range []string{
		`mica_containerd_call_seconds_count{server="mica",method="Prepare",code="OK"} 3`,
		`mica_containerd_call_seconds_count{server="mica",method="Commit",code="OK"} 3`,
		"mica_containerd_snapshots 3", `mica_pool_mode{mode="rw"} 1`,
	} {
		if !strings.Contains(page, want+"\n") {
			t.Errorf("the page does not have %s:\n%s", want, page)
		}
	}
	if out := b.mustMica("ls", "--all"); strings.Contains(out, "containerd/mica") {
		t.Errorf("committed snapshots are listed:\n%s", out)
	}
	b.run(imageName, "c", "sleep 1000")
	if out := b.mustMica("ls", "--all"); !strings.Contains(out, "containerd/mica/"+b.ns+"/") {
		t.Errorf("the container is not listed:\n%s", out)
	}
	// Nothing is taken down under a container that runs.
	if _, err := b.tryMica("shutdown"); err == nil || !strings.Contains(err.Error(), "rootfs") {
		t.Errorf("shutdown with a running container: %v", err)
	}
	if got := b.exec("c", "cat /etc/greeting"); got != "hello again\n" {
		t.Errorf("the container says %q", got)
	}
	b.kill("c")
	b.ctr("images", "rm", "--sync", imageName)
}

// metrics asks the daemon for its figures.
func (b *box) metrics() string {
	b.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", b.path("run/mica.sock"))
	}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://mica/v1/metrics")
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		b.Fatalf("metrics: %v, status %d", err, resp.StatusCode)
	}
	return string(text)
}

// TestUserNamespace: a container in a user namespace gets its files mapped by the mount; nothing is
// copied for it.
func TestUserNamespace(t *testing.T) {
	eachFS(t, func(t *testing.T, b *box) {
		if b.major < 2 {
			t.Skip("SKIPPED: containerd 1.6 maps no mounts")
		}
		b.up()
		b.load(b.testImage())
		before := b.settled()
		b.ctr("run", "-d", "--snapshotter", "mica", "--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536",
			imageName, "mapped", "/bin/sh", "-c", "stat -c %u:%g /etc/greeting > /owner; sleep 1000")
		b.waitFor("the container", func() bool { return strings.Contains(b.exec("mapped", "ls /"), "owner") })
		if got := b.exec("mapped", "cat /owner"); got != "0:0\n" {
			t.Errorf("inside, the owner is %q", got)
		}
		most := map[string]uint64{"ext4": 16, "xfs": 34 + 16}[b.fs] // with what a mount of each costs
		if n := b.status().Pool.DataUsed - before.Pool.DataUsed; n > most {
			t.Errorf("a mapped container of an image of 3 MiB took %d blocks, want %d at most", n, most)
		}
		b.kill("mapped")
		b.ctr("images", "rm", "--sync", imageName)
	})
}
