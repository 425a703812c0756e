package security

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mica/internal/testbox"
)

// TestHostileRun: a directory that others could prepare is not used for ROOT or RUN; the error says
// which and why, and nothing outside has changed.
func TestHostileRun(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(b *box)
		words   []string
	}{
		{"RUN of another user", func(b *box) { mkdir(b, b.run, 0o700, nobody) }, []string{"run", "user 65534"}},
		{"RUN for everybody", func(b *box) { mkdir(b, b.run, 0o777, 0) }, []string{"run", "0777"}},
		{"RUN for everybody, sticky", func(b *box) { mkdir(b, b.run, 0o777|os.ModeSticky, 0) }, []string{"run", "0777"}},
		{"RUN for a group", func(b *box) { mkdir(b, b.run, 0o775, 0) }, []string{"run", "0775"}},
		{"RUN that another user's link leads to", func(b *box) { mkdir(b, b.path("x"), 0o700, 0); link(b, b.path("x"), b.run, nobody) }, []string{"run", "user 65534"}},
		{"ROOT of another user", func(b *box) { mkdir(b, b.root, 0o700, nobody) }, []string{"root", "user 65534"}},
		{"ROOT for everybody", func(b *box) { mkdir(b, b.root, 0o777, 0) }, []string{"root", "0777"}},
		{"spool for everybody", func(b *box) { mkdir(b, b.root, 0o700, 0); mkdir(b, b.root+"/spool", 0o777, 0) }, []string{"spool", "0777"}},
		{"a link as the lock of RUN", func(b *box) { mkdir(b, b.run, 0o711, 0); link(b, b.path("canary"), b.run+"/daemon.lock", 0) }, []string{"daemon.lock"}},
		{"a link as the lock of ROOT", func(b *box) { mkdir(b, b.root, 0o700, 0); link(b, b.path("canary"), b.root+"/daemon.lock", 0) }, []string{"daemon.lock"}},
		{"a file as the socket", func(b *box) { mkdir(b, b.run, 0o711, 0); copyTo(b, b.run+"/mica.sock") }, []string{"mica.sock", "something else"}},
		{"a link as the socket", func(b *box) { mkdir(b, b.run, 0o711, 0); link(b, b.path("canary"), b.run+"/mica.sock", 0) }, []string{"mica.sock", "something else"}},
		{"a link as the catalog", func(b *box) { mkdir(b, b.root, 0o700, 0); link(b, b.path("canary"), b.root+"/catalog.db", 0) }, []string{"catalog.db"}},
		{"a link as the holder's lock", func(b *box) { mkdir(b, b.run, 0o711, 0); link(b, b.path("canary"), b.run+"/holder.sock.lock", 0) }, []string{"holder"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBox(t)
			canary := b.write("canary", "sings")
			before, err := os.Stat(canary)
			if err != nil {
				t.Fatal(err)
			}
			c.prepare(b)
			b.refused(b.serveCommand(), c.words...)
			after, err := os.Stat(canary)
			if err != nil || after.Mode() != before.Mode() || after.ModTime() != before.ModTime() {
				t.Errorf("what the link leads to: %v, %v, was %v", after.Mode(), after.ModTime(), before.ModTime())
			}
			if text, _ := os.ReadFile(canary); string(text) != "sings" {
				t.Errorf("what the link leads to is %q", text)
			}
		})
	}
}

func mkdir(b *box, dir string, mode os.FileMode, uid int) {
	b.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.Chmod(dir, mode); err != nil {
		b.Fatal(err)
	}
	if err := os.Chown(dir, uid, -1); err != nil {
		b.Fatal(err)
	}
}

func link(b *box, to, path string, uid int) {
	b.Helper()
	if err := os.Symlink(to, path); err != nil {
		b.Fatal(err)
	}
	if err := os.Lchown(path, uid, -1); err != nil {
		b.Fatal(err)
	}
}

func copyTo(b *box, path string) {
	b.Helper()
	if err := os.WriteFile(path, []byte("a file"), 0o600); err != nil {
		b.Fatal(err)
	}
}

// TestLinksInTheWay: links that somebody with rights in RUN's directories leaves in the place of
// mounts and links to nodes are not written through.
func TestLinksInTheWay(t *testing.T) {
	b := newBox(t)
	b.start()
	b.image()
	b.mica("create", "small", "web")
	out := b.path("outside")
	mkdir(b, out, 0o755, 0)
	if err := os.WriteFile(filepath.Join(out, "canary"), []byte("sings"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The place of a mount: a link is resolved by the kernel; the command must say so or use it as
	// what it is, never make or remove anything there.
	link(b, out, filepath.Join(b.run, "mnt", "web"), 0)
	if _, stderr, code := testbox.Run(b, b.command("mount", "web")); code == 0 {
		b.mica("umount", "web")
	} else if strings.Contains(stderr, "goroutine") {
		t.Error(stderr)
	}
	entries, err := os.ReadDir(out)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
	if text, _ := os.ReadFile(filepath.Join(out, "canary")); string(text) != "sings" {
		t.Errorf("outside: %q", text)
	}
}
