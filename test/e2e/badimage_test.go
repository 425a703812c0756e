package e2e

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestHostileArchives: archives that are broken or hostile, from a file and from a stream, are
// refused with the entry or digest that is wrong, and leave the pool and the store as they were.
func TestHostileArchives(t *testing.T) {
	b := newBox(t)
	b.start()
	b.smallImage()
	low := tarOf(t, file{name: "etc/"}, file{name: "etc/passwd", body: []byte("root")}, file{name: "big", body: pattern(5, 3<<20)})
	good := func(top []byte) ociImage { return ociImage{name: "bad", layers: [][]byte{low, top}} }
	entry := func(files ...file) []byte {
		return tarOf(t, ociFiles(t, good(tarOf(t, append([]file{{name: "first", body: pattern(6, 1<<20)}}, files...)...)))...)
	}
	outside := b.mkdir("outside")
	canary := b.writeFile("outside/canary", []byte("sings"))
	sound := entry(file{name: "last", body: pattern(8, 1<<20)})
	flipped := bytes.Clone(sound)
	flipped[bytes.Index(flipped, pattern(8, 64))+1000] ^= 1
	lie := digestOf([]byte("something else"))
	for _, c := range []struct {
		name  string
		text  []byte
		words []string
	}{
		{"dot dot", entry(file{name: "../../../outside/canary", body: []byte("x")}), []string{`"../../../outside/canary"`, "out of the root"}},
		{"absolute", entry(file{name: canary, body: []byte("x")}), []string{`"` + canary + `"`, "absolute", "out of the root"}},
		{"absolute inside", entry(file{name: "/etc/passwd", body: []byte("x")}), []string{`"/etc/passwd"`, "absolute"}},
		{"symbolic link as parent", entry(file{name: "l", typ: tar.TypeSymlink, link: outside}, file{name: "l/canary", body: []byte("x")}),
			[]string{`"l/canary"`, "out of the root"}},
		{"symbolic link of dots as parent", entry(file{name: "etc/l", typ: tar.TypeSymlink, link: "../../../../../../../.." + outside},
			file{name: "etc/l/canary", body: []byte("x")}), []string{`"etc/l/canary"`, "out of the root"}},
		{"hard link out", entry(file{name: "h", typ: tar.TypeLink, link: canary}), []string{`"h"`, canary, "out of the root"}},
		{"flipped byte in a layer", flipped, []string{"layer", "sha256:", "digest"}},
		{"other diff id", tarOf(t, ociFiles(t, ociImage{name: "bad", layers: [][]byte{low, tarOf(t, file{name: "x", body: []byte("x")})}, lie: lie})...),
			[]string{"layer", lie, "digest"}},
		{"cut after an eighth", sound[:len(sound)/8], nil},
		{"cut in the middle", sound[:len(sound)/2], nil},
		{"cut in the last layer", sound[:len(sound)*7/8], nil},
		{"empty", nil, nil},
		{"a text", bytes.Repeat([]byte("this is no image\n"), 10_000), nil},
		{"a tar of something else", low, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			outer := b.T
			b.T = t
			defer func() { b.T = outer }()
			before := b.figures()
			path := b.writeFile("bad.tar", c.text)
			if c.words == nil {
				c.words = []string{"archive"}
			}
			msg := b.fails([]string{"image", "import", path}, c.words...)
			if !strings.Contains(msg, path) && !strings.Contains(msg, `"bad"`) {
				t.Errorf("neither the file nor the image is named: %s", msg)
			}
			cmd := b.command("image", "import", "-", "--name", "bad")
			cmd.Stdin = bytes.NewReader(c.text)
			out, stderr, code := b.tryCommand(cmd)
			b.wantFailure("image import -", out, stderr, code, 1, c.words)
			if after := b.figures(); after != before {
				t.Errorf("the store has changed: %+v, was %+v", after, before)
			}
		})
	}
	if text := b.readFile(canary); string(text) != "sings" {
		t.Errorf("a file outside was changed to %q", text)
	}
	// The same archive, whole, goes in.
	b.writeFile("bad.tar", sound)
	b.mica("image", "import", b.path("bad.tar"))
}

// TestDaemonRefusals: names and sizes that do not fit, and things that are in use.
func TestDaemonRefusals(t *testing.T) {
	b := newBox(t)
	b.start()
	b.smallImage()
	b.mica("create", "small", "web")
	b.mica("snapshot", "web", "one")
	b.mica("create", "small", "busy")
	dir := b.mount("busy")
	b.mica("create", "small", "vm")
	b.mica("attach", "vm", "--as", "nbd")
	before := b.figures()
	const tooLarge = "200T"
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"create", "none", "x"}, []string{`"none"`, "not found"}},
		{[]string{"create", "small", "a/b"}, []string{`"a/b"`, "invalid"}},
		{[]string{"create", "small", strings.Repeat("n", 300)}, []string{"nnn", "invalid"}},
		{[]string{"create", "small", "x", "--size", "1M"}, []string{"1048576", "4194304"}},
		{[]string{"create", "small", "x", "--size", "128M"}, []string{"134217728", "536870912"}},
		{[]string{"create", "small", "x", "--size", "1000000001"}, []string{"1000000001"}},
		{[]string{"create", "small", "x", "--size", tooLarge}, []string{"219902325555200"}},
		{[]string{"resize", "web", "1M"}, []string{"1048576", "4194304"}},
		{[]string{"resize", "web", "128M"}, []string{`"web"`, "134217728", "536870912"}},
		{[]string{"resize", "web", tooLarge}, []string{"219902325555200"}},
		{[]string{"resize", "none", "1G"}, []string{`"none"`, "not found"}},
		{[]string{"mount", "none", b.mkdir("m")}, []string{`"none"`, "not found"}},
		{[]string{"mount", "web", b.path("nowhere")}, []string{"nowhere", "no such file"}},
		{[]string{"attach", "none"}, []string{`"none"`, "not found"}},
		{[]string{"attach", "busy", "--as", "nbd"}, []string{`"busy"`, "block"}},
		{[]string{"attach", "vm"}, []string{`"vm"`, "nbd"}},
		{[]string{"mount", "vm", b.path("m")}, []string{`"vm"`, "guest"}},
		{[]string{"detach", "busy"}, []string{`"busy"`, "mounted on " + dir}},
		{[]string{"snapshot", "none"}, []string{`"none"`, "not found"}},
		{[]string{"snapshot", "rm", "web", "two"}, []string{`"two"`, "not found"}},
		{[]string{"rollback", "web", "two"}, []string{`"two"`, "not found"}},
		{[]string{"rollback", "busy", "one"}, []string{`"busy"`}},
		{[]string{"fork", "none", "x"}, []string{`"none"`, "not found"}},
		{[]string{"fork", "web", "busy"}, []string{`"busy"`, "exists"}},
		{[]string{"fork", "web", "x", "x"}, []string{`"x"`}},
		{[]string{"fork", "web", "--count", "100000", "--prefix", "x"}, []string{"100000", "10000"}},
		{[]string{"commit", "none", "x"}, []string{`"none"`, "not found"}},
		{[]string{"commit", "web", "small"}, []string{`"small"`, "exists"}},
		{[]string{"diff", "none", "-o", b.path("d")}, []string{`"none"`, "not found"}},
		{[]string{"rm", "none"}, []string{`"none"`, "not found"}},
		{[]string{"rm", "busy"}, []string{`"busy"`, "mounted on " + dir}},
		{[]string{"rm", "web"}, []string{`"web"`, "snapshot"}},
		{[]string{"image", "rm", "none"}, []string{`"none"`, "not found"}},
		{[]string{"image", "import", b.path("none.tar")}, []string{"none.tar", "no such file"}},
		{[]string{"image", "tag", "none", "x"}, []string{`"none"`, "not found"}},
		{[]string{"inspect", "none"}, []string{`"none"`, "there is no"}},
		{[]string{"pool", "grow", "--size", "1G"}, []string{"1073741824", "32768"}},
		{[]string{"pool", "grow", "--metadata-size", "4K"}, []string{"4096"}},
		{[]string{"shutdown"}, []string{"busy: mounted on " + dir}},
	} {
		b.fails(c.args, c.words...)
		if after := b.figures(); after != before {
			t.Fatalf("mica %s has changed the store: %+v, was %+v", strings.Join(c.args, " "), after, before)
		}
	}
}

// TestTwoImportsAtOnce: two imports of one image at the same time, then of images that share a
// layer: every layer is there once.
func TestTwoImportsAtOnce(t *testing.T) {
	b := newBox(t)
	b.start()
	low := tarOf(t, file{name: "big", body: pattern(1, 16<<20)})
	one := b.archive("one.tar", ociImage{name: "one", layers: [][]byte{low, tarOf(t, file{name: "one", body: pattern(2, 4<<20)})}})
	two := b.archive("two.tar", ociImage{name: "two", layers: [][]byte{low, tarOf(t, file{name: "two", body: pattern(3, 4<<20)})}})
	empty := b.figures()
	// What it costs alone.
	b.mica("image", "import", one)
	alone := b.figures()
	b.mica("image", "rm", "one")
	if got := b.figures(); got != empty {
		t.Errorf("after removing the image: %+v, want %+v", got, empty)
	}
	at := func(paths ...string) {
		t.Helper()
		var all sync.WaitGroup
		for _, p := range paths {
			all.Go(func() {
				if out, err := b.command("image", "import", p).CombinedOutput(); err != nil {
					t.Errorf("import of %s beside others: %v\n%s", p, err, out)
				}
			})
		}
		all.Wait()
	}
	at(one, one, one)
	if got := b.figures(); got.images != 1 || got.layers != 2 || got.devices != alone.devices || got.used > alone.used+16 {
		t.Errorf("three imports of one image: %+v, one alone: %+v", got, alone)
	}
	b.mica("image", "rm", "one")
	b.figures()
	at(one, two, one, two)
	if got := b.figures(); got.images != 2 || got.layers != 3 {
		t.Errorf("imports that share a layer: %+v", got)
	}
	b.mica("image", "rm", "one", "two")
	if got := b.figures(); got != empty {
		t.Errorf("at the end: %+v, want %+v", got, empty)
	}
}

// TestKilledImport: an import that ends in the middle of a layer, by Ctrl-C or with the daemon
// killed, and again and again at other places, leaves nothing, and can be repeated.
func TestKilledImport(t *testing.T) {
	b := newBox(t)
	b.start()
	var layers [][]byte
	for i := range 3 {
		files := []file{{name: "same", body: pattern(uint64(i), 200_000)}}
		for j := range 60 {
			files = append(files, file{name: fmt.Sprintf("d%d/f%d", i, j), body: pattern(uint64(i*100+j), 300_000)})
		}
		layers = append(layers, tarOf(t, files...))
	}
	archive := b.archive("big.tar", ociImage{name: "big", layers: layers})
	empty := b.figures()
	begin := time.Now()
	b.mica("image", "import", archive)
	took := time.Since(begin)
	whole := b.figures()
	b.mica("image", "rm", "big")
	b.figures()
	for i := range 8 {
		c := b.background(b.command("image", "import", archive))
		// Wherever that is: before, between and in the layers.
		time.Sleep(took * time.Duration(i+1) / 10)
		what := "Ctrl-C"
		if i%2 == 0 {
			c.Process.Signal(os.Interrupt)
			c.Wait()
		} else {
			what = "killed daemon"
			b.stop(syscall.SIGKILL)
			c.Wait()
			b.start()
		}
		got := b.figures()
		if c.ProcessState.ExitCode() == 0 { // it was faster
			if got.images != 1 || got.layers != 3 {
				t.Errorf("%s after %d/10: the import succeeded, and the store has %+v", what, i+1, got)
			}
			b.mica("image", "rm", "big")
			got = b.figures()
		}
		if got != empty {
			t.Errorf("%s after %d/10 left %+v, want %+v", what, i+1, got, empty)
		}
		if entries, _ := os.ReadDir(filepath.Join(b.root, "spool")); len(entries) > 0 {
			t.Errorf("%s after %d/10 left a spool file %s", what, i+1, entries[0].Name())
		}
		if loops := loopsBelow(b.dir); len(loops) > 0 {
			t.Errorf("%s after %d/10 left %q", what, i+1, loops)
		}
	}
	b.mica("image", "import", archive)
	if got := b.figures(); got.layers != whole.layers || got.devices != whole.devices || got.used > whole.used+16 {
		t.Errorf("repeated: %+v, at first: %+v", got, whole)
	}
	b.mica("create", "big", "c")
	dir := b.mount("c", "--read-only")
	for i := range 3 {
		for j := range 60 {
			name := fmt.Sprintf("d%d/f%d", i, j)
			if !bytes.Equal(b.readFile(filepath.Join(dir, name)), pattern(uint64(i*100+j), 300_000)) {
				t.Errorf("%s has other contents", name)
			}
		}
	}
}
