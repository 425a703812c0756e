package treecmp

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Each kind of difference is found, and equal trees have none.
func TestFindsEveryDifference(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root (chown, mknod)")
	}
	at := time.Unix(1_600_000_000, 123456789)
	for _, c := range []struct {
		name   string
		change func(dir string) error
		want   string // in the one line that is expected; "" for none
		o      Options
	}{
		{"nothing", func(string) error { return nil }, "", Options{}},
		{"content", func(d string) error { return os.WriteFile(d+"/f", []byte("B"), 0o644) }, `"f": content sha256`, Options{}},
		{"mode", func(d string) error { return unix.Chmod(d+"/f", 0o4644) }, `"f": mode 104644, want 100644`, Options{}},
		{"owner", func(d string) error { return os.Lchown(d+"/l", 1, 2) }, `"l": owner 1:2, want 0:0`, Options{}},
		{"target", func(d string) error { return relink(d + "/l") }, `"l": link target "y", want "x"`, Options{}},
		{"device", func(d string) error {
			os.Remove(d + "/c")
			return unix.Mknod(d+"/c", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5)))
		}, `"c": device 1:5, want 1:3`, Options{}},
		{"attribute", func(d string) error { return unix.Setxattr(d+"/f", "trusted.a", []byte("2"), 0) }, `"f": attribute trusted.a "2", want "1"`, Options{}},
		{"attribute too many", func(d string) error { return unix.Setxattr(d+"/d", "trusted.b", nil, 0) }, `"d": attribute trusted.b "", want none`, Options{}},
		{"link broken", func(d string) error { os.Remove(d + "/h"); return os.WriteFile(d+"/h", []byte("h"), 0o644) }, "", Options{Skip: func(p string) bool { return p == "h" || p == "g" }}},
		{"nanosecond", func(d string) error { at := at.Add(1); return os.Chtimes(d+"/f", at, at) }, `"f": mtime`, Options{}},
		{"time ignored", func(d string) error { return os.Chtimes(d+"/f", at.Add(1), at.Add(1)) }, "", Options{IgnoreTimes: true}},
		{"directory time ignored", func(d string) error { return os.Chtimes(d+"/d", at.Add(1), at.Add(1)) }, "", Options{IgnoreDirTimes: true}},
		{"missing", func(d string) error { return os.Remove(d + "/f") }, `"f": missing`, Options{}},
		{"too many", func(d string) error { return os.WriteFile(d+"/d/n", nil, 0o644) }, `"d/n": mode 100644, want no such name`, Options{}},
		{"root", func(d string) error { return os.Chmod(d, 0o700) }, `".": mode 40700`, Options{}},
		{"root ignored", func(d string) error { return os.Chmod(d, 0o700) }, "", Options{IgnoreRoot: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := t.TempDir(), t.TempDir()
			for _, d := range []string{a, b} {
				build(t, d, at)
			}
			if err := c.change(a); err != nil {
				t.Fatal(err)
			}
			if c.name != "nanosecond" && !strings.Contains(c.name, "time") {
				stamp(t, a, at)
			}
			got, err := Diff(a, b, c.o)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == "" && len(got) != 0 {
				t.Errorf("differences %q, want none", got)
			}
			if c.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], c.want)) {
				t.Errorf("differences %q, want one that begins with %q", got, c.want)
			}
		})
	}
	t.Run("hard link", func(t *testing.T) {
		a, b := t.TempDir(), t.TempDir()
		build(t, a, at)
		build(t, b, at)
		os.Remove(a + "/h")
		if err := os.WriteFile(a+"/h", []byte("h"), 0o644); err != nil {
			t.Fatal(err)
		}
		stamp(t, a, at)
		got, err := Diff(a, b, Options{})
		if err != nil || len(got) != 2 || !strings.Contains(got[0], `names of the inode "", want "g = h"`) {
			t.Errorf("differences %q, %v", got, err)
		}
	})
}

func relink(p string) error {
	os.Remove(p)
	return os.Symlink("y", p)
}

func build(t *testing.T, d string, at time.Time) {
	t.Helper()
	for _, err := range []error{
		os.Mkdir(d+"/d", 0o755),
		os.WriteFile(d+"/f", []byte("A"), 0o644),
		os.WriteFile(d+"/g", []byte("h"), 0o644),
		os.Link(d+"/g", d+"/h"),
		os.Symlink("x", d+"/l"),
		unix.Mknod(d+"/c", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))),
		unix.Setxattr(d+"/f", "trusted.a", []byte("1"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	stamp(t, d, at)
}

// stamp gives everything one time, directories last.
func stamp(t *testing.T, root string, at time.Time) {
	t.Helper()
	ts := []unix.Timespec{unix.NsecToTimespec(at.UnixNano()), unix.NsecToTimespec(at.UnixNano())}
	var paths []string
	if err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error { paths = append(paths, p); return err }); err != nil {
		t.Fatal(err)
	}
	for i := len(paths) - 1; i >= 0; i-- {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, paths[i], ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
	}
}
