package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/layer/archive/treecmp"
)

// cap_net_raw+ep, as setcap writes it.
const fileCap = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func TestApplyEveryType(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	at := func(s int64) time.Time { return time.Unix(1_500_000_000+s, 1000+s).UTC() }
	mustApply(t, root, makeTar(t,
		ent{name: "./", mode: 0o751, uid: 11, gid: 12, mtime: at(0)},
		ent{name: "dir/", mode: 0o2750, uid: 1000, gid: 1001, mtime: at(1), attrs: map[string]string{"user.d": "x", "trusted.d": "y"}},
		ent{name: "dir/file", body: "hello", mode: 0o640, uid: 5, gid: 6, mtime: at(2), attrs: map[string]string{"user.bin": "a\x00b=\n"}},
		ent{name: "dir/su", body: "#!", mode: 0o6755, uid: 0, gid: 7, mtime: at(3)},
		ent{name: "dir/ping", body: "#!", mode: 0o755, uid: 8, mtime: at(4), attrs: map[string]string{"security.capability": fileCap}},
		ent{name: "dir/hard", typ: tar.TypeLink, link: "dir/file", mtime: at(9)},
		ent{name: "dir/sym", typ: tar.TypeSymlink, link: "../nowhere", uid: 3, gid: 4, mtime: at(5), attrs: map[string]string{"trusted.s": "t"}},
		ent{name: "dev/", mtime: at(6)},
		ent{name: "dev/null", typ: tar.TypeChar, major: 1, minor: 3, mode: 0o666, mtime: at(7)},
		ent{name: "dev/blk", typ: tar.TypeBlock, major: 259, minor: 70000, mode: 0o660, gid: 6, mtime: at(7)},
		ent{name: "dev/fifo", typ: tar.TypeFifo, mode: 0o622, uid: 9, mtime: at(7)},
		ent{name: "tmp/", mode: 0o1777, mtime: at(8)},
		ent{name: "old", body: "", mtime: time.Unix(-86400, 5)},
	))
	got, err := treecmp.Read(root, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := treecmp.Tree{
		".":        {Mode: unix.S_IFDIR | 0o751, UID: 11, GID: 12, MTime: at(0)},
		"dir":      {Mode: unix.S_IFDIR | 0o2750, UID: 1000, GID: 1001, MTime: at(1), Xattrs: map[string]string{"user.d": "x", "trusted.d": "y"}},
		"dir/file": {Mode: unix.S_IFREG | 0o640, UID: 5, GID: 6, MTime: at(2), Size: 5, Links: "dir/file = dir/hard", Sum: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", Xattrs: map[string]string{"user.bin": "a\x00b=\n"}},
		"dir/su":   {Mode: unix.S_IFREG | 0o6755, GID: 7, MTime: at(3), Size: 2, Sum: "2d7a4eebb7ae8c8b9d5b7c4b8f1c1c0b"},
		"dir/ping": {Mode: unix.S_IFREG | 0o755, UID: 8, MTime: at(4), Size: 2, Xattrs: map[string]string{"security.capability": fileCap}},
		"dir/sym":  {Mode: unix.S_IFLNK | 0o777, UID: 3, GID: 4, MTime: at(5), Size: 10, Target: "../nowhere", Xattrs: map[string]string{"trusted.s": "t"}},
		"dev":      {Mode: unix.S_IFDIR | 0o755, MTime: at(6)},
		"dev/null": {Mode: unix.S_IFCHR | 0o666, MTime: at(7), Rdev: unix.Mkdev(1, 3)},
		"dev/blk":  {Mode: unix.S_IFBLK | 0o660, GID: 6, MTime: at(7), Rdev: unix.Mkdev(259, 70000)},
		"dev/fifo": {Mode: unix.S_IFIFO | 0o622, UID: 9, MTime: at(7)},
		"tmp":      {Mode: unix.S_IFDIR | 0o1777, MTime: at(8)},
		"old":      {Mode: unix.S_IFREG | 0o644, MTime: time.Unix(-86400, 5).UTC(), Sum: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
	}
	want["dir/hard"] = want["dir/file"]
	for p, n := range want { // the content of the two scripts is compared with each other
		if p == "dir/su" || p == "dir/ping" {
			n.Sum = got["dir/su"].Sum
			want[p] = n
		}
	}
	for _, d := range treecmp.Compare(got, want, treecmp.Options{}) {
		t.Error(d)
	}
}

func TestApplyOverLower(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name  string
		lower []ent
		upper []ent
		want  string
	}{
		{"file over file", []ent{{name: "a", body: "1"}}, []ent{{name: "a", body: "2"}}, "a=2"},
		{"file over directory", []ent{{name: "a/"}, {name: "a/b/"}, {name: "a/b/c"}}, []ent{{name: "a", body: "2"}}, "a=2"},
		{"directory over file", []ent{{name: "a", body: "1"}}, []ent{{name: "a/"}, {name: "a/b", body: "2"}}, "a/ a/b=2"},
		{"directory over link", []ent{{name: "t/"}, {name: "t/x", body: "1"}, {name: "a", typ: tar.TypeSymlink, link: "t"}},
			[]ent{{name: "a/"}, {name: "a/b", body: "2"}}, "a/ a/b=2 t/ t/x=1"},
		{"directory merges", []ent{{name: "a/"}, {name: "a/b", body: "1"}}, []ent{{name: "a/"}, {name: "a/c", body: "2"}}, "a/ a/b=1 a/c=2"},
		{"link over file", []ent{{name: "a", body: "1"}}, []ent{{name: "a", typ: tar.TypeSymlink, link: "b"}}, "a->b"},
		{"file over link writes no target", []ent{{name: "t", body: "1"}, {name: "a", typ: tar.TypeSymlink, link: "t"}},
			[]ent{{name: "a", body: "2"}}, "a=2 t=1"},
		{"fifo over directory", []ent{{name: "a/"}, {name: "a/b"}}, []ent{{name: "a", typ: tar.TypeFifo}}, "a"},
		{"hard link over file", []ent{{name: "a", body: "1"}, {name: "b", body: "2"}}, []ent{{name: "b", typ: tar.TypeLink, link: "a"}}, "a=1 b=1"},
		{"hard link to itself", []ent{{name: "a", body: "1"}}, []ent{{name: "a", typ: tar.TypeLink, link: "./a"}}, "a=1"},
		{"hard link to a link", []ent{{name: "a", typ: tar.TypeSymlink, link: "x"}}, []ent{{name: "b", typ: tar.TypeLink, link: "a"}}, "a->x b->x"},
		{"rooted hard link to what the tar made", nil, []ent{{name: "d/a", body: "1"}, {name: "b", typ: tar.TypeLink, link: "/d/a"}}, "b=1 d/ d/a=1"},
		{"last of two entries wins", nil, []ent{{name: "a", body: "1"}, {name: "a", body: "2"}}, "a=2"},
		{"parents are made", nil, []ent{{name: "a/b/c", body: "1"}}, "a/ a/b/ a/b/c=1"},
		{"lower link as parent", []ent{{name: "usr/lib/"}, {name: "lib", typ: tar.TypeSymlink, link: "usr/lib"}},
			[]ent{{name: "lib/x", body: "1"}, {name: "lib/y/z", body: "2"}}, "lib->usr/lib usr/ usr/lib/ usr/lib/x=1 usr/lib/y/ usr/lib/y/z=2"},
		{"lower absolute link as parent", []ent{{name: "run/"}, {name: "var/run", typ: tar.TypeSymlink, link: "/run"}},
			[]ent{{name: "var/run/x", body: "1"}}, "run/ run/x=1 var/ var/run->/run"},
		{"lower link with .. inside", []ent{{name: "run/"}, {name: "a/b/l", typ: tar.TypeSymlink, link: "../../run/./"}},
			[]ent{{name: "a/b/l/x", body: "1"}}, "a/ a/b/ a/b/l->../../run/./ run/ run/x=1"},
		{"lower link through another", []ent{{name: "c/"}, {name: "b", typ: tar.TypeSymlink, link: "c"}, {name: "a", typ: tar.TypeSymlink, link: "b"}},
			[]ent{{name: "a/x", body: "1"}}, "a->b b->c c/ c/x=1"},
		{"root called /", nil, []ent{{name: "/", mode: 0o700}, {name: "a", body: "1"}}, "a=1"},
		{"odd spellings", nil, []ent{{name: ".//a/./b", body: "1"}}, "a/ a/b=1"},
		{"pax global header", nil, []ent{{name: "a", body: "1"}}, "a=1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			mustApply(t, root, makeTar(t, c.lower...))
			mustApply(t, root, makeTar(t, c.upper...))
			if got := listing(t, root); got != c.want {
				t.Errorf("tree\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}

func TestWhiteouts(t *testing.T) {
	needRoot(t)
	lower := []ent{
		{name: "f", body: "1"}, {name: "g", body: "1"},
		{name: "d/"}, {name: "d/f", body: "1"}, {name: "d/s/"}, {name: "d/s/f", body: "1"}, {name: "d/s/t/u", body: "1"},
		{name: "l", typ: tar.TypeSymlink, link: "d"},
	}
	const all = "d/ d/f=1 d/s/ d/s/f=1 d/s/t/ d/s/t/u=1 f=1 g=1 l->d"
	for _, c := range []struct {
		name  string
		upper []ent
		want  string
	}{
		{"file", []ent{{name: ".wh.f"}}, strings.Replace(all, "f=1 g", "g", 1)},
		{"directory", []ent{{name: ".wh.d"}}, "f=1 g=1 l->d"},
		{"link, not its target", []ent{{name: ".wh.l"}}, strings.TrimSuffix(all, " l->d")},
		{"inside", []ent{{name: "d/s/.wh.t"}}, "d/ d/f=1 d/s/ d/s/f=1 f=1 g=1 l->d"},
		{"nothing there", []ent{{name: ".wh.nope"}, {name: "d/.wh.nope"}, {name: "no/such/.wh.nope"}, {name: "no/.wh..wh..opq"}, {name: "f/.wh.x"}}, all},
		{"before the new file", []ent{{name: ".wh.f"}, {name: "f", body: "2"}}, strings.Replace(all, " f=1", " f=2", 1)},
		{"after the new file", []ent{{name: "f", body: "2"}, {name: ".wh.f"}}, strings.Replace(all, " f=1", " f=2", 1)},
		{"before the new directory", []ent{{name: ".wh.d"}, {name: "d/"}, {name: "d/n", body: "2"}}, "d/ d/n=2 f=1 g=1 l->d"},
		{"after the new directory", []ent{{name: "d/"}, {name: "d/n", body: "2"}, {name: ".wh.d"}}, "d/ d/n=2 f=1 g=1 l->d"},
		{"after a file in an unlisted directory", []ent{{name: "d/s/n", body: "2"}, {name: ".wh.d"}}, "d/ d/s/ d/s/n=2 f=1 g=1 l->d"},
		{"opaque first", []ent{{name: "d/.wh..wh..opq"}, {name: "d/n", body: "2"}}, "d/ d/n=2 f=1 g=1 l->d"},
		{"opaque last", []ent{{name: "d/"}, {name: "d/n", body: "2"}, {name: "d/s/f", body: "2"}, {name: "d/.wh..wh..opq"}}, "d/ d/n=2 d/s/ d/s/f=2 f=1 g=1 l->d"},
		{"opaque between", []ent{{name: "d/a", body: "2"}, {name: "d/.wh..wh..opq"}, {name: "d/b", body: "2"}, {name: "d/.wh..wh..opq"}}, "d/ d/a=2 d/b=2 f=1 g=1 l->d"},
		{"opaque root", []ent{{name: "n", body: "2"}, {name: ".wh..wh..opq"}}, "n=2"},
		{"through a lower link", []ent{{name: "l/.wh.s"}}, "d/ d/f=1 f=1 g=1 l->d"},
		{"aufs bookkeeping", []ent{{name: ".wh..wh.plnk/"}, {name: ".wh..wh.aufs", body: "x"}, {name: ".wh..wh.orph/"}}, all},
		{"file becomes directory, whiteout after", []ent{{name: "f/"}, {name: "f/x", body: "2"}, {name: ".wh.f"}}, "d/ d/f=1 d/s/ d/s/f=1 d/s/t/ d/s/t/u=1 f/ f/x=2 g=1 l->d"},
		{"directory becomes file, whiteout after", []ent{{name: "d", body: "2"}, {name: ".wh.d"}}, "d=2 f=1 g=1 l->d"},
		{"below a directory that became a link", []ent{{name: "d", typ: tar.TypeSymlink, link: "/"}, {name: "d/.wh.f"}, {name: "d/s/.wh.f"}, {name: "d/.wh..wh..opq"}}, "d->/ f=1 g=1 l->d"},
		{"longest name", []ent{{name: ".wh." + strings.Repeat("x", 255)}}, all},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			mustApply(t, root, makeTar(t, lower...))
			mustApply(t, root, makeTar(t, c.upper...))
			if got := listing(t, root); got != c.want {
				t.Errorf("tree\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}

// Times of directories that the tar does not list stay; those that it lists are the tar's,
// whatever order the entries come in.
func TestDirectoryTimes(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	at := func(s int64) time.Time { return time.Unix(1_500_000_000+s, s).UTC() }
	mustApply(t, root, makeTar(t,
		ent{name: "./", mtime: at(1)}, ent{name: "kept/", mtime: at(2)}, ent{name: "kept/f", mtime: at(3)},
		ent{name: "listed/", mtime: at(4)}, ent{name: "listed/sub/", mtime: at(5)}, ent{name: "listed/sub/f", mtime: at(6)},
		ent{name: "gone/", mtime: at(6)}, ent{name: "gone/f", mtime: at(6)}))
	mustApply(t, root, makeTar(t,
		ent{name: "kept/g", mtime: at(7)}, ent{name: "kept/.wh.f", mtime: at(8)},
		ent{name: "listed/", mtime: at(9)}, ent{name: "listed/sub/.wh..wh..opq", mtime: at(10)},
		ent{name: "made/for/f", mtime: at(11)},
		ent{name: "gone/x", mtime: at(12)}, ent{name: "gone", body: "file now", mtime: at(13)}))
	got, err := treecmp.Read(root, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]time.Time{
		".": at(1), "kept": at(2), "listed": at(9), "listed/sub": at(5), "made": at(11), "made/for": at(11), "gone": at(13),
	} {
		if !got[p].MTime.Equal(want) {
			t.Errorf("%s: mtime %v, want %v", p, got[p].MTime, want)
		}
	}
}

// A directory entry replaces the attributes of a directory that exists; an access list of the
// directory above is not inherited.
func TestApplyReplacesAttributes(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	// u::rwx u:1:rwx g::r-x m::rwx o::r-x in the kernel's binary form.
	acl := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\x01\x00\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff"
	mustApply(t, root, makeTar(t, ent{name: "d/", attrs: map[string]string{"user.old": "1", "user.both": "1"}},
		ent{name: "acl/", attrs: map[string]string{aclDefault: acl}}))
	mustApply(t, root, makeTar(t, ent{name: "d/", attrs: map[string]string{"user.both": "2", "user.new": "3"}},
		ent{name: "acl/f", mode: 0o640}, ent{name: "acl/d/", mode: 0o750}, ent{name: "acl/p", typ: tar.TypeFifo, mode: 0o600},
		ent{name: "acl/deep/f", mode: 0o604}))
	got, err := treecmp.Read(root, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprint(got["d"].Xattrs); s != "map[user.both:2 user.new:3]" {
		t.Errorf("attributes of d: %s", s)
	}
	for p, mode := range map[string]uint32{"acl/f": 0o640, "acl/d": 0o750, "acl/p": 0o600, "acl/deep": 0o755, "acl/deep/f": 0o604} {
		if got[p].Mode&0o7777 != mode || len(got[p].Xattrs) != 0 {
			t.Errorf("%s: mode %o attributes %q, want %o and none", p, got[p].Mode&0o7777, got[p].Xattrs, mode)
		}
	}
	if got["acl"].Xattrs[aclDefault] != acl {
		t.Errorf("default access list of acl: %q", got["acl"].Xattrs)
	}
}

func TestApplyWarnings(t *testing.T) {
	needRoot(t)
	var warned []string
	o := ApplyOptions{Warn: func(name, what string) { warned = append(warned, name+": "+what) }}
	data := makeTar(t, ent{name: "mac", attrs: map[string]string{"com.apple.quarantine": "x"}},
		ent{name: "l", typ: tar.TypeSymlink, link: "x", attrs: map[string]string{"user.x": "y"}})
	if _, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(data), o); err != nil {
		t.Fatal(err)
	}
	want := []string{`mac: extended attribute "com.apple.quarantine" left out: not a namespace of Linux`,
		`l: extended attribute "user.x" left out: only files and directories have user attributes`}
	if fmt.Sprint(warned) != fmt.Sprint(want) {
		t.Errorf("warnings %q, want %q", warned, want)
	}
}

func TestApplyKeepsHoles(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.MkdirAll(src, 0o755); err != nil {
		t.Fatal(err)
	}
	const size = 64 << 20
	f, err := os.Create(filepath.Join(src, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 3 << 20, 3<<20 + 5000, 10<<20 - 1, size - 4096*5} {
		if _, err := f.WriteAt([]byte("data"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "zeros"), make([]byte, 5<<20+17), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, flag string }{
		{"plain", "--format=pax"}, {"gnu sparse", "--format=gnu"}, {"pax sparse 1.0", "--sparse-version=1.0"}, {"pax sparse 0.1", "--sparse-version=0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := []string{"-C", src, "-cf", "-", c.flag}
			if c.name != "plain" {
				args = append(args, "--sparse")
			}
			if strings.HasPrefix(c.name, "pax") {
				args = append(args, "--format=pax")
			}
			data, err := exec.Command("tar", append(args, "sparse", "zeros")...).Output()
			if err != nil {
				t.Fatalf("tar: %v", err)
			}
			root := t.TempDir()
			mustApply(t, root, data)
			sameTrees(t, root, src, treecmp.Options{IgnoreRoot: true, IgnoreTimes: true}) // the gnu format has seconds
			tree, err := treecmp.Read(root, treecmp.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := tree["sparse"].Blocks * 512; got > 256<<10 {
				t.Errorf("sparse file of %d bytes occupies %d bytes, want at most 262144", size, got)
			}
			if got := tree["zeros"].Blocks; got != 0 {
				t.Errorf("file of zeros occupies %d blocks of 512 bytes, want 0", got)
			}
		})
	}
}

func TestApplyDeepAndLong(t *testing.T) {
	root := t.TempDir()
	deep := strings.TrimSuffix(strings.Repeat("d/", 2040), "/")
	long := strings.TrimSuffix(strings.Repeat(strings.Repeat("n", 255)+"/", 15), "/")
	mustApply(t, root, makeTar(t, ent{name: deep + "/f", body: "x"}, ent{name: "f", typ: tar.TypeLink, link: deep + "/f"}, ent{name: long, body: "y"}))
	if b, err := os.ReadFile(filepath.Join(root, long)); err != nil || string(b) != "y" {
		t.Errorf("long name: %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "f")); err != nil || string(b) != "x" {
		t.Errorf("hard link into the deep: %q, %v", b, err)
	}
	mustApply(t, root, makeTar(t, ent{name: ".wh.d"}, ent{name: strings.Repeat("n", 255), body: "z"}))
	if got, want := listing(t, root), "f=x "+strings.Repeat("n", 255)+"=z"; got != want {
		t.Errorf("tree %s, want %s", got, want)
	}
}

// Apply reads r to its end, and fails if the end is not clean.
func TestApplyReadsToTheEnd(t *testing.T) {
	data := append(makeTar(t, ent{name: "a", body: "1"}), make([]byte, 100<<10)...)
	r := bytes.NewReader(data)
	if _, err := Apply(context.Background(), t.TempDir(), r, ApplyOptions{}); err != nil || r.Len() != 0 {
		t.Errorf("error %v, %d bytes not read", err, r.Len())
	}
	bad := errors.New("digest does not match")
	_, err := Apply(context.Background(), t.TempDir(), io.MultiReader(bytes.NewReader(data), &failing{bad}), ApplyOptions{})
	if !errors.Is(err, bad) {
		t.Errorf("error %v, want %v", err, bad)
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func TestApplyCut(t *testing.T) {
	data := makeTar(t, ent{name: "dir/"}, ent{name: "dir/a", body: strings.Repeat("a", 100_000)},
		ent{name: "dir/" + strings.Repeat("n", 200), body: strings.Repeat("b", 70_000)}, ent{name: "z", body: "end"})
	for i := 0; i < 20; i++ {
		cut := len(data) * i / 20
		if _, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(data[:cut]), ApplyOptions{}); err == nil && i > 0 {
			t.Errorf("cut at %d of %d bytes: no error", cut, len(data))
		}
	}
}

func TestApplyCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	data := makeTar(t, ent{name: "a", body: strings.Repeat("a", 8<<20)}, ent{name: "b"})
	r := io.TeeReader(bytes.NewReader(data), writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil }))
	if _, err := Apply(ctx, t.TempDir(), r, ApplyOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestApplyLimits(t *testing.T) {
	o := ApplyOptions{Limits: Limits{MaxName: 20, MaxEntries: 3, MaxBytes: 100, MaxXattr: 30, MaxNames: 137}}
	for _, c := range []struct {
		name string
		ents []ent
		bad  string
		want string
	}{
		{"name", []ent{{name: "ok"}, {name: strings.Repeat("x", 21)}}, strings.Repeat("x", 21), "name of 21 bytes, at most 20"},
		{"component", []ent{{name: strings.Repeat("y", 256)}}, strings.Repeat("y", 256), ""},
		{"link target", []ent{{name: "l", typ: tar.TypeSymlink, link: strings.Repeat("x", 21)}}, "l", "link target of 21 bytes, at most 20"},
		{"hard link target", []ent{{name: "l", typ: tar.TypeLink, link: strings.Repeat("x", 21)}}, "l", "name of 21 bytes, at most 20"},
		{"entries", []ent{{name: "1"}, {name: "2"}, {name: "3"}, {name: "4"}}, "4", "more than 3 entries"},
		{"bytes", []ent{{name: "1", body: strings.Repeat("x", 60)}, {name: "2", body: strings.Repeat("x", 41)}}, "2", "file of 41 bytes after 60 bytes of others, at most 100 in all"},
		{"memory for paths", []ent{{name: "11111"}, {name: "22222"}, {name: "3"}}, "3", "its paths take 138 bytes of memory so far, at most 137"},
		{"attributes", []ent{{name: "1", attrs: map[string]string{"user.a": "0123456789", "user.b": "0123456789"}}}, "1", "extended attributes of 32 bytes, at most 30"},
		{"attribute value", []ent{{name: "1", attrs: map[string]string{"user.a": strings.Repeat("x", 65537)}}}, "1", "of 65537 bytes, at most 65536"},
		{"attribute name", []ent{{name: "1", attrs: map[string]string{"user." + strings.Repeat("x", 251): "1"}}}, "1", "name of 256 bytes, at most 255"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(makeTar(t, c.ents...)), o)
			wantEntryError(t, err, c.bad, ErrLimit)
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q, want it to say %q", err, c.want)
			}
		})
	}
}
