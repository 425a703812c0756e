// Package randtree changes trees at random, for tests: files, directories, links of both kinds, devices,
// owners, modes, times, attributes, renames and removals.
package randtree

import (
	"bytes"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Names are few, so that they collide, and awkward.
var Names = []string{"a", "b", "c", "d.x", "-e", "\xff\xfe", "ü", "with space", "nl\n", strings.Repeat("long", 60)}

// fileCap is the attribute security.capability of a file that may open raw sockets.
const fileCap = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Change makes n random changes to a tree, with Names.
func Change(t testing.TB, rng *rand.Rand, root string, n int) {
	t.Helper()
	ChangeNamed(t, rng, root, n, Names)
}

// ChangeNamed is Change with other names.
func ChangeNamed(t testing.TB, rng *rand.Rand, root string, n int, names []string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dirs := func() []string {
		ds := []string{root}
		filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
			if err == nil && e.IsDir() && p != root {
				ds = append(ds, p)
			}
			return nil
		})
		sort.Strings(ds)
		return ds
	}
	files := func() []string {
		var fs []string
		filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
			if err == nil && p != root {
				fs = append(fs, p)
			}
			return nil
		})
		sort.Strings(fs)
		return fs
	}
	pick := func(s []string) string { return s[rng.Intn(len(s))] }
	attr := func(p string) {
		st, err := os.Lstat(p)
		check(err)
		switch rng.Intn(4) {
		case 0:
			check(unix.Lsetxattr(p, "trusted.t", []byte{byte(rng.Intn(256)), 0, 1}, 0))
		case 1:
			if st.Mode().IsRegular() || st.IsDir() {
				check(unix.Lsetxattr(p, "user.u"+fmt.Sprint(rng.Intn(3)), bytes.Repeat([]byte("v"), rng.Intn(300)), 0))
			}
		case 2:
			if st.Mode().IsRegular() {
				check(unix.Lsetxattr(p, "security.capability", []byte(fileCap), 0))
			}
		}
	}
	meta := func(p string) {
		st, err := os.Lstat(p)
		check(err)
		check(os.Lchown(p, rng.Intn(3)*1000, rng.Intn(3)*100))
		if st.Mode()&os.ModeSymlink == 0 {
			check(unix.Chmod(p, []uint32{0o644, 0o755, 0o4755, 0o2711, 0o1777, 0o600, 0o6000}[rng.Intn(7)]))
		}
		attr(p)
		if rng.Intn(2) == 0 {
			chtimes(t, p, time.Unix(rng.Int63n(2_000_000_000), rng.Int63n(1_000_000_000)))
		}
	}
	for range n {
		p := filepath.Join(pick(dirs()), pick(names))
		if len(p) > 3000 {
			continue
		}
		switch rng.Intn(14) {
		case 0, 1, 2, 3: // file, in place if it is one
			if st, err := os.Lstat(p); err == nil && !st.Mode().IsRegular() {
				check(os.RemoveAll(p))
			}
			body := make([]byte, rng.Intn(3)*rng.Intn(20_000))
			if rng.Intn(2) == 0 {
				rng.Read(body)
			}
			check(os.WriteFile(p, body, 0o644))
			if rng.Intn(4) == 0 {
				check(os.Truncate(p, rng.Int63n(1<<20)))
			}
			meta(p)
		case 4, 5:
			if os.Mkdir(p, 0o755) == nil {
				meta(p)
			}
		case 6:
			check(os.RemoveAll(p))
			check(os.Symlink(pick([]string{"a", "/b", "../c", "nowhere"}), p))
			meta(p)
		case 7:
			check(os.RemoveAll(p))
			dev := []uint32{unix.S_IFIFO, unix.S_IFCHR, unix.S_IFBLK}[rng.Intn(3)]
			check(unix.Mknod(p, dev|0o600, int(unix.Mkdev(uint32(rng.Intn(300)), uint32(rng.Intn(3000))))))
			meta(p)
		case 8: // hard link
			if fs := files(); len(fs) > 0 {
				src := pick(fs)
				if st, err := os.Lstat(src); err == nil && !st.IsDir() && src != p && !strings.HasPrefix(src, p+"/") {
					check(os.RemoveAll(p))
					check(os.Link(src, p))
				}
			}
		case 9: // delete
			if fs := files(); len(fs) > 0 {
				check(os.RemoveAll(pick(fs)))
			}
		case 10: // rename
			if fs := files(); len(fs) > 0 {
				src := pick(fs)
				if src != p && !strings.HasPrefix(p, src+"/") && !strings.HasPrefix(src, p+"/") {
					check(os.RemoveAll(p))
					check(os.Rename(src, p))
				}
			}
		case 11:
			if fs := files(); len(fs) > 0 {
				meta(pick(fs))
			}
		case 12: // there and back
			if st, err := os.Lstat(p); err == nil && st.Mode()&os.ModeSymlink == 0 {
				check(unix.Chmod(p, 0o700))
				check(unix.Chmod(p, uint32(st.Sys().(*syscall.Stat_t).Mode&0o7777)))
			}
		case 13: // other contents, of the same size and time
			if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() && st.Size() > 0 {
				f, err := os.OpenFile(p, os.O_WRONLY, 0)
				check(err)
				_, err = f.WriteAt([]byte{byte(rng.Intn(256))}, rng.Int63n(st.Size()))
				check(err)
				check(f.Close())
				chtimes(t, p, st.ModTime())
			}
		}
	}
}

func chtimes(t testing.TB, path string, at time.Time) {
	t.Helper()
	ts := []unix.Timespec{{Sec: at.Unix(), Nsec: int64(at.Nanosecond())}, {Sec: at.Unix(), Nsec: int64(at.Nanosecond())}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
}
