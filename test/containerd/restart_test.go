package containerd

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestRestarts kills containerd and the daemon, by force, while containers run and write. Both come
// back with no manual step, and nothing of what the containers wrote is lost.
func TestRestarts(t *testing.T) {
	each(t, func(t *testing.T, b *box) {
		b.up()
		before := b.settled()
		b.load(b.testImage())
		// Each line is on the device before the next begins.
		script := "i=0; while true; do i=$((i+1)); echo $i > /n.new; dd if=/n.new of=/n conv=fsync 2>/dev/null; echo $i >> /log; done"
		names := []string{"a", "b", "c"}
		for _, n := range names {
			b.run(imageName, n, script)
		}
		moves := func(what string) {
			t.Helper()
			for _, n := range names {
				first := b.count(n)
				b.waitFor(fmt.Sprintf("progress of %s after %s", n, what), func() bool { return b.count(n) > first })
			}
		}
		moves("the start")

		b.daemon.end(syscall.SIGKILL)
		time.Sleep(300 * time.Millisecond)
		b.startMica()
		moves("the daemon was killed")
		b.daemon.end(syscall.SIGTERM)
		// The devices stay, and whoever reads the log knows who has them. Without the daemon containerd says
		// which socket does not answer.
		for _, n := range names {
			pattern := fmt.Sprintf(`stays, and waits for the next start.*object=snap/mica/%s/[0-9]+/%s .*users=.*rootfs`, b.ns, n)
			if log, _ := os.ReadFile(b.path("mica.log")); !regexp.MustCompile(pattern).Match(log) {
				t.Errorf("the log does not say who holds the device of %s:\n%s", n, log)
			}
		}
		_, err := b.tryCtr(20*time.Second, "snapshots", "--snapshotter", "mica", "ls")
		if err == nil || !strings.Contains(err.Error(), "unavailable") && !strings.Contains(err.Error(), b.path("run/snapshotter.sock")) {
			t.Errorf("a call without the daemon: %v", err)
		}
		b.startMica()
		moves("the daemon was restarted in order")

		b.containerd.end(syscall.SIGKILL)
		b.startContainerd()
		moves("containerd was killed")

		b.containerd.end(syscall.SIGKILL)
		b.daemon.end(syscall.SIGKILL)
		b.startMica()
		b.startContainerd()
		moves("both were killed")

		// Killed in the middle of an import, and while containers are being made.
		b.ctr("images", "rm", "--sync", imageName) // the containers keep their snapshots
		done := make(chan error, 1)
		go func() {
			_, err := b.tryCtr(time.Minute, "images", "import", "--snapshotter", "mica", b.path("image.tar"))
			done <- err
		}()
		time.Sleep(60 * time.Millisecond)
		b.daemon.end(syscall.SIGKILL)
		b.startMica()
		if err := <-done; err != nil {
			t.Logf("the import that was under way: %v", err)
		}
		// containerd waits up to 3 s before it dials a socket again that was not there.
		b.waitFor("containerd's next try", func() bool {
			_, err := b.tryCtr(time.Minute, "images", "import", "--snapshotter", "mica", b.path("image.tar"))
			return err == nil
		})
		moves("the daemon was killed during an import")

		for _, n := range names {
			log := strings.Fields(b.exec(n, "cat /log"))
			for i, v := range log {
				if v != strconv.Itoa(i+1) {
					t.Fatalf("%s: line %d of its log says %s", n, i+1, v)
				}
			}
			t.Logf("%s wrote %d lines", n, len(log))
		}
		b.kill(names...)
		b.ctr("images", "rm", "--sync", imageName)
		b.wantBack(before)
	})
}

// count is how many lines a container has written.
func (b *box) count(name string) int {
	b.Helper()
	n, err := strconv.Atoi(strings.Fields(b.exec(name, "wc -l < /log") + " 0")[0])
	if err != nil {
		b.Fatal(err)
	}
	return n
}
