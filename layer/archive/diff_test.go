package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/layer/archive/treecmp"
	"mica/layer/internal/randtree"
)

func mustDiff(t testing.TB, lower, upper string, o DiffOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := Diff(context.Background(), lower, upper, &b, o); err != nil {
		t.Fatalf("diff: %v", err)
	}
	return b.Bytes()
}

// tarNames lists the entries of a tar: type letter and name, with the target of links.
func tarNames(t testing.TB, data []byte) []string {
	t.Helper()
	var out []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		s := h.Name
		if h.Linkname != "" {
			s += "=>" + h.Linkname
		}
		out = append(out, s)
	}
}

func TestDiffEntries(t *testing.T) {
	needRoot(t)
	lower := []ent{
		{name: "./"}, {name: "same/"}, {name: "same/deep/"}, {name: "same/deep/f", body: "1"},
		{name: "a", body: "1"}, {name: "d/"}, {name: "d/f", body: "1"}, {name: "d/g", body: "1"},
		{name: "h1", body: "linked"}, {name: "h2", typ: tar.TypeLink, link: "h1"}, {name: "h3", typ: tar.TypeLink, link: "h1"},
		{name: "l", typ: tar.TypeSymlink, link: "a"},
	}
	for _, c := range []struct {
		name   string
		change []ent
		want   string
	}{
		{"nothing", nil, ""},
		{"content", []ent{{name: "a", body: "2"}}, "a"},
		{"content in a directory", []ent{{name: "d/f", body: "2"}}, "d/ d/f"},
		{"mode", []ent{{name: "a", body: "1", mode: 0o600}}, "a"},
		{"owner", []ent{{name: "a", body: "1", uid: 1}}, "a"},
		{"time", []ent{{name: "a", body: "1", mtime: epoch.Add(time.Nanosecond)}}, "a"},
		{"attribute", []ent{{name: "a", body: "1", attrs: map[string]string{"user.x": "1"}}}, "a"},
		{"attribute of a directory", []ent{{name: "same/", attrs: map[string]string{"user.x": "1"}}}, "same/"},
		{"root", []ent{{name: "./", mode: 0o700}}, "./"},
		{"deleted", []ent{{name: ".wh.a"}, {name: "d/.wh.g"}}, ".wh.a d/ d/.wh.g"},
		{"deleted directory", []ent{{name: ".wh.d"}}, ".wh.d"},
		{"whiteouts first", []ent{{name: ".wh.l"}, {name: "b", body: "1"}, {name: ".wh.a"}}, ".wh.a .wh.l b"},
		{"new deep", []ent{{name: "same/deep/er/f", body: "1"}}, "same/ same/deep/ same/deep/er/ same/deep/er/f"},
		{"link target", []ent{{name: "l", typ: tar.TypeSymlink, link: "b"}}, "l=>b"},
		{"file becomes directory", []ent{{name: "a/"}, {name: "a/x"}}, "a/ a/x"},
		{"directory becomes file", []ent{{name: "d", body: "1"}}, "d"},
		{"one more name", []ent{{name: "h0", typ: tar.TypeLink, link: "h1"}}, "h0 h1=>h0 h2=>h0 h3=>h0"},
		{"one name less", []ent{{name: ".wh.h2"}}, ".wh.h2"},
		{"one name of its own", []ent{{name: "h2", body: "linked"}}, "h1 h2 h3=>h1"},
		{"inode changed", []ent{{name: "h3", body: "new"}, {name: "h1", typ: tar.TypeLink, link: "h3"}, {name: "h2", typ: tar.TypeLink, link: "h3"}}, "h1 h2=>h1 h3=>h1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			low, up, back := filepath.Join(dir, "low"), filepath.Join(dir, "up"), filepath.Join(dir, "back")
			for _, d := range []string{low, up, back} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
				mustApply(t, d, makeTar(t, lower...))
			}
			mustApply(t, up, makeTar(t, c.change...))
			data := mustDiff(t, low, up, DiffOptions{})
			if got := strings.Join(tarNames(t, data), " "); got != c.want {
				t.Errorf("entries\n%s\nwant\n%s", got, c.want)
			}
			mustApply(t, back, data)
			sameTrees(t, back, up, treecmp.Options{})
		})
	}
}

func TestDiffRefusals(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".wh.x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Diff(context.Background(), "", dir, io.Discard, DiffOptions{})
	wantEntryError(t, err, ".wh.x", ErrInvalid)
	if _, err := Diff(context.Background(), "", filepath.Join(dir, "nope"), io.Discard, DiffOptions{}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such root: error %v", err)
	}
	full := errors.New("disk full")
	good := t.TempDir()
	if _, err := Diff(context.Background(), "", good, writerFunc(func([]byte) (int, error) { return 0, full }), DiffOptions{}); !errors.Is(err, full) {
		t.Errorf("writer fails: error %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Diff(ctx, "", good, io.Discard, DiffOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: error %v", err)
	}
}

// Sockets cannot be in a tar: one is left out with a warning, one in the place of a file is a
// deletion.
func TestDiffSockets(t *testing.T) {
	low, up := t.TempDir(), t.TempDir()
	mustApply(t, low, makeTar(t, ent{name: "was-file"}))
	for _, name := range []string{"was-file", "new"} {
		l, err := net.Listen("unix", filepath.Join(up, name))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	var warned []string
	data := mustDiff(t, low, up, DiffOptions{Warn: func(name, what string) { warned = append(warned, name+": "+what) }})
	if got := strings.Join(tarNames(t, data), " "); got != "./ .wh.was-file" {
		t.Errorf("entries %s", got)
	}
	if got := fmt.Sprint(warned); got != "[new: socket left out was-file: socket left out]" {
		t.Errorf("warnings %s", got)
	}
}

// With Snapshot an inode that cannot have changed is not read: a copy of a file system whose
// content was changed behind its back is the same tree.
func TestDiffSnapshotTrustsInodes(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	mustApply(t, dir, makeTar(t, ent{name: "a", body: "1"}, ent{name: "b/"}, ent{name: "b/c", body: "1"}))
	if data := mustDiff(t, dir, dir, DiffOptions{Snapshot: true}); len(tarNames(t, data)) != 0 {
		t.Errorf("a tree and itself: %s", tarNames(t, data))
	}
	// Another tree has other inodes, so equal files are found equal by content.
	other := t.TempDir()
	mustApply(t, other, mustDiff(t, "", dir, DiffOptions{}))
	if data := mustDiff(t, dir, other, DiffOptions{Snapshot: true}); len(tarNames(t, data)) != 0 {
		t.Errorf("a tree and its copy: %s", tarNames(t, data))
	}
	if err := os.WriteFile(filepath.Join(other, "b/c"), []byte("2"), 0o644); err != nil {
		t.Fatal(err)
	}
	chtimes(t, filepath.Join(other, "b/c"), epoch)
	if got := strings.Join(tarNames(t, mustDiff(t, dir, other, DiffOptions{})), " "); got != "b/ b/c" {
		t.Errorf("same size and time, other content: %s", got)
	}
}

// Random trees: lower, and upper made from lower by random changes. Diff then Apply on a copy
// of lower gives upper; Diff from nothing gives upper; the same trees give the same bytes.
func TestDiffApplyRandom(t *testing.T) {
	needRoot(t)
	seed := time.Now().UnixNano()
	if s := os.Getenv("MICA_SEED"); s != "" {
		fmt.Sscan(s, &seed)
	}
	for i := int64(0); i < 25; i++ {
		if !t.Run(fmt.Sprintf("seed=%d", seed+i), func(t *testing.T) { diffApplyRandom(t, seed+i) }) {
			t.Logf("run again with MICA_SEED=%d", seed+i)
			break
		}
	}
}

func diffApplyRandom(t *testing.T, seed int64) {
	dir := t.TempDir()
	low, up, back, fresh := filepath.Join(dir, "low"), filepath.Join(dir, "up"), filepath.Join(dir, "back"), filepath.Join(dir, "fresh")
	for _, d := range []string{low, up, back, fresh} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewSource(seed))
	randomChanges(t, rng, low, 60)
	base := mustDiff(t, "", low, DiffOptions{})
	mustApply(t, up, base)
	mustApply(t, back, base)
	sameTrees(t, up, low, treecmp.Options{})
	randomChanges(t, rng, up, 40)
	data := mustDiff(t, low, up, DiffOptions{})
	if again := mustDiff(t, low, up, DiffOptions{}); !bytes.Equal(data, again) {
		t.Error("two diffs of the same trees differ")
	}
	mustApply(t, back, data)
	sameTrees(t, back, up, treecmp.Options{})
	mustApply(t, fresh, mustDiff(t, "", up, DiffOptions{}))
	sameTrees(t, fresh, up, treecmp.Options{})
}

// randomChanges makes n random changes to a tree.
func randomChanges(t testing.TB, rng *rand.Rand, root string, n int) {
	t.Helper()
	randtree.Change(t, rng, root, n)
}
