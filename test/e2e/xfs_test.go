package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/layer"
)

// eachFS runs a test on every kind of base file system.
func eachFS(t *testing.T, fn func(t *testing.T, fs string)) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs.xfs"); fs == "xfs" && err != nil {
				t.Skip("SKIPPED: needs mkfs.xfs (package xfsprogs)")
			}
			fn(t, fs)
		})
	}
}

// fileSystem is that of the base; before start.
func (b *box) fileSystem(fs string) {
	b.config = strings.Replace(b.config, "[containers]\n", fmt.Sprintf("[containers]\nfile_system = %q\n", fs), 1)
}

// TestFileSystems: the whole life of a container on each file system, mounted where that is harder.
// Copies of one file system are mounted beside each other; a copy of what is mounted is checked by the
// file system's own tool; what was discarded comes back.
func TestFileSystems(t *testing.T) {
	eachFS(t, func(t *testing.T, fs string) {
		b := newBox(t, "xfs_repair")
		b.fileSystem(fs)
		b.start()
		b.smallImage()
		before := b.figures()
		c := asJSON[layer.Container](b, "create", "small", "web")
		if c.FSType != fs {
			t.Errorf("the container is on %s", c.FSType)
		}
		dir := b.mount("web")
		b.writeFile("mnt/web/a", []byte("one"))
		snap := asJSON[layer.Snapshot](b, "snapshot", "web", "s")
		if snap.Level != layer.LevelFileSystem {
			t.Errorf("the snapshot is of level %s", snap.Level)
		}
		b.writeFile("mnt/web/a", []byte("two"))
		b.writeFile("mnt/web/large", pattern(7, 20<<20))
		b.mica("fork", "web", "other", "third")
		for name, want := range map[string]string{"other": "two", "third": "two"} {
			if got := string(b.readFile(filepath.Join(b.mount(name), "a"))); got != want {
				t.Errorf("%s holds %q, want %q", name, got, want)
			}
		}
		b.mica("umount", "third")
		b.check("third", fs)

		// Growing, mounted where the machine allows it.
		space := func() int64 {
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil {
				t.Fatal(err)
			}
			return int64(st.Blocks) * st.Bsize
		}
		small := space()
		if _, stderr, code := b.try("resize", "web", "2G"); code != 0 {
			if fs != "ext4" || !strings.Contains(stderr, "CAP_SYS_RESOURCE") {
				t.Errorf("resize of a mounted container: %s", stderr)
			}
			t.Logf("SKIPPED: growing mounted: %s", stderr)
		} else if n := space(); n < small+1<<30 {
			t.Errorf("the file system has %d bytes after growing, %d before", n, small)
		}

		tar := b.path("diff.tar")
		b.mica("diff", "web", "-o", tar)
		if list := b.sh("tar", "-tf", tar); !strings.Contains(list, "large\n") || strings.Contains(list, "big\n") {
			t.Errorf("the difference has\n%s", list)
		}
		b.mica("commit", "web", "web:2")
		b.mica("create", "web:2", "again")
		if got := string(b.readFile(filepath.Join(b.mount("again"), "a"))); got != "two" {
			t.Errorf("the committed image holds %q", got)
		}
		for _, name := range []string{"again", "other", "web"} {
			b.mica("umount", name)
		}
		b.check("web", fs)
		b.mica("rollback", "web", "s")
		if got := string(b.readFile(filepath.Join(b.mount("web"), "a"))); got != "one" {
			t.Errorf("rolled back, it holds %q", got)
		}
		// What is deleted comes back to the pool, when the journal or log has got to it.
		b.writeFile("mnt/web/large", pattern(9, 40<<20))
		syncFS(t, dir)
		full := b.status().Pool.DataUsed
		b.sh("rm", dir+"/large")
		b.eventually("the blocks of a deleted file are freed", func() bool {
			syncFS(t, dir)
			return b.status().Pool.DataUsed+600 < full
		})
		b.mica("umount", "web")
		b.mica("rm", "other", "third", "again")
		b.mica("snapshot", "rm", "web", "s")
		b.mica("rm", "web")
		b.mica("image", "rm", "web:2")
		if after := b.figures(); after != before {
			t.Errorf("at the end %+v, at the beginning %+v", after, before)
		}
		b.shutdown()
	})
}

func syncFS(t *testing.T, dir string) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		t.Fatal(err)
	}
}

// check looks at a detached container's file system with its own tool.
func (b *box) check(name, fs string) {
	b.Helper()
	node := strings.TrimSpace(b.mica("attach", name, "--read-only"))
	if fs == "xfs" {
		b.sh("xfs_repair", "-n", node)
	} else {
		b.sh("e2fsck", "-fn", node)
	}
	b.mica("detach", name)
}

// TestXFSTooSmall: a base that mkfs.xfs would refuse is refused at the start, with the numbers.
func TestXFSTooSmall(t *testing.T) {
	b := newBox(t, "mkfs.xfs")
	b.noCheck = true
	b.config = strings.Replace(b.config, `"512M"`, `"256M"`, 1)
	b.fileSystem("xfs")
	_, stderr, code := b.tryCommand(b.command(b.serveArgs()...))
	if code != 1 || !strings.Contains(stderr, "256M") || !strings.Contains(stderr, "300M") {
		t.Errorf("exit status %d\n%s", code, stderr)
	}
}
