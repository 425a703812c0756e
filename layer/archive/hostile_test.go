package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/layer/archive/treecmp"
)

// A hostile archive is refused with an error that names the entry, and nothing outside of the
// root is touched. OUT in a link stands for the absolute path of the directory outside.
func TestHostile(t *testing.T) {
	needRoot(t)
	sym := func(name, target string) ent { return ent{name: name, typ: tar.TypeSymlink, link: target} }
	hard := func(name, target string) ent { return ent{name: name, typ: tar.TypeLink, link: target} }
	lowerRoot := []ent{{name: "etc/"}, {name: "etc/passwd", body: "image's own"}}
	for _, c := range []struct {
		name  string
		lower []ent
		ents  []ent
		bad   string // the entry that is named
		kind  error
	}{
		{"dot dot", nil, []ent{{name: "../outside/canary", body: "x"}}, "../outside/canary", ErrEscape},
		{"dot dot inside", nil, []ent{{name: "a/"}, {name: "a/../../outside/canary", body: "x"}}, "a/../../outside/canary", ErrEscape},
		{"dot dot that stays inside", nil, []ent{{name: "a/"}, {name: "a/../b", body: "x"}}, "a/../b", ErrEscape},
		{"dot dot directory", nil, []ent{{name: "../outside/", mode: 0o777}}, "../outside/", ErrEscape},
		{"only dot dot", nil, []ent{{name: ".."}}, "..", ErrEscape},
		{"absolute", nil, []ent{{name: "OUT/canary", body: "x"}}, "OUT/canary", ErrEscape},
		{"absolute that exists inside", lowerRoot, []ent{{name: "/etc/passwd", body: "x"}}, "/etc/passwd", ErrEscape},
		{"slash is not a directory", nil, []ent{sym("/", "OUT")}, "/", ErrEscape},
		{"link, then file through it", nil, []ent{sym("l", "OUT"), {name: "l/canary", body: "x"}}, "l/canary", ErrEscape},
		{"relative link, then file through it", nil, []ent{sym("l", "../outside"), {name: "l/canary", body: "x"}}, "l/canary", ErrEscape},
		{"link to the inside, then file through it", nil, []ent{{name: "d/"}, sym("l", "d"), {name: "l/f", body: "x"}}, "l/f", ErrEscape},
		{"link, then directory through it", nil, []ent{sym("l", "OUT"), {name: "l/new/"}}, "l/new/", ErrEscape},
		{"link, then whiteout through it", nil, []ent{sym("l", "OUT"), {name: "l/.wh.canary"}}, "l/.wh.canary", ErrEscape},
		{"link, then opaque through it", nil, []ent{sym("l", "OUT"), {name: "l/.wh..wh..opq"}}, "l/.wh..wh..opq", ErrEscape},
		{"link, then link through it", nil, []ent{sym("l", "OUT"), sym("l/canary", "x")}, "l/canary", ErrEscape},
		{"link, then device through it", nil, []ent{sym("l", "OUT"), {name: "l/canary", typ: tar.TypeChar, major: 1, minor: 3}}, "l/canary", ErrEscape},
		{"link, then hard link through it", nil, []ent{sym("l", "OUT"), hard("h", "l/canary")}, "h", ErrEscape},
		{"hard link to a link, then through it", nil, []ent{sym("l", "OUT"), hard("h", "l"), {name: "h/canary", body: "x"}}, "h/canary", ErrEscape},
		{"lower link out", []ent{sym("l", "../outside")}, []ent{{name: "l/canary", body: "x"}}, "l/canary", ErrEscape},
		{"lower link far out", []ent{{name: "a/b/"}, sym("a/b/l", "../../../../../../../../OUT")}, []ent{{name: "a/b/l/canary", body: "x"}}, "a/b/l/canary", ErrEscape},
		{"lower absolute link out", []ent{sym("l", "OUT")}, []ent{{name: "l/canary", body: "x"}}, "l/canary", ErrEscape},
		{"lower link out, whiteout", []ent{sym("l", "OUT")}, []ent{{name: "l/.wh.canary"}}, "l/.wh.canary", ErrEscape},
		{"lower link out, opaque", []ent{sym("l", "../outside")}, []ent{{name: "l/.wh..wh..opq"}}, "l/.wh..wh..opq", ErrEscape},
		{"lower link out, hard link", []ent{sym("l", "../outside")}, []ent{hard("h", "l/canary")}, "h", ErrEscape},
		{"lower link to itself", []ent{sym("l", "l")}, []ent{{name: "l/x", body: "x"}}, "l/x", unix.ELOOP},
		{"lower links in a ring", []ent{sym("a", "b"), sym("b", "a")}, []ent{{name: "a/x", body: "x"}}, "a/x", unix.ELOOP},
		{"lower link to a file", []ent{{name: "f", body: "1"}, sym("l", "f")}, []ent{{name: "l/x", body: "x"}}, "l/x", unix.ENOTDIR},
		{"file as parent", nil, []ent{{name: "f", body: "1"}, {name: "f/x", body: "x"}}, "f/x", unix.ENOTDIR},
		{"hard link out", nil, []ent{hard("h", "../outside/canary")}, "h", ErrEscape},
		{"hard link absolute", nil, []ent{hard("h", "OUT/canary")}, "h", ErrEscape},
		{"hard link absolute to lower", lowerRoot, []ent{hard("h", "/etc/passwd")}, "h", ErrEscape},
		{"hard link to nothing", nil, []ent{hard("h", "nope")}, "h", unix.ENOENT},
		{"hard link to a directory", nil, []ent{{name: "d/"}, hard("h", "d")}, "h", ErrInvalid},
		{"hard link to the root", nil, []ent{hard("h", "./")}, "h", ErrInvalid},
		{"hard link without target", nil, []ent{hard("h", "")}, "h", ErrInvalid},
		{"hard link replaces its own target", nil, []ent{{name: "d/f", body: "1"}, hard("d", "d/f")}, "d", ErrInvalid},
		{"whiteout of dot dot", nil, []ent{{name: "a/"}, {name: "a/.wh..."}}, "a/.wh...", ErrInvalid},
		{"whiteout of dot", nil, []ent{{name: "a/"}, {name: "a/.wh.."}}, "a/.wh..", ErrInvalid},
		{"whiteout of nothing", nil, []ent{{name: ".wh."}}, ".wh.", ErrInvalid},
		{"below a whiteout", nil, []ent{{name: ".wh.d/f", body: "x"}}, ".wh.d/f", ErrInvalid},
		{"hard link to a whiteout", nil, []ent{{name: ".wh.d"}, hard("h", ".wh.d")}, "h", ErrInvalid},
		{"root is a link", nil, []ent{sym("./", "OUT")}, "./", ErrInvalid},
		{"root is a file", nil, []ent{{name: ".", body: "x"}}, ".", ErrInvalid},
		{"empty name", nil, []ent{{name: "", body: "x"}}, "", ErrInvalid},
		{"empty link target", nil, []ent{sym("l", "")}, "l", ErrInvalid},
		{"owner -1", nil, []ent{{name: "f", uid: -1}}, "f", ErrInvalid},
		{"owner 2^32-1", nil, []ent{{name: "f", uid: 1<<32 - 1}}, "f", ErrInvalid},
		{"group 2^40", nil, []ent{{name: "f", gid: 1 << 40}}, "f", ErrInvalid},
		{"major 4096", nil, []ent{{name: "f", typ: tar.TypeChar, major: 4096}}, "f", ErrInvalid},
		{"minor 2^20", nil, []ent{{name: "f", typ: tar.TypeBlock, minor: 1 << 20}}, "f", ErrInvalid},
		{"minor -1", nil, []ent{{name: "f", typ: tar.TypeBlock, minor: -1}}, "f", ErrInvalid},
		{"unknown type", nil, []ent{{name: "f", typ: 'Z'}}, "f", ErrInvalid},
		{"attribute the kernel refuses", nil, []ent{{name: "f", attrs: map[string]string{"security.capability": "nonsense"}}}, "f", unix.EINVAL},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, out, unchanged := cage(t, t.TempDir())
			put := func(ents []ent) []ent {
				var r []ent
				for _, e := range ents {
					e.name, e.link = strings.ReplaceAll(e.name, "OUT", out), strings.ReplaceAll(e.link, "OUT", out)
					r = append(r, e)
				}
				return r
			}
			mustApply(t, root, rawTar(t, put(c.lower)...))
			_, err := Apply(context.Background(), root, bytes.NewReader(rawTar(t, put(c.ents)...)), ApplyOptions{})
			wantEntryError(t, err, strings.ReplaceAll(c.bad, "OUT", out), c.kind)
			unchanged()
		})
	}
}

// cage makes two directories in dir: root, to apply to, and beside it one with a canary. unchanged fails
// the test if anything of that is not as it was.
func cage(t testing.TB, dir string) (root, outside string, unchanged func()) {
	t.Helper()
	root, outside = filepath.Join(dir, "root"), filepath.Join(dir, "outside")
	for _, d := range []string{root, outside} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "canary"), []byte("sings"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := treecmp.Read(outside, treecmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return root, outside, func() {
		t.Helper()
		after, err := treecmp.Read(outside, treecmp.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range treecmp.Compare(after, before, treecmp.Options{}) {
			t.Errorf("outside: %s", d)
		}
		if n := after["canary"].Nlink; n != 1 {
			t.Errorf("the file outside has %d links, want 1", n)
		}
	}
}

// rawTar is makeTar for headers that a tar.Writer does not want to write.
func rawTar(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, e := range ents {
		h := e.header()
		if h.Name == "" || h.Uid < 0 || h.Devminor < 0 {
			b.Write(rawHeader(h))
			b.WriteString(e.body)
			b.Write(make([]byte, (512-len(e.body)%512)%512))
			continue
		}
		one := makeTar(t, e)
		b.Write(one[:len(one)-1024])
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// rawHeader writes a GNU header with base-256 numbers, which can be negative.
func rawHeader(h *tar.Header) []byte {
	b := make([]byte, 512)
	num := func(off, n int, v int64) {
		for i := n - 1; i >= 0; i-- {
			b[off+i] = byte(v)
			v >>= 8
		}
		b[off] |= 0x80
	}
	copy(b, h.Name)
	num(100, 8, h.Mode)
	num(108, 8, int64(h.Uid))
	num(116, 8, int64(h.Gid))
	num(124, 12, h.Size)
	num(136, 12, h.ModTime.Unix())
	b[156] = h.Typeflag
	copy(b[157:257], h.Linkname)
	copy(b[257:], "ustar  \x00")
	num(329, 8, h.Devmajor)
	num(337, 8, h.Devminor)
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// Another file system mounted inside the root is outside, too.
func TestMountPointInside(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	mnt := filepath.Join(root, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", mnt, "tmpfs", 0, ""); err != nil {
		t.Skipf("SKIPPED: cannot mount: %v", err)
	}
	defer unix.Unmount(mnt, unix.MNT_DETACH)
	for _, e := range []ent{{name: "mnt/f", body: "x"}, {name: "mnt/", mode: 0o700}, {name: "mnt/.wh.f"}, {name: ".wh.mnt"}, {name: "mnt", body: "x"}} {
		_, err := Apply(context.Background(), root, bytes.NewReader(makeTar(t, e)), ApplyOptions{})
		wantEntryError(t, err, e.name, ErrEscape)
	}
	if got := listing(t, mnt); got != "" {
		t.Errorf("in the mount: %s", got)
	}
	if _, err := Diff(context.Background(), "", root, &bytes.Buffer{}, DiffOptions{}); !errors.Is(err, ErrEscape) {
		t.Errorf("diff: error %v, want %v", err, ErrEscape)
	}
}

func TestMessages(t *testing.T) {
	root := t.TempDir()
	for _, c := range []struct {
		e    ent
		want string
	}{
		{ent{name: "../x"}, `entry "../x": ".." in the name: leads out of the root`},
		{ent{name: "/x"}, `entry "/x": absolute name: leads out of the root`},
		{ent{name: "h", typ: tar.TypeLink, link: "../x"}, `entry "h": hard link to "../x": ".." in the name: leads out of the root`},
		{ent{name: "f", typ: tar.TypeChar, major: 4096}, `entry "f": device number 4096:0 is out of range: invalid entry`},
	} {
		_, err := Apply(context.Background(), root, bytes.NewReader(makeTar(t, c.e)), ApplyOptions{})
		if err == nil || err.Error() != c.want {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
}
