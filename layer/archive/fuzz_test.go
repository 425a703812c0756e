package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mica/internal/mutate"
)

// FuzzApply applies any bytes to a tree that has links out of it.
func FuzzApply(f *testing.F) { mutate.Fuzz(f, tarSeeds(f), applyInCage) }

// TestApplyMutated is FuzzApply for a moment. What an Apply allocates is its own buffers and a copy
// of the headers.
func TestApplyMutated(t *testing.T) {
	mutate.Test(t, "FuzzApply", tarSeeds(t), mutate.Options{Inputs: 1500, AllocBase: 8 << 20, AllocPerByte: 256,
		Words: []string{"path=", "linkpath=", "size=", "GNU.sparse.major=1\n", "GNU.sparse.realsize=", "SCHILY.xattr.user.x=", "../outside/canary", "ustar\x0000", ".wh."}}, applyInCage)
}

func tarSeeds(f testing.TB) [][]byte {
	return [][]byte{
		makeTar(f, ent{name: "./"}, ent{name: "d/"}, ent{name: "d/f", body: "x", attrs: map[string]string{"user.x": "y"}}, ent{name: "h", typ: tar.TypeLink, link: "d/f"}),
		makeTar(f, ent{name: "out/canary", body: "x"}, ent{name: "abs/canary", body: "x"}),
		makeTar(f, ent{name: "out/.wh.canary"}, ent{name: "out/.wh..wh..opq"}, ent{name: ".wh.out"}),
		makeTar(f, ent{name: "../outside/canary", body: "x"}),
		makeTar(f, ent{name: "l", typ: tar.TypeSymlink, link: "../outside"}, ent{name: "l/canary", body: "x"}),
		makeTar(f, ent{name: "h", typ: tar.TypeLink, link: "out/canary"}),
		makeTar(f, ent{name: "p", typ: tar.TypeFifo}, ent{name: "d/.wh.f"}, ent{name: strings.Repeat("long/", 60)}),
		rawTar(f, ent{name: "f", uid: -1}),
	}
}

// FuzzApplyEntries applies well-formed archives made of hostile entries, three bytes each: type,
// name, link target.
func FuzzApplyEntries(f *testing.F) { mutate.Fuzz(f, entrySeeds, applyEntries) }

// TestApplyEntriesMutated is FuzzApplyEntries for a moment.
func TestApplyEntriesMutated(t *testing.T) {
	mutate.Test(t, "FuzzApplyEntries", entrySeeds, mutate.Options{Inputs: 3000, MaxBytes: 3 * 64}, applyEntries)
}

var entrySeeds = [][]byte{{2, 10, 1, 0, 11, 0}, {1, 0, 0, 2, 2, 0, 0, 4, 0, 3, 10, 6}, {0, 4, 0, 0, 20, 0, 0, 14, 0, 2, 0, 3, 0, 2, 0}}

func applyEntries(t *testing.T, ops []byte) {
	types := []byte{tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeChar}
	names := []string{"a", "b", "a/b", "b/a", "a/b/c", "out", "out/canary", "out/x", "abs/canary", "in/f", "l", "l/canary", "l/x/y", ".",
		".wh.a", ".wh.b", ".wh.l", "a/.wh.b", "l/.wh.canary", "out/.wh.canary", "a/.wh..wh..opq", ".wh..wh..opq", "out/.wh..wh..opq",
		"../outside/canary", "/a", "a/../b", "in/../../outside/canary", ".wh...", "h/canary"}
	targets := append([]string{"..", "../outside", "../../outside", "/", "a/b/../../..", "in", "/out", "l/canary"}, names...)
	var ents []ent
	for ; len(ops) >= 3 && len(ents) < 64; ops = ops[3:] {
		e := ent{typ: types[int(ops[0])%len(types)], name: names[int(ops[1])%len(names)]}
		switch e.typ {
		case tar.TypeReg:
			e.body = "written"
		case tar.TypeSymlink, tar.TypeLink:
			e.link = targets[int(ops[2])%len(targets)]
		case tar.TypeChar:
			e.major, e.minor = 1, 3
		}
		ents = append(ents, e)
	}
	applyInCage(t, makeTar(t, ents...))
}

// applyInCage applies data beside a canary: an error or a changed tree, never a change outside.
func applyInCage(t *testing.T, data []byte) {
	dir, err := os.MkdirTemp(fuzzDir(), "fuzz")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	root, out, unchanged := cage(t, dir)
	if err := os.Mkdir(filepath.Join(root, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"out": "../outside", "abs": out, "in": "d"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = Apply(context.Background(), root, bytes.NewReader(data), ApplyOptions{Limits: Limits{MaxBytes: 1 << 20, MaxEntries: 1000}})
	unchanged()
	up, err := os.ReadDir(dir)
	if err != nil || len(up) != 2 {
		t.Errorf("beside the root: %v, %v", up, err)
	}
}

// fuzzDir is on memory where there is such a place.
func fuzzDir() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return ""
}
