package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"mica/engine"
	"mica/layer/archive"
	"mica/layer/helper"
	"mica/layer/internal/randtree"
	"mica/thin"
)

// A readCounter is a pool that counts what is read from its devices.
type readCounter struct {
	engine.Pool
	reads, bytes atomic.Int64
}

type countedThin struct {
	engine.Thin
	c *readCounter
}

func (c *readCounter) Open(ctx context.Context, id thin.DevID, o engine.OpenOptions) (engine.Thin, error) {
	t, err := c.Pool.Open(ctx, id, o)
	if err != nil {
		return nil, err
	}
	return &countedThin{t, c}, nil
}

func (t *countedThin) ReadAt(p []byte, off int64) (int, error) {
	t.c.reads.Add(1)
	t.c.bytes.Add(int64(len(p)))
	return t.Thin.ReadAt(p, off)
}

func (t *countedThin) TryReadAt(p []byte, off int64) error {
	err := t.Thin.TryReadAt(p, off)
	if err == nil {
		t.c.reads.Add(1)
		t.c.bytes.Add(int64(len(p)))
	}
	return err
}

// blindFiles does not pass on which inodes changed: all files are compared.
type blindFiles struct{ fileSystems }

// countedFiles counts what a helper reads to find a difference.
type countedFiles struct {
	fileSystems
	c            *readCounter
	reads, bytes *int64
}

func (f countedFiles) Diff(ctx context.Context, lower, upper, fstype string, changed []archive.InodeRange, w io.Writer) (helper.Stats, error) {
	reads, bytes := f.c.reads.Load(), f.c.bytes.Load()
	st, err := f.fileSystems.Diff(ctx, lower, upper, fstype, changed, w)
	*f.reads, *f.bytes = f.c.reads.Load()-reads, f.c.bytes.Load()-bytes
	return st, err
}

func (f blindFiles) Diff(ctx context.Context, lower, upper, fstype string, changed []archive.InodeRange, w io.Writer) (helper.Stats, error) {
	if changed == nil {
		return helper.Stats{}, fmt.Errorf("it was not known which inodes changed")
	}
	return f.fileSystems.Diff(ctx, lower, upper, fstype, nil, w)
}

// diffBoth takes a container's difference by what changed and by all files, and returns the second.
func diffBoth(t testing.TB, s *Store, name string) []byte {
	t.Helper()
	var quick, full bytes.Buffer
	must[Level](t)(s.Diff(tctx(t), name, &quick, DiffOptions{}))
	files := s.files
	s.files = blindFiles{files}
	defer func() { s.files = files }()
	must[Level](t)(s.Diff(tctx(t), name, &full, DiffOptions{}))
	if !bytes.Equal(quick.Bytes(), full.Bytes()) {
		q, f := strings.Fields(tarNames(t, &quick)), strings.Fields(tarNames(t, &full))
		missing := slices.DeleteFunc(slices.Clone(f), func(n string) bool { return slices.Contains(q, n) })
		extra := slices.DeleteFunc(slices.Clone(q), func(n string) bool { return slices.Contains(f, n) })
		t.Fatalf("by blocks %d entries, by files %d; missing %q, too many %q", len(q), len(f), missing, extra)
	}
	return full.Bytes()
}

// TestDiffByBlocks: looking only at inodes in blocks that changed gives the same bytes as looking at all
// of them, on random trees with hard links, moved directories, contents changed under the same size and
// time, after growing, and of a commit on a commit.
func TestDiffByBlocks(t *testing.T) {
	eachFS(t, func(t *testing.T, fs string) {
		r := newRig(t)
		r.o.FSType = fs
		s := r.open()
		seed := time.Now().UnixNano()
		if v := os.Getenv("MICA_SEED"); v != "" {
			fmt.Sscan(v, &seed)
		}
		t.Logf("again with MICA_SEED=%d", seed)
		rng := rand.New(rand.NewSource(seed))
		names := append([]string{"x", "y", "z", "sub", "dir"}, randtree.Names[:6]...)
		many := []file{{name: "a", data: "a"}} // inodes in many blocks
		for i := range 1500 {
			many = append(many, file{name: fmt.Sprintf("many%d/f%d", i%50, i), data: strings.Repeat("m", i%3)})
		}
		importImage(t, s, "a0", many)
		for i := range few(4) {
			name, image := fmt.Sprintf("c%d", i), fmt.Sprintf("a%d", i)
			create(t, s, name, image)
			if i == 2 {
				must[Container](t)(s.Resize(tctx(t), name, 5<<30))
			}
			r.mounted(name, func(dir string) { randtree.ChangeNamed(t, rng, dir, 5+rng.Intn(60), names) })
			text := diffBoth(t, s, name)
			t.Logf("%s: %d bytes of tar", name, len(text))
			must[CommitResult](t)(s.Commit(tctx(t), name, CommitOptions{Image: fmt.Sprintf("a%d", i+1)}))
		}
	})
}

// TestDiffMovedLinks: names of a file with several, one of them below a directory that was moved. The
// file's inode is what it was, and all its names are in the difference.
func TestDiffMovedLinks(t *testing.T) {
	eachFS(t, func(t *testing.T, fs string) {
		r := newRig(t)
		r.o.FSType = fs
		s := r.open()
		importImage(t, s, "a", []file{{name: "d/other", data: "x"}, {name: "e/f/g", data: "y"}})
		create(t, s, "c", "a")
		r.mounted("c", func(dir string) {
			many := func(n string) { // so that the inodes between lie in blocks of their own
				for i := range 600 {
					write(t, dir, fmt.Sprintf("d/%s%d", n, i), "z")
				}
			}
			many("before")
			write(t, dir, "d/one", "linked")
			many("behind")
			ok(t, os.Link(filepath.Join(dir, "d/one"), filepath.Join(dir, "e/two")))
		})
		must[CommitResult](t)(s.Commit(tctx(t), "c", CommitOptions{Image: "b"}))
		create(t, s, "k", "b")
		r.mounted("k", func(dir string) {
			ok(t, os.Mkdir(filepath.Join(dir, "deep"), 0o755))
			ok(t, os.Rename(filepath.Join(dir, "d"), filepath.Join(dir, "deep/d")))
		})
		names := tarNames(t, bytes.NewReader(diffBoth(t, s, "k")))
		for _, n := range []string{".wh.d", "deep/d/one", "e/two", "deep/d/before7"} {
			if !strings.Contains(names, "\n"+n+"\n") {
				t.Errorf("the difference lacks %s", n)
			}
		}
		if strings.Contains(names, "\ne/f/g\n") {
			t.Error("the difference has what did not change")
		}
	})
}

// TestDiffReads: of a tree of many files, three of which changed, the difference reads the directories
// once, and neither the contents nor the inodes of the others.
func TestDiffReads(t *testing.T) {
	eachFS(t, func(t *testing.T, fs string) {
		r := newRig(t)
		r.o.FSType = fs
		c := &readCounter{}
		r.wrap = func(p engine.Pool) engine.Pool { c.Pool = p; return c }
		s := r.open()
		var list []file
		const dirs, per, size = 300, 10, 20_000
		for d := range dirs {
			for f := range per {
				list = append(list, file{name: fmt.Sprintf("d%03d/f%d", d, f), data: strings.Repeat(fmt.Sprintf("%03d%d", d, f), size/4)})
			}
		}
		importImage(t, s, "a", list)
		create(t, s, "c", "a")
		r.mounted("c", func(dir string) {
			for _, n := range []string{"d007/f1", "d150/f9", "d299/f3"} {
				write(t, dir, n, "changed")
			}
		})
		files := s.files
		defer func() { s.files = files }()
		count := func(f fileSystems) (reads, bytes int64) {
			s.files = countedFiles{f, c, &reads, &bytes}
			must[Level](t)(s.Diff(tctx(t), "c", io.Discard, DiffOptions{}))
			return reads, bytes
		}
		quickReads, quick := count(files)
		fullReads, full := count(blindFiles{files})
		t.Logf("%s: %d files of %d bytes: %d reads of %d KiB by what changed, %d of %d KiB by all files",
			fs, dirs*per, size, quickReads, quick>>10, fullReads, full>>10)
		if quick > full*3/4 {
			t.Errorf("%d bytes were read, %d when all files are compared: want three quarters at most", quick, full)
		}
		if full > dirs*per*size/2 {
			t.Errorf("%d bytes were read to compare files of %d bytes together: contents were read", full, dirs*per*size)
		}
	})
}

// TestFewer: joining ranges keeps every number, and stays within the bound.
func TestFewer(t *testing.T) {
	var list []archive.InodeRange
	for i := range uint64(100) {
		list = append(list, archive.InodeRange{First: i * i * 10, End: i*i*10 + 5})
	}
	for _, n := range []int{1, 7, 99, 100} {
		got := fewer(slices.Clone(list), n)
		if len(got) > n {
			t.Errorf("%d ranges, want %d at most", len(got), n)
		}
		for _, r := range list {
			if !slices.ContainsFunc(got, func(g archive.InodeRange) bool { return g.First <= r.First && g.End >= r.End }) {
				t.Fatalf("%v is not in %v", r, got)
			}
		}
	}
}
