package security

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/internal/testbox"
)

// writeNBD writes bytes at an offset of an NBD export with another project's client.
func (b *box) writeNBD(uri string, data []byte) {
	b.Helper()
	tool, err := exec.LookPath("nbdcopy")
	if err != nil {
		b.Skip("SKIPPED: nbdcopy (libnbd-bin) is not installed")
	}
	file := b.write("guest.img", string(data))
	c := exec.Command(tool, "--flush", file, uri)
	c.WaitDelay = time.Second
	timer := time.AfterFunc(time.Minute, func() { c.Process.Kill() })
	defer timer.Stop()
	if out, err := c.CombinedOutput(); err != nil {
		b.Fatalf("nbdcopy: %v\n%s", err, out)
	}
}

// TestGuestOwnedIsNeverMounted: a virtual machine writes what it likes over its file system. The
// host copies, commits, grows and removes it by its blocks, and refuses whatever would have to look
// into it. That it really does not look shows in this: every mount of what the guest wrote fails,
// and what --trust-guest does fails so.
func TestGuestOwnedIsNeverMounted(t *testing.T) {
	b := newBox(t)
	b.start()
	b.image()
	b.mica("create", "small", "vm")
	uri := b.mica("attach", "vm", "--as", "nbd")
	// An ext4 superblock of a hostile guest: the magic is right, the rest is not.
	evil := bytes.Repeat([]byte{0xff}, 4<<20)
	copy(evil[1024+56:], []byte{0x53, 0xef})
	b.writeNBD(uri, evil)
	trusted := func(args ...string) {
		t.Helper()
		// A clean error of a file system that cannot be used, not "a guest wrote it".
		_, stderr, code := testbox.Run(b, b.command(append(args, "--trust-guest")...))
		if code != 1 || !strings.Contains(stderr, "ext4") && !strings.Contains(stderr, "file system") || strings.Contains(stderr, "--trust-guest") {
			t.Errorf("%q --trust-guest: exit status %d, %s", args, code, stderr)
		}
	}
	work := func(state string) {
		t.Helper()
		b.mica("snapshot", "vm", state)
		b.mica("fork", "vm", "fork-"+state)
		b.mica("commit", "vm", "image-"+state)
		b.mica("create", "image-"+state, "of-"+state)
		b.mica("resize", "vm", map[string]string{"attached": "128M", "detached": "192M"}[state])
		for _, n := range []string{"vm", "fork-" + state, "of-" + state} {
			b.refused(b.command("mount", n), "guest")
			b.refused(b.command("diff", n, "-o", b.path("d.tar")), "guest")
			var c struct {
				GuestOwned bool `json:"guest_owned"`
			}
			if err := json.Unmarshal([]byte(b.mica("inspect", n)), &c); err != nil || !c.GuestOwned {
				t.Errorf("%s is not the guest's: %v", n, err)
			}
		}
		if _, err := os.Stat(b.path("d.tar")); err == nil {
			t.Error("a refused diff left a file")
		}
	}
	work("attached")
	b.mica("detach", "vm")
	work("detached")
	b.refused(b.command("attach", "vm"), "guest")
	trusted("mount", "vm")
	trusted("commit", "vm", "trusted")
	b.mica("rollback", "vm", "attached")
	b.refused(b.command("mount", "vm"), "guest")
	if m := testbox.Mounts(b.dir); len(m) > 0 {
		for _, dir := range m {
			if !strings.Contains(dir, "/fuse/") {
				t.Errorf("mounted: %q", m)
			}
		}
	}
	entries, err := os.ReadDir(filepath.Join(b.run, "mnt"))
	if err != nil || len(entries) > 0 {
		t.Errorf("in RUN/mnt: %v, %v", entries, err)
	}
	for _, n := range []string{"fork-attached", "of-attached", "fork-detached", "of-detached"} {
		b.mica("rm", n)
	}
	// The daemon is as well as before.
	b.mica("create", "small", "after")
	dir := b.mica("mount", "after")
	if text, err := os.ReadFile(filepath.Join(dir, "etc/secret")); err != nil || string(text) != "secret" {
		t.Errorf("another container: %q, %v", text, err)
	}
}
