package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOwnDir: what others could change is not used.
func TestOwnDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, to give directories away")
	}
	base := t.TempDir()
	make := func(name string, mode os.FileMode, uid int) string {
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, uid, -1); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := func(name, to string, uid int) string {
		path := filepath.Join(base, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		if err := os.Lchown(path, uid, -1); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := make("good", 0o755, 0)
	for _, c := range []struct {
		dir  string
		want string // "": taken
	}{
		{good, ""},
		{make("closed", 0o700, 0), ""},
		{filepath.Join(base, "new"), ""},
		{filepath.Join(base, "new2", "below"), ""},
		{link("link", good, 0), ""},
		{make("of another", 0o700, 1234), "user 1234"},
		{make("for everybody", 0o777, 0), "0777"},
		{make("sticky", 0o777|os.ModeSticky, 0), "0777"},
		{make("for a group", 0o770, 0), "0770"},
		{link("link of another", good, 1234), "user 1234"},
		{link("link to another's", filepath.Join(base, "of another"), 0), "user 1234"},
		{file, "not a directory"},
		{link("link to nothing", filepath.Join(base, "nope"), 0), "no such file"},
	} {
		err := ownDir(c.dir, 0o711)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), filepath.Base(c.dir))) {
			t.Errorf("%s: %v, want %q", c.dir, err, c.want)
		}
	}
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(base, "without umask")
	if err := ownDir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("made with %v, %v", st.Mode(), err)
	}
}

// TestLockIsNoLink: a link in place of the lock is not followed.
func TestLockIsNoLink(t *testing.T) {
	dir := t.TempDir()
	canary := filepath.Join(t.TempDir(), "canary")
	if err := os.WriteFile(canary, []byte("sings"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(canary, filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	f, err := lockDir(context.Background(), dir, owner{PID: 1}, time.Second, nil)
	if err == nil {
		f.Close()
		t.Error("the link was followed")
	}
	if b, _ := os.ReadFile(canary); string(b) != "sings" {
		t.Errorf("what the link leads to is %q now", b)
	}
}
