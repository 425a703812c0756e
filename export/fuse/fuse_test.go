package fuse

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"mica/dev"
	"mica/export"
)

func TestMountWriteRemount(t *testing.T) {
	s := newSetup(t, false)
	needTool(t, "mkfs.ext4", "mount", "umount")
	d := dev.NewMem(256 << 20)
	a := s.attach("c1", d, export.AttachOptions{})
	if to, err := os.Readlink(a.Link()); err != nil || to != a.Node() {
		t.Fatalf("link %s: %q, %v; want %s", a.Link(), to, err, a.Node())
	}
	run(t, "mkfs.ext4", "-q", a.Link())
	mnt := filepath.Join(s.dir, "mnt")
	mount(t, a.Link(), mnt)
	want := make([]byte, 10<<20)
	rand.Read(want)
	if err := os.WriteFile(filepath.Join(mnt, "file"), want, 0o644); err != nil {
		t.Fatal(err)
	}
	unmountFS(t, mnt)
	if err := a.Detach(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(a.Link()); !os.IsNotExist(err) {
		t.Fatalf("link after detach: %v", err)
	}
	a = s.attach("c1", d, export.AttachOptions{ReadOnly: true})
	mount(t, a.Link(), mnt, "-o", "ro,noload")
	got, err := os.ReadFile(filepath.Join(mnt, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("file differs after detach and attach")
	}
	unmountFS(t, mnt)
	run(t, "e2fsck", "-fn", a.Node())
}
