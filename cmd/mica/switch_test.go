package main

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"mica/dev"
	"mica/engine"
	"mica/engine/kernel"
	"mica/thin"
)

// TestPoolSwitch: what does not need device-mapper. The switch itself, both ways and with
// containers, is tested where there is one (test/kernel).
func TestPoolSwitch(t *testing.T) {
	b := newBox(t)
	pool := b.root + "/pool"
	must(t, os.MkdirAll(b.root, 0o700))
	b.mica("pool", "create", pool, "--size", "64M")
	says := func(msg string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(msg, w) {
				t.Errorf("the message has no %q: %s", w, msg)
			}
		}
	}
	says(b.mica("pool", "switch", pool, "--to", "user"), pool, "user engine")
	if e, err := engine.Noted(pool); err != nil || e != engine.User {
		t.Errorf("noted: %q, %v", e, err)
	}
	if _, msg, code := b.try("pool", "switch", pool, "--to", "neither"); code != exitUsage {
		t.Errorf("exit status %d, want %d", code, exitUsage)
	} else {
		says(msg, "want user or kernel")
	}
	says(b.fails("pool", "switch", b.root+"/none", "--to", "user"), "no such file")

	// Marked needs_check.
	d, err := dev.Open(pool+"/metadata", dev.OpenOptions{})
	must(t, err)
	m, err := thin.Open(d, thin.OpenOptions{})
	must(t, err)
	must(t, m.SetNeedsCheck())
	must(t, m.Close())
	says(b.fails("pool", "switch", pool, "--to", "user"), "needs check", "--clear-needs-check")
	b.mica("thin", "check", pool, "--clear-needs-check")

	// Open elsewhere.
	b.start()
	says(b.fails("pool", "switch", pool, "--to", "user"), "locked by process", "mica shutdown")
	b.stop(syscall.SIGTERM)

	if err := kernel.Available(); err == nil {
		t.Skip("this host has device-mapper: what is said without it cannot be tested")
	} else if !errors.Is(err, kernel.ErrUnavailable) {
		t.Fatal(err)
	}
	says(b.fails("pool", "switch", pool, "--to", "kernel"), "device-mapper", "user engine")
	says(b.fails("serve", "--root", b.root, "--run", b.run, "--engine", "kernel"), "device-mapper", "user engine")
	says(b.fails("serve", "--root", b.root, "--run", b.run, "--engine", "steam"), "pool.engine", "steam")
	// Noted, and then moved to a host without it.
	must(t, engine.Note(pool, engine.Kernel))
	says(b.fails("serve", "--root", b.root, "--run", b.run), "device-mapper", "user engine")
	says(b.mica("pool", "switch", pool, "--to", "user"), "user engine")
	b.start()
	b.stop(syscall.SIGTERM)
	if w := b.fails("serve", "--root", b.root+"2", "--run", b.run+"2", "--config", b.tomlWith("[pool]\nthin_pool = \"x\"\nengine = \"user\"\n")); !strings.Contains(w, "thin_pool") {
		t.Error(w)
	}
}

// tomlWith writes a configuration.
func (b *box) tomlWith(text string) string {
	path := b.dir + "/with.toml"
	b.write(path, text)
	return path
}
