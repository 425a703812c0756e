package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// paxTar is an archive of one entry with extended records that a tar.Writer does not write.
func paxTar(records []string, e ent) []byte {
	var pax string
	for _, r := range records {
		line := " " + r + "\n"
		n := len(line) + 1
		for n != len(line)+len(fmt.Sprint(n)) {
			n = len(line) + len(fmt.Sprint(n))
		}
		pax += fmt.Sprint(n) + line
	}
	var b bytes.Buffer
	put := func(h *tar.Header, body string) {
		h.Size = int64(len(body))
		b.Write(rawHeader(h))
		b.WriteString(body)
		b.Write(make([]byte, (512-len(body)%512)%512))
	}
	put(&tar.Header{Name: "PaxHeaders/x", Typeflag: tar.TypeXHeader, Mode: 0o644, ModTime: epoch}, pax)
	put(e.header(), e.body)
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

// gnuSparse is an archive of one sparse file of the old kind: size bytes, of which the first are
// body.
func gnuSparse(name string, size int64, body string) []byte {
	h := rawHeader(&tar.Header{Name: name, Typeflag: tar.TypeGNUSparse, Mode: 0o644, Size: int64(len(body)), ModTime: epoch})
	num := func(off int, v int64) {
		b := h[off : off+12]
		clear(b)
		binary.BigEndian.PutUint64(b[4:], uint64(v))
		b[0] = 0x80
	}
	num(386, 0)
	num(398, int64(len(body)))
	num(410, size) // the end, an empty piece
	num(422, 0)
	num(483, size)
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(append(append(h, body...), make([]byte, (512-len(body)%512)%512)...), make([]byte, 1024)...)
}

// TestBombs: archives that stand for far more than they are, refused within bounds.
func TestBombs(t *testing.T) {
	l := Limits{MaxBytes: 1 << 40, MaxRatio: 100, RatioFree: 1 << 20, MaxTar: 1 << 20}
	for _, c := range []struct {
		name string
		data io.Reader
		want string
	}{
		{"old sparse file", bytes.NewReader(gnuSparse("disk", 1<<39, "x")), `entry "disk"`},
		{"sparse file of format 0.1", bytes.NewReader(paxTar([]string{"GNU.sparse.size=549755813888", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,1", "GNU.sparse.name=disk"},
			ent{name: "GNUSparseFile.0/disk", body: "x"})), `entry "disk"`},
		{"sparse file of format 1.0", bytes.NewReader(paxTar([]string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=disk", "GNU.sparse.realsize=549755813888"},
			ent{name: "GNUSparseFile.0/disk", body: "1\n0\n1\n" + strings.Repeat("\x00", 506) + "x"})), `entry "disk"`},
		{"sparse file beyond all", bytes.NewReader(gnuSparse("disk", 1<<62, "x")), "at most 1099511627776 in all"},
		{"zeros without end", io.MultiReader(bytes.NewReader(makeTar(t, ent{name: "f"})), endless{}), "more than 1048576 bytes uncompressed"},
		{"one entry again and again", &repeated{b: plainTar(t, ent{name: "f", body: "x"})[:1024]}, "more than 1048576 bytes uncompressed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			st, err := Apply(context.Background(), root, c.data, ApplyOptions{Limits: l})
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			if _, err := os.Lstat(filepath.Join(root, "disk")); err == nil {
				t.Error("the file was begun")
			}
			if st.Entries > 2000 {
				t.Errorf("%d entries", st.Entries)
			}
		})
	}
	// A sparse file within the ratio is applied, holes and all.
	root := t.TempDir()
	if _, err := Apply(context.Background(), root, bytes.NewReader(gnuSparse("disk", 64<<20, strings.Repeat("x", 1<<20))), ApplyOptions{Limits: Limits{RatioFree: 1 << 20}}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "disk"), &st); err != nil || st.Size != 64<<20 || st.Blocks*512 > 2<<20 {
		t.Errorf("sparse file: %d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type repeated struct {
	b []byte
	n int
}

func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, r.b[r.n%len(r.b):])
	r.n += n
	return n, nil
}

// TestUnpacking: the bounds of a decompressor's stream.
func TestUnpacking(t *testing.T) {
	for _, c := range []struct {
		name         string
		n, stored    int64
		l            Limits
		wantRead     int64
		want         string
		uncompressed bool
	}{
		{name: "within", n: 5000, stored: 10, l: Limits{MaxTar: 5000, MaxRatio: 500, RatioFree: 1}, wantRead: 5000},
		{name: "too long", n: 5001, stored: 10, l: Limits{MaxTar: 5000}, want: "more than 5000 bytes uncompressed"},
		{name: "too much of too little", n: 5010, stored: 10, l: Limits{MaxRatio: 500, RatioFree: 1}, want: "10 bytes unpack to more than 5010, at most 500 times as many"},
		{name: "little is free", n: 5010, stored: 10, l: Limits{MaxRatio: 500, RatioFree: 5010}, wantRead: 5010},
		{name: "not compressed", n: 5010, stored: 10, l: Limits{MaxRatio: 1, RatioFree: 1}, wantRead: 5010, uncompressed: true},
		{name: "defaults", n: 1 << 20, stored: 1, wantRead: 1 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			stored := func() int64 { return c.stored }
			if c.uncompressed {
				stored = nil
			}
			n, err := io.Copy(io.Discard, Unpacking(io.LimitReader(endless{}, c.n), stored, c.l))
			if c.want == "" {
				if err != nil || n != c.wantRead {
					t.Errorf("%d bytes, %v", n, err)
				}
				return
			}
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestManyEntriesTakeBoundedMemory: what an Apply remembers is counted before it is too much.
func TestManyEntriesTakeBoundedMemory(t *testing.T) {
	const most = 4 << 20
	name := strings.Repeat("a/", 100)
	var heap runtime.MemStats
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		for i := 0; ; i++ {
			if err := tw.WriteHeader(ent{name: fmt.Sprintf("%s%d", name, i), typ: tar.TypeLink, link: name + "0"}.header()); err != nil {
				return
			}
			if i == 0 { // what the others are links to
				tw.Flush()
			}
		}
	}()
	defer r.Close()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, name, "0"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&heap)
	before := heap.HeapAlloc
	st, err := Apply(context.Background(), root, r, ApplyOptions{Limits: Limits{MaxNames: most}})
	if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "bytes of memory") {
		t.Fatalf("error %v after %d entries", err, st.Entries)
	}
	runtime.ReadMemStats(&heap)
	if heap.HeapAlloc > before+4*most+(8<<20) {
		t.Errorf("%d bytes more than before for %d entries, the limit is %d", heap.HeapAlloc-before, st.Entries, most)
	}
	if want := int64(most / (pathCost + len(name) + 3)); st.Entries < want/2 || st.Entries > 2*want {
		t.Errorf("%d entries, want some %d", st.Entries, want)
	}
}

// TestOddRecords: records and headers that contradict each other or themselves. Whatever they come
// to, it is inside the root; what cannot be is refused.
func TestOddRecords(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name    string
		data    []byte
		listing string // "": refused
	}{
		{"size over the header's", paxTar([]string{"size=3"}, ent{name: "f", body: "abc"}), "f=abc"},
		{"size beyond the end", paxTar([]string{"size=99999"}, ent{name: "f", body: "abc"}), ""},
		{"negative size", paxTar([]string{"size=-1"}, ent{name: "f", body: "abc"}), ""},
		{"size that is none", paxTar([]string{"size=1e3"}, ent{name: "f", body: "abc"}), ""},
		{"path over the header's", paxTar([]string{"path=g"}, ent{name: "f", body: "abc"}), "g=abc"},
		{"path out", paxTar([]string{"path=../outside/canary"}, ent{name: "f", body: "abc"}), ""},
		{"absolute path", paxTar([]string{"path=/etc/passwd"}, ent{name: "f", body: "abc"}), ""},
		{"path with NUL", paxTar([]string{"path=f\x00/../../outside/canary"}, ent{name: "f", body: "abc"}), ""},
		{"empty path", paxTar([]string{"path="}, ent{name: "f", body: "abc"}), "f=abc"},
		{"link path over the header's", paxTar([]string{"linkpath=../outside/canary"}, ent{name: "h", typ: tar.TypeLink, link: "f"}), ""},
		{"link path with NUL", paxTar([]string{"linkpath=f\x00x"}, ent{name: "l", typ: tar.TypeSymlink, link: "f"}), ""},
		{"link path of a file", paxTar([]string{"linkpath=../outside/canary"}, ent{name: "f", body: "abc"}), "f=abc"},
		{"owner beyond 32 bits", paxTar([]string{"uid=4294967296"}, ent{name: "f", body: "abc"}), ""},
		{"owner that means none", paxTar([]string{"gid=4294967295"}, ent{name: "f", body: "abc"}), ""},
		{"attribute with NUL", paxTar([]string{"SCHILY.xattr.user.\x00=v"}, ent{name: "f", body: "abc"}), ""},
		{"attribute without a name", paxTar([]string{"SCHILY.xattr.=v"}, ent{name: "f", body: "abc"}), "f=abc"},
		{"record that ends early", paxTar([]string{"path=g"}, ent{name: "f", body: "abc"})[:513], ""},
		{"sparse name out", paxTar([]string{"GNU.sparse.size=3", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,3", "GNU.sparse.name=../outside/canary"}, ent{name: "f", body: "abc"}), ""},
		{"sparse pieces that overlap", paxTar([]string{"GNU.sparse.size=3", "GNU.sparse.numblocks=2", "GNU.sparse.map=0,3,1,2"}, ent{name: "f", body: "abcde"}), ""},
		{"sparse piece beyond the file", paxTar([]string{"GNU.sparse.size=3", "GNU.sparse.numblocks=1", "GNU.sparse.map=9223372036854775807,9"}, ent{name: "f", body: "abc"}), ""},
		{"file with a size, of a link", paxTar([]string{"comment=x"}, ent{name: "l", typ: tar.TypeSymlink, link: "x", body: "abc"}), "any"},
		{"directory with contents", rawTar(t, ent{name: "d/", body: ""}, ent{name: "f", body: "d"}), "d/ f=d"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, _, unchanged := cage(t, t.TempDir())
			_, err := Apply(context.Background(), root, bytes.NewReader(c.data), ApplyOptions{})
			switch {
			case c.listing == "any":
			case c.listing == "" && err == nil:
				t.Errorf("no error: %s", listing(t, root))
			case c.listing != "" && err != nil:
				t.Error(err)
			case c.listing != "" && listing(t, root) != c.listing:
				t.Errorf("tree %q, want %q", listing(t, root), c.listing)
			}
			unchanged()
		})
	}
}

// TestConflicts: entries that are there twice, as one thing and as another, hidden and brought. The
// last one counts; a whiteout hides what was there before the archive and nothing of its own.
func TestConflicts(t *testing.T) {
	needRoot(t)
	sym := func(name, target string) ent { return ent{name: name, typ: tar.TypeSymlink, link: target} }
	hard := func(name, target string) ent { return ent{name: name, typ: tar.TypeLink, link: target} }
	low := []ent{{name: "d/"}, {name: "d/low", body: "l"}, {name: "f", body: "low"}}
	for _, c := range []struct {
		name string
		low  []ent
		ents []ent
		want string
	}{
		{"twice", nil, []ent{{name: "f", body: "1"}, {name: "f", body: "2"}}, "f=2"},
		{"twice in other words", nil, []ent{{name: "f", body: "1"}, {name: ".//./f", body: "2"}}, "f=2"},
		{"file, then directory", nil, []ent{{name: "x", body: "1"}, {name: "x/"}, {name: "x/y", body: "2"}}, "x/ x/y=2"},
		{"directory, then file", nil, []ent{{name: "x/"}, {name: "x/y", body: "2"}, {name: "x", body: "1"}}, "x=1"},
		{"directory, then link, then directory", nil, []ent{{name: "x/"}, {name: "x/y", body: "1"}, sym("x", "z"), {name: "x/"}, {name: "x/w", body: "2"}}, "x/ x/w=2"},
		{"file, then link of that name", nil, []ent{{name: "x", body: "1"}, {name: "y", body: "2"}, hard("x", "y")}, "x=2 y=2"},
		{"link to itself", nil, []ent{{name: "x", body: "1"}, hard("x", "x")}, "x=1"},
		{"written through a link of this archive", nil, []ent{{name: "a", body: "1"}, hard("b", "a"), {name: "b", body: "2"}}, "a=1 b=2"},
		{"lower directory, then file", low, []ent{{name: "d", body: "1"}}, "d=1 f=low"},
		{"lower file, then directory", low, []ent{{name: "f/"}, {name: "f/g", body: "1"}}, "d/ d/low=l f/ f/g=1"},
		{"whiteout, then the same name", low, []ent{{name: ".wh.f"}, {name: "f", body: "new"}}, "d/ d/low=l f=new"},
		{"the name, then its whiteout", low, []ent{{name: "f", body: "new"}, {name: ".wh.f"}}, "d/ d/low=l f=new"},
		{"whiteout of a directory that is being written", low, []ent{{name: "d/"}, {name: "d/new", body: "n"}, {name: ".wh.d"}, {name: "d/newer", body: "m"}}, "d/ d/new=n d/newer=m f=low"},
		{"opaque after what it would hide", low, []ent{{name: "d/new", body: "n"}, {name: "d/.wh..wh..opq"}}, "d/ d/new=n f=low"},
		{"opaque of the root", low, []ent{{name: ".wh..wh..opq"}, {name: "n", body: "1"}}, "n=1"},
		{"opaque of the root, last", low, []ent{{name: "n", body: "1"}, {name: ".wh..wh..opq"}}, "n=1"},
		{"opaque of what is a file", low, []ent{{name: "f/.wh..wh..opq"}}, "d/ d/low=l f=low"},
		{"opaque of what is not there", low, []ent{{name: "nope/.wh..wh..opq"}}, "d/ d/low=l f=low"},
		{"whiteout twice", low, []ent{{name: ".wh.f"}, {name: ".wh.f"}}, "d/ d/low=l"},
		{"whiteout of a whiteout", low, []ent{{name: ".wh..wh.f"}}, "d/ d/low=l f=low"},
		{"whiteout with contents", low, []ent{{name: ".wh.f", body: "not nothing"}}, "d/ d/low=l"},
		{"whiteout that is a directory", low, []ent{{name: ".wh.f/"}}, "d/ d/low=l"},
		{"names that differ in case", low, []ent{{name: "F", body: "1"}, {name: "D/"}, {name: "D/LOW", body: "2"}}, "D/ D/LOW=2 F=1 d/ d/low=l f=low"},
		{"names that look alike", nil, []ent{{name: "\u00e9", body: "1"}, {name: "e\u0301", body: "2"}}, "e\u0301=2 \u00e9=1"},
		{"names that a shell would read", nil, []ent{{name: "-rf", body: "1"}, {name: "$(id)", body: "2"}, {name: "a;b|c&d", body: "3"}, {name: "new\nline", body: "4"}}, "$(id)=2 -rf=1 a;b|c&d=3 new\nline=4"},
		{"names that are not text", nil, []ent{{name: "\xff\xfe", body: "1"}}, "\xff\xfe=1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			mustApply(t, root, rawTar(t, c.low...))
			mustApply(t, root, plainTar(t, c.ents...))
			if got := listing(t, root); got != c.want {
				t.Errorf("tree %q, want %q", got, c.want)
			}
		})
	}
}

// plainTar is makeTar in the GNU form, which takes any bytes in names.
func plainTar(t *testing.T, ents ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		h := e.header()
		h.Format = tar.FormatGNU
		h.ModTime = h.ModTime.Truncate(1e9)
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("header %q: %v", e.name, err)
		}
		io.WriteString(w, e.body)
	}
	w.Close()
	return b.Bytes()
}

// TestModesAreKept: setuid, setgid, sticky and devices are an image's to have; they are inside.
func TestModesAreKept(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	mustApply(t, root, makeTar(t, ent{name: "su", body: "x", mode: 0o4755, uid: 0}, ent{name: "sg", body: "x", mode: 0o2755, gid: 5},
		ent{name: "tmp/", mode: 0o1777}, ent{name: "mem", typ: tar.TypeChar, major: 1, minor: 1, mode: 0o640},
		ent{name: "h", typ: tar.TypeLink, link: "su"}))
	for name, want := range map[string]uint32{"su": unix.S_IFREG | 0o4755, "h": unix.S_IFREG | 0o4755, "sg": unix.S_IFREG | 0o2755, "tmp": unix.S_IFDIR | 0o1777, "mem": unix.S_IFCHR | 0o640} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil || st.Mode != want {
			t.Errorf("%s: mode %o, want %o, %v", name, st.Mode, want, err)
		}
	}
}

// TestDeepTreesGoAway: trees as deep as names allow can be hidden and replaced, in bounded stack and
// descriptors.
func TestDeepTreesGoAway(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	deep := strings.Repeat("d/", 2047)
	mustApply(t, root, makeTar(t, ent{name: deep + "f", body: "x"}))
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	mustApply(t, root, makeTar(t, ent{name: "d", body: "a file now"}))
	if got := listing(t, root); got != "d=a file now" {
		t.Errorf("tree %q", got)
	}
}

// TestRandomNames: any bytes but NUL and slash make a name, and it is there afterwards.
func TestRandomNames(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	var ents []ent
	want := map[string]bool{}
	for range 300 {
		b := make([]byte, 1+r.IntN(100))
		for i := range b {
			b[i] = byte(1 + r.IntN(255))
			if b[i] == '/' {
				b[i] = '_'
			}
		}
		n := string(b)
		if n == "." || n == ".." || strings.HasPrefix(n, whPrefix) {
			continue
		}
		want[n] = true
		ents = append(ents, ent{name: n, body: "x"})
	}
	root := t.TempDir()
	mustApply(t, root, plainTar(t, ents...))
	got, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range got {
		if !want[e.Name()] {
			t.Errorf("%q was not in the archive", e.Name())
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
}
