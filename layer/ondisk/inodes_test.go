package ondisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/layer/archive"
)

// image makes a file system in a sparse file.
func image(t testing.TB, size int64, mkfs ...string) (path string) {
	t.Helper()
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skipf("SKIPPED: %s is not installed", mkfs[0])
	}
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], path)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", mkfs, err, out)
	}
	return path
}

func open(t testing.TB, path string) dev.Device {
	t.Helper()
	d, err := dev.Open(path, dev.OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// tell runs a tool that says where things are, and returns the numbers that it says.
func tell(t testing.TB, pattern string, argv ...string) []int64 {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	m := regexp.MustCompile(pattern).FindStringSubmatch(string(out))
	if err != nil || m == nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	var list []int64
	for _, s := range m[1:] {
		n, err := strconv.ParseInt(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, n)
	}
	return list
}

// TestInodesAgree: an inode lies where the file systems' own tools say that it lies, and only there.
func TestInodesAgree(t *testing.T) {
	rng := rand.New(rand.NewSource(1))
	for _, c := range []struct {
		name, fs string
		size     int64
		mkfs     []string
	}{
		{"ext4 as mica makes it", "ext4", 3 << 30, []string{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-E", "packed_meta_blocks=1",
			"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"}},
		{"ext4 with blocks of 1 KiB", "ext4", 300 << 20, []string{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-I", "128", "-O", "^64bit,^metadata_csum"}},
		{"xfs", "xfs", 2 << 30, []string{"mkfs.xfs", "-q"}},
		{"xfs with small blocks and many groups", "xfs", 1 << 30, []string{"mkfs.xfs", "-q", "-b", "size=1024", "-i", "size=512", "-d", "agcount=7"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := image(t, c.size, c.mkfs...)
			d := open(t, path)
			if clean, err := Clean(d, c.fs); !clean || err != nil {
				t.Errorf("clean %v, %v", clean, err)
			}
			for range 12 {
				var ino uint64
				var at, size int64
				if c.fs == "ext4" {
					count := tell(t, `Inode count:\s+(\d+)`, "dumpe2fs", "-h", path)[0]
					ino = 1 + uint64(rng.Int63n(count))
					where := tell(t, `located at block (\d+), offset (0x[0-9a-f]+)`, "debugfs", "-R", fmt.Sprintf("imap <%d>", ino), path)
					block := tell(t, `Block size:\s+(\d+)`, "dumpe2fs", "-h", path)[0]
					at, size = where[0]*block+where[1], tell(t, `Inode size:\s+(\d+)`, "dumpe2fs", "-h", path)[0]
				} else {
					s, err := readXFSSuper(d)
					if err != nil {
						t.Fatal(err)
					}
					in := rng.Int63n(s.agblocks * s.inBlock)
					ino = uint64(rng.Int63n(s.blocks/s.agblocks))<<(s.agbits+s.inodeBits) | uint64(in)
					at = tell(t, `(0x[0-9a-f]+)`, "xfs_db", "-r", "-c", fmt.Sprintf("convert ino %d byte", ino), path)[0]
					size = s.inodeSize
				}
				for _, p := range []struct {
					off, n int64
					has    bool
				}{{at, 1, true}, {at + size - 1, 1, true}, {at - 1, 2, true}, {at - 68<<10, 64 << 10, false}, {at + 64<<10, 1 << 20, false}} {
					list, err := Inodes(d, d, c.fs, []Range{{p.off, p.n}})
					if err != nil {
						t.Fatal(err)
					}
					if got := inAny(list, ino); got != p.has {
						t.Errorf("inode %d at %d: in %d bytes at %d: %v, want %v (%v)", ino, at, p.n, p.off, got, p.has, list)
					}
				}
			}
			all, err := Inodes(d, d, c.fs, []Range{{0, d.Size()}})
			if err != nil || len(all) == 0 {
				t.Errorf("the whole device: %v, %v", all, err)
			}
			none, err := Inodes(d, d, c.fs, nil)
			if err != nil || none == nil || len(none) != 0 {
				t.Errorf("no range: %#v, %v; want an empty list, which is not nil", none, err)
			}
		})
	}
}

func inAny(list []archive.InodeRange, ino uint64) bool {
	for _, r := range list {
		if r.First <= ino && ino < r.End {
			return true
		}
	}
	return false
}

// TestInodesUnknown: of what is not known, nothing is said.
func TestInodesUnknown(t *testing.T) {
	ext4 := image(t, 300<<20, "mke2fs", "-q", "-F", "-t", "ext4")
	other := image(t, 300<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-N", "999")
	metabg := image(t, 300<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "meta_bg,^resize_inode")
	inline := image(t, 300<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "inline_data", "-I", "256")
	xfs := image(t, 700<<20, "mkfs.xfs", "-q")
	groups := image(t, 700<<20, "mkfs.xfs", "-q", "-d", "agcount=5")
	small := image(t, 700<<20, "mkfs.xfs", "-q", "-i", "size=1024")
	old := image(t, 700<<20, "mkfs.xfs", "-q")
	f, err := os.OpenFile(old, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0xb4, 0xa4}, 100); err != nil { // version 4
		t.Fatal(err)
	}
	f.Close()
	for _, c := range []struct {
		name, low, up, fs string
		want              error
	}{
		{"other inode tables", ext4, other, "ext4", ErrUnknown},
		{"scattered descriptors", metabg, metabg, "ext4", ErrUnknown},
		{"contents in inodes", inline, inline, "ext4", ErrUnknown},
		{"other groups", xfs, groups, "xfs", ErrUnknown},
		{"other inodes", xfs, small, "xfs", ErrUnknown},
		{"an old version", old, old, "xfs", ErrUnknown},
		{"another file system", xfs, xfs, "ext4", unix.EUCLEAN},
		{"the other file system", ext4, ext4, "xfs", unix.EUCLEAN},
		{"a third one", ext4, ext4, "btrfs", ErrUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := Inodes(open(t, c.low), open(t, c.up), c.fs, []Range{{0, 1 << 20}})
			if !errors.Is(err, c.want) || list != nil {
				t.Errorf("%v, %v; want %v", list, err, c.want)
			}
		})
	}
}

// TestInodesAfterGrowth: an enlarged file system keeps its inodes where they are, and has more.
func TestInodesAfterGrowth(t *testing.T) {
	low := image(t, 300<<20, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^meta_bg")
	up := filepath.Join(t.TempDir(), "grown")
	if out, err := exec.Command("cp", "--sparse=always", low, up).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Truncate(up, 900<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("resize2fs", "-f", up).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d := open(t, up)
	list, err := Inodes(open(t, low), d, "ext4", []Range{{0, d.Size()}})
	if err != nil {
		t.Fatal(err)
	}
	count := tell(t, `Inode count:\s+(\d+)`, "dumpe2fs", "-h", up)[0]
	if len(list) != 1 || list[0].First != 1 || list[0].End != uint64(count)+1 {
		t.Errorf("inodes %v, want 1 to %d", list, count)
	}
}

// FuzzInodes: whatever the bytes are, there is an answer or an error, without much memory.
func FuzzInodes(f *testing.F) {
	f.Add(xfsImage(xfsRecordAt(0, 1, 1, 32<<10, 0x20)), true)
	ext := make([]byte, 64<<10)
	le, sb := binary.LittleEndian, ext[ext4At:]
	le.PutUint16(sb[ext4Magic:], 0xef53)
	le.PutUint32(sb[0x4:], 16)
	le.PutUint32(sb[0x18:], 2)
	le.PutUint32(sb[0x20:], 32768)
	le.PutUint32(sb[0x28:], 128)
	le.PutUint32(sb[0x4c:], 1)
	le.PutUint16(sb[0x58:], 256)
	le.PutUint32(sb[0x60:], ext4Filetype|ext4Extents)
	le.PutUint32(ext[4096+8:], 3)
	if list, err := Inodes(memImage(f, ext), memImage(f, ext), "ext4", []Range{{3 * 4096, 256}}); err != nil || fmt.Sprint(list) != "[{1 2}]" {
		f.Fatalf("the seed: %v, %v", list, err)
	}
	f.Add(ext, false)
	f.Fuzz(func(t *testing.T, b []byte, xfs bool) {
		if len(b) > 1<<20 {
			return
		}
		d, fs := memImage(t, b), "ext4"
		if xfs {
			fs = "xfs"
		}
		list, err := Inodes(d, d, fs, []Range{{0, 4096}, {8192, 1 << 40}, {-5, 3}, {1 << 62, 1 << 62}})
		if (list != nil) == (err != nil) {
			t.Errorf("%v and %v", list, err)
		}
		if err != nil && strings.Contains(err.Error(), "runtime") {
			t.Error(err)
		}
	})
}
