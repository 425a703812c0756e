package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/layer/archive/treecmp"
)

// needRoot skips what only root can do: chown, mknod, trusted attributes.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root (chown, mknod, trusted.* attributes)")
	}
}

var epoch = time.Unix(1_600_000_000, 123_456_789).UTC()

// An ent is a tar entry, short to write.
type ent struct {
	typ   byte // tar type; 0 means by name: "/" at the end is a directory, else a file
	name  string
	link  string
	body  string
	mode  int64
	uid   int
	gid   int
	major int64
	minor int64
	mtime time.Time
	attrs map[string]string
}

func (e ent) header() *tar.Header {
	h := &tar.Header{
		Typeflag: e.typ, Name: e.name, Linkname: e.link, Size: int64(len(e.body)), Mode: e.mode,
		Uid: e.uid, Gid: e.gid, Devmajor: e.major, Devminor: e.minor, ModTime: e.mtime, Format: tar.FormatPAX,
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
		if strings.HasSuffix(e.name, "/") {
			h.Typeflag = tar.TypeDir
		}
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	for k, v := range e.attrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattr+k] = v
	}
	return h
}

func makeTar(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		if err := w.WriteHeader(e.header()); err != nil {
			t.Fatalf("header %q: %v", e.name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatalf("body %q: %v", e.name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func mustApply(t testing.TB, root string, data []byte) Stats {
	t.Helper()
	st, err := Apply(context.Background(), root, bytes.NewReader(data), ApplyOptions{})
	if err != nil {
		t.Fatalf("apply: %v", err)
	}
	return st
}

// listing returns the tree as sorted lines: names, "/" after directories, "-> target", "=content".
func listing(t testing.TB, root string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		switch {
		case e.IsDir():
			rel += "/"
		case e.Type()&os.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			rel += "->" + target
		case e.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			rel += "=" + string(b)
		}
		out = append(out, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

func sameTrees(t testing.TB, got, want string, o treecmp.Options) {
	t.Helper()
	diffs, err := treecmp.Diff(got, want, o)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range diffs {
		if i == 40 {
			t.Errorf("… and %d more differences", len(diffs)-i)
			break
		}
		t.Error(d)
	}
}

func wantEntryError(t *testing.T, err error, name string, kind error) {
	t.Helper()
	var e *EntryError
	if !errors.As(err, &e) {
		t.Fatalf("error %v, want an *EntryError", err)
	}
	if e.Name != name {
		t.Errorf("error names %q, want %q", e.Name, name)
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("error %q, want one that is %q", err, kind)
	}
}

func chtimes(t testing.TB, path string, at time.Time) {
	t.Helper()
	ts := []unix.Timespec{{Sec: at.Unix(), Nsec: int64(at.Nanosecond())}, {Sec: at.Unix(), Nsec: int64(at.Nanosecond())}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
}
