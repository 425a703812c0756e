package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mica/daemon/api"
	"mica/dev"
	"mica/thin"
)

// TestBadPools: a daemon on a pool that is wrong or damaged says what is wrong with which file,
// ends with 1, and changes nothing.
func TestBadPools(t *testing.T) {
	tests := []struct {
		name string
		harm func(t *testing.T, root string)
		want []string
	}{
		{"metadata is missing", func(t *testing.T, root string) { must(t, os.Remove(root+"/pool/metadata")) },
			[]string{"/pool/metadata", "no such file"}},
		{"data is missing", func(t *testing.T, root string) { must(t, os.Remove(root+"/pool/data")) },
			[]string{"/pool/data", "no such file"}},
		{"superblock is damaged", func(t *testing.T, root string) { scribble(t, root+"/pool/metadata", 100) },
			[]string{"superblock", "checksum"}},
		{"metadata is empty", func(t *testing.T, root string) { must(t, os.Truncate(root+"/pool/metadata", 0)) },
			[]string{"pool"}},
		{"data is cut short", func(t *testing.T, root string) { must(t, os.Truncate(root+"/pool/data", 1<<20)) },
			[]string{"1048576", "too short"}},
		{"catalog is not one", func(t *testing.T, root string) {
			must(t, os.WriteFile(root+"/catalog.db", []byte("hello"), 0o600))
		}, []string{"catalog.db"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBox(t)
			b.config = filepath.Join(b.dir, "c.toml")
			b.write(b.config, "[pool]\nsize = \"256M\"\n[containers]\nbase_size = \"128M\"\n")
			b.start()
			b.settle()
			b.stop(syscall.SIGTERM)
			tt.harm(t, b.root)
			msg := b.fails("serve", "--root", b.root, "--run", b.run, "--config", b.config)
			for _, w := range tt.want {
				if !strings.Contains(msg, w) {
					t.Errorf("the message has no %q: %s", w, msg)
				}
			}
			if strings.Contains(msg, "goroutine ") {
				t.Errorf("it panicked: %s", msg)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// scribble changes a byte of a file.
func scribble(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	p := make([]byte, 1)
	_, err = f.ReadAt(p, off)
	must(t, err)
	p[0] ^= 0xff
	_, err = f.WriteAt(p, off)
	must(t, err)
	must(t, f.Close())
}

// TestNeedsCheck: a pool that must be checked first is served read-only; the status says what to
// do, changes are refused with the reason, and after the check everything works again.
func TestNeedsCheck(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	b.stop(syscall.SIGTERM)
	d, err := dev.Open(b.root+"/pool/metadata", dev.OpenOptions{Lock: true})
	must(t, err)
	m, err := thin.Open(d, thin.OpenOptions{})
	must(t, err)
	must(t, m.SetNeedsCheck())
	must(t, m.Close())
	b.start()
	st := asJSON[api.Status](b, "status")
	if !st.Pool.NeedsCheck || st.Pool.Mode == "rw" {
		t.Errorf("mode %s, needs_check %v", st.Pool.Mode, st.Pool.NeedsCheck)
	}
	note := ""
	for _, n := range st.Notes {
		if i := strings.Index(n, "mica thin check "); i >= 0 {
			note = n[i+len("mica "):]
		}
	}
	if note == "" {
		t.Fatalf("no note says what to do: %q", st.Notes)
	}
	if msg := b.fails("create", "test:1", "db"); !strings.Contains(msg, "check") && !strings.Contains(msg, "read-only") {
		t.Errorf("create: %s", msg)
	}
	if list := asJSON[[]api.Container](b, "ls"); len(list) != 1 {
		t.Errorf("%d containers", len(list))
	}
	b.mica("pool", "check")
	if code := b.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit status %d", code)
	}
	b.mica(strings.Fields(note)...) // what the note says
	b.start()
	b.mica("create", "test:1", "db")
	dir := b.mica("mount", "db")
	if got := b.read(dir + "/etc/hostname"); got != "high\n" {
		t.Errorf("hostname %q", got)
	}
	b.mica("umount", "db")
}
