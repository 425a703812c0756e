package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hostileConfig makes the bounds small enough to be met in a test.
const hostileConfig = "[images]\nmax_archive = \"256M\"\nmax_layer = \"64M\"\nmax_entries = 2000\nmax_ratio = 1000\nmax_name = 1000\nmax_xattrs = \"8K\"\n"

// A hostile is a layer that must be refused, or that does something odd and is taken.
type hostile struct {
	name  string
	layer []byte
	words []string // of the refusal; nil: it is taken
}

// paxEntry is one entry with records of its own, which a tar.Writer would not write.
func paxEntry(t *testing.T, h tar.Header, records map[string]string, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h.PAXRecords, h.Format, h.Mode, h.Size = records, tar.FormatPAX, 0o644, int64(len(body))
	if err := w.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	w.Write(body)
	w.Close()
	return b.Bytes()
}

// sparseEntry is a sparse file of the old GNU kind: one byte of contents, size bytes long.
func sparseEntry(name string, size int64) []byte {
	b := make([]byte, 512)
	copy(b, name)
	octal := func(off, n int, v int64) { copy(b[off:], fmt.Sprintf("%0*o\x00", n-1, v)) }
	octal(100, 8, 0o644)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, 1)
	octal(136, 12, 1_700_000_000)
	b[156] = tar.TypeGNUSparse
	copy(b[257:], "ustar  \x00")
	octal(386, 12, 0)
	octal(398, 12, 1)
	big := func(off int, v int64) {
		for i := range 8 {
			b[off+4+i] = byte(v >> (8 * (7 - i)))
		}
		b[off] = 0x80
	}
	big(410, size)
	octal(422, 12, 0)
	big(483, size)
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(append(append(b, 'x'), make([]byte, 511)...), make([]byte, 1024)...)
}

func hostileLayers(t *testing.T, canary string) []hostile {
	many := make([]file, 2001)
	for i := range many {
		many[i] = file{name: fmt.Sprint("f", i)}
	}
	links := []file{{name: "target", body: []byte("x")}}
	for i := range 2000 {
		links = append(links, file{name: fmt.Sprint("l", i), typ: tar.TypeLink, link: "target"})
	}
	dir, base := filepath.Split(canary)
	up := strings.Repeat("../", 30) + strings.TrimPrefix(dir, "/")
	sym := func(name, target string) file { return file{name: name, typ: tar.TypeSymlink, link: target} }
	out := []string{"out of the root"}
	return []hostile{
		{"whiteout through a link", tarOf(t, sym("l", dir), file{name: "l/.wh." + base}), out},
		{"opaque through a link", tarOf(t, sym("l", dir), file{name: "l/.wh..wh..opq"}), out},
		{"whiteout of dot dot", tarOf(t, file{name: "etc/.wh..."}), []string{`"etc/.wh..."`, "invalid"}},
		{"hard link up", tarOf(t, file{name: "h", typ: tar.TypeLink, link: up + base}), out},
		{"hard link through a link", tarOf(t, sym("l", dir), file{name: "h", typ: tar.TypeLink, link: "l/" + base}), out},
		{"hard link to a link, then through it", tarOf(t, sym("l", up), file{name: "h", typ: tar.TypeLink, link: "l"}, file{name: "h/" + base, body: []byte("x")}), out},
		{"link of the layer below", tarOf(t, file{name: "etc/out/" + base, body: []byte("x")}), out},
		{"whiteout in a link of the layer below", tarOf(t, file{name: "etc/out/.wh." + base}), out},
		{"directory in a link of the layer below", tarOf(t, file{name: "etc/out/new/"}), out},
		{"device through a link of the layer below", tarOf(t, file{name: "etc/out/mem", typ: tar.TypeChar}), out},
		{"path record out", paxEntry(t, tar.Header{Name: up + base}, nil, []byte("x")), out},
		{"device number out of range", tarOf(t, file{name: "dev"}, file{name: "x", typ: 'Z'}), []string{`"x"`, "not a file"}},
		{"attribute the kernel refuses", paxEntry(t, tar.Header{Name: "f"}, map[string]string{"SCHILY.xattr.security.capability": "nonsense"}, nil), []string{`"f"`, "security.capability"}},
		{"attributes too large", paxEntry(t, tar.Header{Name: "f"}, map[string]string{"SCHILY.xattr.user.a": strings.Repeat("a", 8192)}, nil), []string{`"f"`, "8198", "8192"}},
		{"name too long", tarOf(t, file{name: strings.Repeat("d/", 600) + "f"}), []string{"1201 bytes", "1000"}},
		{"component too long", tarOf(t, file{name: strings.Repeat("c", 256)}), []string{"256", "255"}},
		{"too many entries", tarOf(t, many...), []string{"more than 2000 entries"}},
		{"too many links", tarOf(t, links...), []string{"more than 2000 entries"}},
		{"file too large", tarOf(t, file{name: "big", body: make([]byte, 65<<20)}), []string{"67108864"}},
		{"sparse file too large", sparseEntry("disk", 1<<40), []string{`"disk"`, "67108864"}},
		{"no tar", bytes.Repeat([]byte("this is no tar. "), 100), []string{"tar"}},
		{"more than the file system holds", nil, []string{"space"}},

		{"setuid and devices", tarOf(t, file{name: "su", body: []byte("x")}, file{name: "null", typ: tar.TypeChar}, file{name: "fifo", typ: tar.TypeFifo}), nil},
		{"things twice", tarOf(t, file{name: "x", body: []byte("1")}, file{name: "x/"}, file{name: "x/y", body: []byte("2")}, file{name: ".wh.x"}, file{name: "X", body: []byte("3")}), nil},
		{"links that lead out, kept as links", tarOf(t, sym("a", canary), sym("b", up+base), sym("c", "../../../../../..")), nil},
		{"opaque root", tarOf(t, file{name: ".wh..wh..opq"}, file{name: "only", body: []byte("1")}), nil},
		{"sparse file", sparseEntry("disk", 32<<20), nil},
		{"names for a shell", tarOf(t, file{name: "-rf", body: []byte("x")}, file{name: "$(touch " + dir + "pwned)", body: []byte("x")}, file{name: "`id`;\n|", body: []byte("x")}), nil},
	}
}

// TestHostileLayers: layers that reach out, contradict themselves or stand for far more than they
// are. Refused ones say which entry and which bound, and leave the pool as it was; whatever is taken
// is inside its container, and what it calls a link stays one.
func TestHostileLayers(t *testing.T) {
	b := newBox(t)
	b.config = "[pool]\nsize = \"2G\"\n[containers]\nbase_size = \"64M\"\n" + hostileConfig
	b.start()
	b.smallImage()
	out := b.mkdir("outside")
	canary := b.writeFile("outside/canary", []byte("sings"))
	if err := os.Chmod(canary, 0o600); err != nil {
		t.Fatal(err)
	}
	before := treeText(t, out)
	low := tarOf(t, file{name: "etc/"}, file{name: "etc/out", typ: tar.TypeSymlink, link: out}, file{name: "big", body: pattern(5, 1<<20)})
	fill := make([]file, 60)
	for i := range fill {
		fill[i] = file{name: fmt.Sprint("fill", i), body: pattern(uint64(i), 1<<20)}
	}
	for _, h := range hostileLayers(t, canary) {
		t.Run(h.name, func(t *testing.T) {
			outer := b.T
			b.T = t
			defer func() { b.T = outer }()
			layers := [][]byte{low, h.layer}
			if h.layer == nil { // within the bounds, and more than the file system of 64M holds
				layers[1] = tarOf(t, fill...)
			}
			path := b.archive("bad.tar", ociImage{name: "bad", layers: layers})
			was := b.figures()
			if h.words != nil {
				begin := time.Now()
				b.fails([]string{"image", "import", path}, h.words...)
				if took := time.Since(begin); took > time.Minute {
					t.Errorf("it took %v to refuse it", took)
				}
				if now := b.figures(); now != was {
					t.Errorf("the store has changed: %+v, was %+v", now, was)
				}
			} else {
				b.mica("image", "import", path)
				b.mica("create", "bad", "c")
				dir := b.mount("c")
				inside(t, dir)
				b.unmount(dir)
				b.mica("umount", "c")
				b.mica("rm", "c")
				b.mica("image", "rm", "bad")
				if now := b.figures(); now != was {
					t.Errorf("after it is removed: %+v, was %+v", now, was)
				}
			}
			if after := treeText(t, out); after != before {
				t.Errorf("outside: %s, was %s", after, before)
			}
			if loops := loopsBelow(b.dir); len(loops) > 1 { // the base's, for a moment
				t.Errorf("loop devices %q", loops)
			}
			if entries, _ := os.ReadDir(filepath.Join(b.root, "spool")); len(entries) > 0 {
				t.Errorf("a spool file: %s", entries[0].Name())
			}
		})
	}
}

// treeText describes a directory: names, modes, owners, links, sizes, times and contents.
func treeText(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(p, &st); err != nil {
			return err
		}
		text := ""
		if e.Type().IsRegular() {
			c, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text = string(c)
		}
		fmt.Fprintf(&b, "%s %o %d:%d %d links %d bytes %v %q; ", p, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Mtim, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// inside: everything below dir is of one file system, and no link was followed to make it.
func inside(t *testing.T, dir string) {
	t.Helper()
	var root syscall.Stat_t
	if err := syscall.Stat(dir, &root); err != nil {
		t.Fatal(err)
	}
	n := 0
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n++
		var st syscall.Stat_t
		if err := syscall.Lstat(p, &st); err != nil {
			return err
		}
		if st.Dev != root.Dev {
			t.Errorf("%s is on another file system", p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 2 {
		t.Errorf("nothing is in %s", dir)
	}
}

// TestHostileManifests: what the layers' descriptions can get wrong or lie about, through the daemon.
func TestHostileManifests(t *testing.T) {
	b := newBox(t)
	b.config += hostileConfig
	b.start()
	b.smallImage()
	layer := tarOf(t, file{name: "f", body: pattern(1, 1000)})
	was := b.figures()
	put := func(files []file) string { return b.writeFile("bad.tar", tarOf(t, files...)) }
	edit := func(change func(name string, body []byte) []byte) []file {
		files := ociFiles(t, ociImage{name: "bad", layers: [][]byte{layer}})
		for i, f := range files {
			files[i].body = change(f.name, f.body)
		}
		return files
	}
	index := func(text string) []file {
		return edit(func(name string, body []byte) []byte {
			if name == "index.json" {
				return []byte(text)
			}
			return body
		})
	}
	// An index that another blob of the archive names again and again.
	nested := func() []file {
		files := ociFiles(t, ociImage{name: "bad", layers: [][]byte{layer}})
		body := []byte(`{"schemaVersion":2,"manifests":[]}`)
		for range 4 {
			d := digestOf(body)
			files = append(files, file{name: "blobs/sha256/" + d[7:], body: body})
			one := fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"%s","size":%d}`, d, len(body))
			body = []byte(`{"schemaVersion":2,"manifests":[` + strings.TrimSuffix(strings.Repeat(one+",", 1000), ",") + `]}`)
		}
		for i := range files {
			if files[i].name == "index.json" {
				files[i].body = body
			}
		}
		return files
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	io.CopyN(z, endlessZeros{}, 300<<20)
	z.Close()
	for _, c := range []struct {
		name  string
		path  string
		words []string
	}{
		{"indexes of indexes", put(nested()), []string{"indexes, manifests and configs of more than"}},
	} {
		b.fails([]string{"image", "import", c.path}, c.words...)
	}
	for name, c := range map[string]struct {
		files []file
		words []string
	}{
		"a list of nothing":      {index(`{"manifests":[` + strings.Repeat("{},", 1<<20) + `{}]}`), []string{"values, at most 200000"}},
		"an index of 9 MB":       {index(`{"manifests":[]}` + strings.Repeat(" ", 9<<20)), []string{"index.json", "8388608"}},
		"a digest with a path":   {index(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../../../etc/shadow","size":1}]}`), []string{"digest"}},
		"a blob that is missing": {edit(func(n string, b []byte) []byte { return b })[:2], []string{"missing"}},
		"a blob that is a link": {append(edit(func(n string, b []byte) []byte {
			if n == "index.json" {
				return []byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("0", 64) + `","size":7}]}`)
			}
			return b
		}), file{name: "blobs/sha256/" + strings.Repeat("0", 64), typ: tar.TypeSymlink, link: "../../../../../etc/hostname"}), []string{"outside of the archive"}},
	} {
		msg := b.fails([]string{"image", "import", put(c.files)}, c.words...)
		if now := b.figures(); now != was {
			t.Errorf("%s: the store has changed: %+v, was %+v (%s)", name, now, was, msg)
		}
	}
	// A bomb as a stream: refused when it has unpacked to the bound, not to the end.
	cmd := b.command("image", "import", "-", "--name", "bad")
	cmd.Stdin = bytes.NewReader(bomb.Bytes())
	outText, stderr, code := b.tryCommand(cmd)
	b.wantFailure("image import -", outText, stderr, code, 1, []string{"268435456"})
	if now := b.figures(); now != was {
		t.Errorf("the store has changed: %+v, was %+v", now, was)
	}
	// The daemon has not grown: its memory is that of a daemon, not of what it was sent.
	if st := b.status(); st.MemoryBytes > 400<<20 {
		text, _ := json.Marshal(st)
		t.Errorf("the daemon uses %d bytes: %s", st.MemoryBytes, text)
	}
}

type endlessZeros struct{}

func (endlessZeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
