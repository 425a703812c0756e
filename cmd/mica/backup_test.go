package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/daemon/api"
	"mica/dev"
	"mica/thin"
	"mica/thin/backup"
)

// TestBackupAndBack: the daemon backs up its metadata by itself, on demand and at its end; the pool
// is put back to a backup after its metadata were wiped out, and the daemon goes on with it once
// it is told to.
func TestBackupAndBack(t *testing.T) {
	b := newBox(t)
	b.config = filepath.Join(b.dir, "c.toml")
	b.write(b.config, "[pool]\nsize = \"256M\"\n[containers]\nbase_size = \"64M\"\n[backup]\ninterval = \"1s\"\nkeep = 4\n")
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	dir := b.mica("mount", "web")
	b.write(dir+"/kept", "kept")
	b.mica("umount", "web")
	made := asJSON[backup.Info](b, "pool", "backup")
	saved := filepath.Join(b.dir, "saved.img.zst")
	must(t, os.Link(made.Path, saved))

	// The schedule: while something changes there is one a second, and at most four.
	n := 0
	for deadline := time.Now().Add(30 * time.Second); ; n++ {
		name := "c" + string(rune('a'+n%20))
		b.mica("create", "test:1", name)
		if n%2 == 1 {
			b.mica("rm", name)
		}
		list := asJSON[[]backup.Info](b, "pool", "backups")
		if len(list) > 4 {
			t.Fatalf("%d backups", len(list))
		}
		if len(list) == 4 && list[3].Time.After(made.Time) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d backups after 30 s: %+v", len(list), list)
		}
		time.Sleep(300 * time.Millisecond)
	}
	st := asJSON[api.Status](b, "status")
	if s := st.Backups; s == nil || s.Last == nil || s.Error != "" || s.Keep != 4 || s.Dir != b.root+"/pool/backups" {
		t.Errorf("status: %+v", s)
	}
	if msg := b.fails("pool", "restore", b.root+"/pool", "--from", saved, "--yes"); !strings.Contains(msg, "locked") && !strings.Contains(msg, "pool is open") {
		t.Errorf("restore of the pool of a running daemon: %s", msg)
	}
	b.mica("create", "test:1", "newest")
	txid := asJSON[api.Status](b, "status").Pool.TransactionID
	b.stop(syscall.SIGTERM)
	list := asJSON[[]backup.Info](b, "pool", "backups", b.root+"/pool")
	if len(list) != 4 || list[0].TransactionID != txid {
		t.Errorf("after the end, with transaction id %d: %+v", txid, list)
	}
	for _, i := range list {
		if st, err := os.Stat(i.Path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", i.Path, st.Mode(), err)
		}
	}

	// The metadata are wiped out.
	f, err := os.OpenFile(b.root+"/pool/metadata", os.O_WRONLY, 0)
	must(t, err)
	_, err = f.Write(make([]byte, 1<<20))
	must(t, err)
	must(t, f.Close())
	serve := []string{"serve", "--root", b.root, "--run", b.run, "--config", b.config}
	if msg := b.fails(serve...); !strings.Contains(msg, "no thin pool here") {
		t.Errorf("serve without metadata: %s", msg)
	}
	out := b.mica("pool", "restore", b.root+"/pool", "--from", saved, "--yes")
	if !strings.Contains(out, "WARNING: blocks that have been given to others since cannot be told") {
		t.Errorf("restore: %s", out)
	}
	b.mica("pool", "check", b.root+"/pool")

	// The catalog is newer: nothing is changed before that is accepted.
	b.start()
	st = asJSON[api.Status](b, "status")
	if !strings.Contains(st.Store.ReadOnly, "the pool is older than the catalog") || !strings.Contains(st.Store.ReadOnly, "mica serve --accept-pool") {
		t.Errorf("read-only: %q", st.Store.ReadOnly)
	}
	if msg := b.fails("create", "test:1", "no"); !strings.Contains(msg, "older than the catalog") {
		t.Errorf("create: %s", msg)
	}
	b.stop(syscall.SIGTERM)
	b.flags = []string{"--accept-pool"}
	b.start()
	b.flags = nil
	st = asJSON[api.Status](b, "status")
	if st.Store.ReadOnly != "" || len(st.Store.Broken) == 0 {
		t.Errorf("after accepting: read-only %q, broken %+v", st.Store.ReadOnly, st.Store.Broken)
	}
	dir = b.mica("mount", "web")
	if got := b.read(dir + "/kept"); got != "kept" {
		t.Errorf("%q", got)
	}
	b.write(dir+"/more", "more")
	b.mica("umount", "web")
	b.mica("rm", "newest") // broken
	b.mica("create", "test:1", "after")
	b.mica("mount", "after")
	b.mica("umount", "after")
	b.stop(syscall.SIGTERM)
	b.start() // and from now on without being told
	if st := asJSON[api.Status](b, "status"); st.Store.ReadOnly != "" {
		t.Errorf("read-only again: %s", st.Store.ReadOnly)
	}
	b.mica("pool", "check")
}

// TestBackupFails: a directory that cannot be used is in the status, and serving goes on.
func TestBackupFails(t *testing.T) {
	b := newBox(t)
	b.config = filepath.Join(b.dir, "c.toml")
	file := filepath.Join(b.dir, "file")
	b.write(file, "no directory")
	b.write(b.config, "[pool]\nsize = \"256M\"\n[containers]\nbase_size = \"64M\"\n[backup]\ndir = \""+file+"/x\"\n")
	b.start()
	if msg := b.fails("pool", "backup"); !strings.Contains(msg, "not a directory") {
		t.Errorf("%s", msg)
	}
	st := asJSON[api.Status](b, "status")
	if st.Backups == nil || !strings.Contains(st.Backups.Error, "not a directory") || !strings.Contains(strings.Join(st.Notes, "\n"), "could not be backed up") {
		t.Errorf("status: %+v, notes %q", st.Backups, st.Notes)
	}
	if code := b.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// TestRepairWaits: a pool that is open, or for which changes of a killed daemon wait, is not repaired;
// the changes can be given up. Nothing of it touches the pool.
func TestRepairWaits(t *testing.T) {
	b := newBox(t)
	b.config = filepath.Join(b.dir, "c.toml")
	b.write(b.config, "[pool]\nsize = \"256M\"\ncommit_interval = \"1h\"\n[containers]\nbase_size = \"64M\"\n")
	b.start()
	b.mica("image", "import", b.testImage())
	b.mica("create", "test:1", "web")
	dir := b.mica("mount", "web")
	pool := b.root + "/pool"
	for _, cmd := range [][]string{{"pool", "repair", pool}, {"pool", "repair", pool, "--swap"}} {
		if msg := b.fails(cmd...); !strings.Contains(msg, "The pool is open") {
			t.Errorf("%q while the daemon runs: %s", cmd, msg)
		}
	}
	if msg := b.fails("pool", "repair"); !strings.Contains(msg, "then: mica pool repair "+pool) {
		t.Errorf("without a pool: %s", msg)
	}
	// Written to the device and not synced: no commit holds it.
	if out, err := exec.Command("dd", "if=/dev/zero", "of="+dir+"/file", "bs=1M", "count=8", "oflag=direct").CombinedOutput(); err != nil {
		t.Fatalf("dd: %v\n%s", err, out)
	}
	b.stop(syscall.SIGKILL)
	if msg := b.fails("pool", "repair", pool); !strings.Contains(msg, "changes wait in") || !strings.Contains(msg, "--without-journal") {
		t.Errorf("after a kill: %s", msg)
	}
	if out := b.mica("pool", "repair", pool, "--without-journal"); !strings.Contains(out, "nothing is lost") {
		t.Errorf("without the journal: %s", out)
	}
	b.start()
	b.mica("umount", "web")
}

// TestCheckWhileServing: damage under a running daemon is found, and the place of it said.
func TestCheckWhileServing(t *testing.T) {
	b := newBox(t)
	b.start()
	b.mica("image", "import", b.testImage())
	if out := b.mica("pool", "check"); !strings.HasSuffix(out, "\nclean") {
		t.Errorf("%s", out)
	}
	b.settle()
	meta := b.root + "/pool/metadata"
	d, err := dev.Open(meta, dev.OpenOptions{ReadOnly: true})
	must(t, err)
	v, err := thin.OpenView(d)
	must(t, err)
	leaf := make([]byte, 8)
	_, err = d.ReadAt(leaf, int64(v.Superblock().MappingRoot)*4096+2048)
	must(t, err)
	must(t, d.Close())
	at := int64(binary.LittleEndian.Uint64(leaf))
	scribble(t, meta, at*4096+3000)
	out, _, code := b.try("pool", "check")
	if want := fmt.Sprintf("fatal: metadata block %d: mapping tree of thin ", at); code != 1 || !strings.Contains(out, want) || !strings.Contains(out, "b-tree node checksum 0x") {
		t.Errorf("exit status %d, want %q\n%s", code, want, out)
	}
	if msg := b.fails("pool", "backup"); !strings.Contains(msg, fmt.Sprintf("metadata block %d: b-tree node checksum", at)) {
		t.Errorf("backup of damaged metadata: %s", msg)
	}
	scribble(t, meta, at*4096+3000)
	b.mica("pool", "check")
	b.mica("pool", "backup")
}
