package security

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mica/internal/testbox"
)

// want are the modes of what a daemon has, by path below the box. What is not named may have no
// right for anybody but its owner.
var want = map[string]fs.FileMode{
	"root":                 fs.ModeDir | 0o700,
	"root/pool":            fs.ModeDir | 0o700,
	"root/pool/data":       0o600,
	"root/pool/metadata":   0o600,
	"root/catalog.db":      0o600,
	"root/spool":           fs.ModeDir | 0o700,
	"root/daemon.lock":     0o600,
	"run":                  fs.ModeDir | 0o711, // a group may have to pass to the API's socket
	"run/daemon.lock":      0o600,
	"run/mica.sock":        fs.ModeSocket | 0o600,
	"run/nbd.sock":         fs.ModeSocket | 0o600,
	"run/snapshotter.sock": fs.ModeSocket | 0o600,
	"run/diff.sock":        fs.ModeSocket | 0o600,
	"run/holder.sock":      fs.ModeSocket | 0o600,
	"run/mnt":              fs.ModeDir | 0o700,
	"run/freeze":           fs.ModeDir | 0o700,
}

// TestModes: whatever the umask, everything that the daemon makes is for its user only, but for RUN
// and the directory of links, which can be passed and not read through.
func TestModes(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077} {
		t.Run(fmt.Sprintf("umask %03o", umask), func(t *testing.T) {
			b := newBox(t)
			b.umask = umask
			b.start()
			b.image()
			for _, n := range []string{"web", "vm", "plain"} {
				b.mica("create", "small", n)
			}
			dir := b.mica("mount", "web")
			b.mica("attach", "vm", "--as", "nbd")
			b.mica("attach", "plain")
			b.mica("snapshot", "web", "one")
			seen := b.checkModes(dir)
			for name := range want {
				if !seen[name] {
					t.Errorf("%s is not there", name)
				}
			}
			b.mica("umount", "web")
			b.stop(syscall.SIGTERM) // which writes a backup
			b.checkModes("")
			if st, err := os.Stat(b.path("root/pool/backups")); err == nil && st.Mode() != fs.ModeDir|0o700 {
				t.Errorf("root/pool/backups: mode %v", st.Mode())
			}
			// Rights that somebody gave are taken back where it matters.
			if err := os.Chmod(b.path("root/catalog.db"), 0o666); err != nil {
				t.Fatal(err)
			}
			b.start()
			b.checkModes("")
		})
	}
}

// checkModes looks at everything below ROOT and RUN but for what containers hold.
func (b *box) checkModes(mounted string) map[string]bool {
	b.Helper()
	seen := map[string]bool{}
	for _, top := range []string{b.root, b.run} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(b.dir, path)
			st, err := os.Lstat(path)
			if os.IsNotExist(err) {
				return nil
			}
			if err != nil {
				return err
			}
			if path == mounted {
				seen[rel] = true
				return fs.SkipDir // it is the image's
			}
			seen[rel] = true
			if path == filepath.Join(b.run, "fuse") { // below it wait files that nobody serves just now
				if st.Mode() != fs.ModeDir|0o700 {
					b.Errorf("%s: mode %v", rel, st.Mode())
				}
				return fs.SkipDir
			}
			s := st.Sys().(*syscall.Stat_t)
			if s.Uid != 0 || s.Gid != 0 {
				b.Errorf("%s belongs to %d:%d", rel, s.Uid, s.Gid)
			}
			if st.Mode()&fs.ModeSymlink != 0 {
				return nil
			}
			m, named := want[rel]
			switch {
			case named && st.Mode() != m:
				b.Errorf("%s: mode %v, want %v", rel, st.Mode(), m)
			case !named && st.Mode().Perm()&0o077 != 0:
				b.Errorf("%s: mode %v: others have rights", rel, st.Mode())
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	return seen
}

// TestOtherUsers: a user without rights reaches no socket, no file of the pool, no mount, no block
// device and no setuid program of an image.
func TestOtherUsers(t *testing.T) {
	b := newBox(t)
	b.umask = 0
	b.start()
	b.image()
	b.mica("create", "small", "web")
	b.mica("create", "small", "blk")
	dir := b.mica("mount", "web")
	link := b.mica("attach", "blk")
	b.refused(as(b.command("status"), nobody), "permission")
	b.refused(as(b.command("rm", "web"), nobody), "permission")
	denied := func(what string, script string) {
		t.Helper()
		out, err := as(exec.Command("/bin/sh", "-c", script), nobody).CombinedOutput()
		if err == nil {
			t.Errorf("%s: allowed\n%s", what, out)
		} else if !strings.Contains(string(out), "ermission denied") {
			t.Errorf("%s: %v, %s", what, err, out)
		}
	}
	denied("read the pool", "cat "+b.root+"/pool/data >/dev/null")
	denied("list ROOT", "ls "+b.root)
	denied("list RUN", "ls "+b.run)
	denied("write into RUN", "touch "+b.run+"/x")
	denied("read a file of a container", "cat "+dir+"/etc/secret")
	denied("run a setuid program of an image", dir+"/su")
	denied("list mounts", "ls "+b.run+"/mnt")
	denied("read a block device", "cat "+link+" >/dev/null")
	denied("read the served file", "ls "+b.run+"/fuse/")
	for _, s := range b.sockets() {
		if err := b.connectAs(s, nobody); err == nil {
			t.Errorf("user %d connected to %s", nobody, s)
		}
		if err := b.connectAs(s, 0); err != nil {
			t.Errorf("root could not connect to %s: %v", s, err)
		}
	}
}

// sockets are those in RUN.
func (b *box) sockets() []string {
	b.Helper()
	entries, err := os.ReadDir(b.run)
	if err != nil {
		b.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Type()&fs.ModeSocket != 0 {
			out = append(out, filepath.Join(b.run, e.Name()))
		}
	}
	if len(out) < 5 {
		b.Errorf("sockets %q, want five or more", out)
	}
	return out
}

// connectAs connects from a thread of another user.
func (b *box) connectAs(path string, uid uint32, groups ...uint32) error {
	b.Helper()
	typ := "stream"
	if strings.HasSuffix(path, "holder.sock") {
		typ = "seqpacket"
	}
	c := as(exec.Command(os.Args[0], "-test.run=^TestConnectChild$"), uid, groups...)
	c.Env = append(os.Environ(), "MICA_CONNECT="+typ+":"+path)
	// The test's binary is where only root may come.
	exe, err := os.Open(os.Args[0])
	if err != nil {
		b.Fatal(err)
	}
	defer exe.Close()
	c.Path, c.ExtraFiles = "/proc/self/fd/3", []*os.File{exe}
	out, err := c.CombinedOutput()
	if err != nil && !strings.Contains(string(out), "connect:") {
		b.Fatalf("connect to %s as %d: %v\n%s", path, uid, err, out)
	}
	return err
}

// TestConnectChild connects to the socket that its environment names.
func TestConnectChild(t *testing.T) {
	typ, path, ok := strings.Cut(os.Getenv("MICA_CONNECT"), ":")
	if !ok {
		t.Skip("is run by connectAs")
	}
	network := map[string]string{"stream": "unix", "seqpacket": "unixpacket"}[typ]
	c, err := net.Dial(network, path)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	c.Close()
}

// TestGroup: a group of the configuration may use the API, and nothing else.
func TestGroup(t *testing.T) {
	const group = 54321
	b := newBox(t)
	b.config += fmt.Sprintf("[api]\ngroup = \"%d\"\n", group)
	b.start()
	st, err := os.Stat(b.run + "/mica.sock")
	if err != nil {
		t.Fatal(err)
	}
	if s := st.Sys().(*syscall.Stat_t); st.Mode() != fs.ModeSocket|0o660 || s.Uid != 0 || s.Gid != group {
		t.Errorf("mica.sock: mode %v, owner %d:%d", st.Mode(), s.Uid, s.Gid)
	}
	if out, stderr, code := testbox.Run(b, as(b.command("status"), nobody, group)); code != 0 || !strings.Contains(out, "Pool") {
		t.Errorf("status as a member of the group: exit status %d, %s", code, stderr)
	}
	b.refused(as(b.command("status"), nobody), "permission")
	for _, s := range b.sockets() {
		err := b.connectAs(s, nobody, group)
		if may := filepath.Base(s) == "mica.sock"; may != (err == nil) {
			t.Errorf("a member of the group connects to %s: %v", s, err)
		}
	}
	if out, err := as(exec.Command("/bin/sh", "-c", "ls "+b.root), nobody, group).CombinedOutput(); err == nil {
		t.Errorf("a member of the group reads ROOT: %s", out)
	}
}
