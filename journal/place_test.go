package journal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mica/pdata/block"
	"mica/thin"
)

// TestPlaceRefused: only a directory on tmpfs that belongs to the pool's owner alone will do.
func TestPlaceRefused(t *testing.T) {
	f := newFixture(t, small)
	dir := f.o.Dirs[0]
	for _, c := range []struct {
		name string
		make func()
		want string
	}{
		{"mode 0755", func() { must(t, os.Mkdir(dir, 0o755)); must(t, os.Chmod(dir, 0o755)) }, "mode 0755"},
		{"mode 0770", func() { must(t, os.Mkdir(dir, 0o700)); must(t, os.Chmod(dir, 0o770)) }, "mode 0770"},
		{"a link", func() { must(t, os.Mkdir(dir+"2", 0o700)); must(t, os.Symlink(dir+"2", dir)) }, "not a directory"},
		{"a file", func() { must(t, os.WriteFile(dir, nil, 0o600)) }, "not a directory"},
		{"another owner", func() {
			if os.Geteuid() != 0 {
				t.Skip("SKIPPED: needs root, to give a directory away")
			}
			must(t, os.Mkdir(dir, 0o700))
			must(t, os.Chown(dir, 4711, -1))
		}, "belongs to user 4711"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.make()
			defer os.RemoveAll(dir)
			defer os.RemoveAll(dir + "2")
			_, err := Create(f.id, f.o, state(0), nil)
			wantErr(t, "create", err, ErrNoPlace)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("create: %v, want it to say %q", err, c.want)
			}
			if strings.Contains(c.want, "directory") {
				return
			}
			if _, err := Find(f.id, f.o, true); err == nil {
				t.Error("a search in it is no error")
			}
		})
	}
	// The next place is taken.
	f.o.Dirs = []string{filepath.Join(t.TempDir(), "on-a-disk"), "/nonexistent/place", dir}
	if fs := (unix.Statfs_t{}); unix.Statfs(t.TempDir(), &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
		f.o.Dirs = f.o.Dirs[1:]
	}
	j := f.create(t, state(0))
	if j.Path() != f.path() {
		t.Errorf("it is at %s, want %s", j.Path(), f.path())
	}
	for _, d := range f.o.Dirs[:len(f.o.Dirs)-1] {
		if _, err := os.Stat(d); err == nil {
			t.Errorf("%s was made", d)
		}
	}
	must(t, j.Remove())
	f.o.Dirs = f.o.Dirs[:len(f.o.Dirs)-1]
	_, err := Create(f.id, f.o, state(0), nil)
	wantErr(t, "create without a tmpfs", err, ErrNoPlace)
	if l, err := Find(f.id, f.o, true); err != nil || len(l) > 0 {
		t.Errorf("a search where nothing can be: %v, %v", l, err)
	}
}

// TestFileRefused: what lies in the journal's place and could belong to somebody else.
func TestFileRefused(t *testing.T) {
	f := newFixture(t, small)
	must(t, f.create(t, state(0)).Close())
	for _, c := range []struct {
		name       string
		make, undo func()
	}{
		{"a second name", func() { must(t, os.Link(f.path(), f.path()+"x")) }, func() { os.Remove(f.path() + "x") }},
		{"a wide mode", func() { must(t, os.Chmod(f.path(), 0o644)) }, func() { os.Chmod(f.path(), 0o600) }},
		{"a link", func() { must(t, os.Rename(f.path(), f.path()+"x")); must(t, os.Symlink(f.path()+"x", f.path())) },
			func() { os.Rename(f.path()+"x", f.path()) }},
		{"a pipe", func() { must(t, os.Rename(f.path(), f.path()+"x")); must(t, unix.Mkfifo(f.path(), 0o600)) },
			func() { os.Rename(f.path()+"x", f.path()) }},
	} {
		c.make()
		if l, err := Find(f.id, f.o, true); err == nil {
			t.Errorf("%s was accepted: %v", c.name, l)
		}
		c.undo()
	}
	f.want(t, state(0), nil)
}

// TestSizes: where there is no room for all of it a shorter one is made.
func TestSizes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, to mount a small tmpfs")
	}
	f := newFixture(t, 0)
	at := filepath.Join(f.dir, "small")
	must(t, os.Mkdir(at, 0o755))
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, "size=6m"); err != nil {
		t.Skipf("SKIPPED: cannot mount a tmpfs: %v", err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	f.o.Dirs = []string{filepath.Join(at, "j")}
	j := f.create(t, state(0))
	if j.Bytes() != 4<<20 {
		t.Errorf("%d bytes on a tmpfs of 6 MiB, want 4 MiB", j.Bytes())
	}
	must(t, j.Remove())
	must(t, os.WriteFile(filepath.Join(at, "full"), make([]byte, 5500<<10), 0o600))
	_, err := Create(f.id, f.o, state(0), nil)
	wantErr(t, "create on a full tmpfs", err, ErrNoPlace)
	wantErr(t, "create on a full tmpfs", err, unix.ENOSPC)
	if d, err := os.ReadDir(f.o.Dirs[0]); err != nil || len(d) > 0 {
		t.Errorf("what is left of the attempt: %v %v", d, err)
	}
	for _, n := range []int64{-1, 1, slotsAt, maxBytes + 1} {
		if _, err := Create(f.id, Options{Bytes: n, Dirs: f.o.Dirs}, state(0), nil); err == nil {
			t.Errorf("a journal of %d bytes was made", n)
		}
	}
}

// reseal makes the checksum of a header right after a change.
func reseal(b []byte) {
	binary.NativeEndian.PutUint32(b[12:], crc32.Checksum(b[16:pageBytes], castagnoli))
}

// TestNotOurs: journals of another boot, another pool, another version, and what is none.
func TestNotOurs(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		why    string
		err    error
	}{
		{"another boot", func(b []byte) []byte { b[30] ^= 1; reseal(b); return b }, "another boot", nil},
		{"another file", func(b []byte) []byte { b[56] ^= 1; reseal(b); return b }, "another pool", nil},
		{"a file made later", func(b []byte) []byte { b[64] ^= 1; reseal(b); return b }, "another pool", nil},
		{"another file system", func(b []byte) []byte { b[48] ^= 1; reseal(b); return b }, "another pool", nil},
		{"a block device", func(b []byte) []byte { b[40] = kindBlock; reseal(b); return b }, "another pool", nil},
		{"a newer version", func(b []byte) []byte { b[8] = version + 1; return b }, "", ErrVersion},
		{"an old version", func(b []byte) []byte { b[8] = 0; return b }, "", ErrVersion},
		{"a flipped bit", func(b []byte) []byte { b[90] ^= 1; return b }, "damaged", nil},
		{"no kind", func(b []byte) []byte { b[40] = 0; reseal(b); return b }, "damaged", nil},
		{"a long path", func(b []byte) []byte { b[79] = 1; reseal(b); return b }, "damaged", nil},
		{"a long handle", func(b []byte) []byte { b[handleAt+6] = 1; reseal(b); return b }, "damaged", nil},
		{"cut off", func(b []byte) []byte { return b[:len(b)-1] }, "damaged", nil},
		{"too long", func(b []byte) []byte { return append(b, 0) }, "damaged", nil},
		{"empty", func(b []byte) []byte { return nil }, "damaged", nil},
		{"zeros", func(b []byte) []byte { clear(b); return b }, "damaged", nil},
		{"text", func(b []byte) []byte { return bytes.Repeat([]byte("not a journal"), 5000) }, "damaged", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, small)
			j := f.create(t, state(1))
			appendAll(t, j, entries(0, 3))
			b := c.change(bytes.Clone(j.m.mem))
			must(t, os.WriteFile(f.path(), b, 0o600))
			if c.err != nil {
				_, err := Find(f.id, f.o, true)
				wantErr(t, "find", err, c.err)
				return
			}
			got, why := f.left(t).Entries(state(1))
			if len(got) > 0 || !strings.Contains(why, c.why) {
				t.Errorf("got %s (%q), want nothing because of %q", brief(got), why, c.why)
			}
			must(t, f.left(t).Remove())
			if l, err := Find(f.id, f.o, true); err != nil || len(l) != 0 {
				t.Errorf("after it was removed: %v, %v", l, err)
			}
		})
	}
}

// TestReadsPredecessor: a build reads its own version and the one before it.
func TestReadsPredecessor(t *testing.T) {
	for v := uint32(1); v <= version+1; v++ {
		want := v == version || v == version-1
		if _, is := readers[v]; is != want {
			t.Errorf("version %d can be read: %v, want %v", v, is, want)
		}
	}
}

func TestIdentity(t *testing.T) {
	f := newFixture(t, small)
	meta := filepath.Join(f.dir, "metadata")
	if id, err := Identify(meta); err != nil || !id.same(f.id) || id.name() != f.id.name() {
		t.Errorf("a second look: %+v %v", id, err)
	}
	must(t, os.Rename(meta, meta+"2")) // it stays the same pool under another name
	if id, err := Identify(meta + "2"); err != nil || !id.same(f.id) || id.name() != f.id.name() {
		t.Errorf("renamed: %+v %v", id, err)
	}
	must(t, os.WriteFile(meta, nil, 0o600))
	if id, err := Identify(meta); err != nil || id.same(f.id) {
		t.Errorf("another file: %+v %v", id, err)
	}
	if _, err := Identify(f.dir); err == nil {
		t.Error("a directory has an identity")
	}
	if _, err := Identify(meta + "3"); !os.IsNotExist(err) {
		t.Errorf("nothing: %v", err)
	}
	b := Identity{Block: true, Dev: unix.Mkdev(253, 4)}
	if b.name() != "block-253-4" || b.same(Identity{Dev: b.Dev}) {
		t.Errorf("a block device is %s", b.name())
	}
}

// TestOwners: the place depends on who owns the pool, not on who opens it.
func TestOwners(t *testing.T) {
	if got := fmt.Sprint(Options{}.dirs(0)); got != "[/run/mica-journal /dev/shm/mica-journal]" {
		t.Errorf("root: %s", got)
	}
	if got := fmt.Sprint(Options{}.dirs(1000)); got != "[/run/user/1000/mica-journal /dev/shm/mica-journal-1000]" {
		t.Errorf("user 1000: %s", got)
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, to open another user's pool")
	}
	f := newFixture(t, small)
	f.id.UID = 4711
	j := f.create(t, state(1))
	appendAll(t, j, entries(0, 2))
	for _, p := range []string{f.o.Dirs[0], f.path()} {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		if st.Uid != 4711 || st.Mode&0o077 != 0 {
			t.Errorf("%s belongs to %d with mode %#o", p, st.Uid, st.Mode)
		}
	}
	f.want(t, state(1), entries(0, 2))
}

// TestWaitingFor looks at a pool from outside.
func TestWaitingFor(t *testing.T) {
	f := newFixture(t, small)
	meta := filepath.Join(f.dir, "metadata")
	sb := thin.Superblock{Time: 3, TransactionID: 4}
	b := make([]byte, block.Size)
	sb.Encode(b)
	fd, err := os.OpenFile(meta, os.O_RDWR, 0)
	must(t, err)
	defer fd.Close()
	_, err = fd.WriteAt(b, 0)
	must(t, err)
	look := func() *Waiting {
		t.Helper()
		w, err := WaitingFor(meta, f.o)
		must(t, err)
		return w
	}
	if w := look(); w != nil {
		t.Errorf("without a journal: %+v", w)
	}
	j := f.create(t, StateOf(sb))
	if w := look(); w != nil {
		t.Errorf("with an empty one: %+v", w)
	}
	appendAll(t, j, entries(0, 5))
	if w := look(); w == nil || w.Entries != 5 || w.Path != f.path() || w.Why != "" {
		t.Errorf("with 5 entries: %+v", w)
	}
	sb.TransactionID++
	sb.Encode(b)
	_, err = fd.WriteAt(b, 0)
	must(t, err)
	if w := look(); w == nil || w.Entries != 0 || w.Why == "" {
		t.Errorf("with another superblock: %+v", w)
	}
	must(t, Discard(f.id, f.o))
	if w := look(); w != nil {
		t.Errorf("discarded: %+v", w)
	}
	must(t, Discard(f.id, f.o)) // nothing there
}

// TestCreateReplaces: a new journal takes the place of what is there, also of half a new one.
func TestCreateReplaces(t *testing.T) {
	f := newFixture(t, small)
	appendAll(t, f.create(t, state(1)), entries(0, 5))
	must(t, os.WriteFile(f.path()+newSuffix, []byte("half"), 0o600))
	j := f.create(t, state(2))
	f.want(t, state(2), nil)
	if d, err := os.ReadDir(f.o.Dirs[0]); err != nil || len(d) != 1 {
		t.Errorf("in its place lie %v (%v)", d, err)
	}
	// All of its memory is there: a store to it can never fail.
	var st unix.Stat_t
	must(t, unix.Stat(f.path(), &st))
	if st.Blocks*512 < j.Bytes() {
		t.Errorf("%d of %d bytes are allocated", st.Blocks*512, j.Bytes())
	}
	if err := j.Unlocked(); err != nil && os.Geteuid() == 0 {
		t.Errorf("it is not locked: %v", err)
	}
}
