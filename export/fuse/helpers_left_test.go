package fuse

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"mica/export/helper"
)

// lateCalls are calls of a helper that takes its time.
var lateCalls = helper.Calls{"late": helper.Call(func(_ context.Context, path string) (struct{}, error) {
	time.Sleep(300 * time.Millisecond)
	return struct{}{}, os.WriteFile(path, nil, 0o600)
})}

// TestHelperLeft: what an exporter left that died in an attach is cleared away only when its helper no
// longer works on it, and the roll of helpers is empty then.
func TestHelperLeft(t *testing.T) {
	s := newSetup(t, false)
	dir := s.e.dir
	if err := s.e.Close(); err != nil {
		t.Fatal(err)
	}
	c := helper.NewClient([]string{"/proc/self/exe", "role-late"}, lateCalls, nil, quiet())
	defer c.Close()
	if err := s.e.roll.enter(c.PID()); err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true") // one that has ended
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := s.e.roll.enter(gone.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(s.dir, "late")
	called := make(chan error, 1)
	go func() { called <- c.Do(ctx(t), "late", callTag(s.e.backing("x")), at, nil) }()
	for deadline := time.Now().Add(time.Minute); !tagged(c.PID(), callTag(s.e.backing("x"))); {
		if time.Now().After(deadline) {
			t.Fatal("the helper does not begin")
		}
		time.Sleep(time.Millisecond)
	}
	e, err := New(s.o)
	if err != nil {
		t.Fatal(err)
	}
	s.e = e
	if _, err := os.Stat(at); err != nil {
		t.Errorf("cleared away while the helper worked on it: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "x")); !os.IsNotExist(err) {
		t.Errorf("what was left is still there: %v", err)
	}
	if pids, err := e.roll.read(); err != nil || len(pids) > 0 {
		t.Errorf("the roll has %v (%v)", pids, err)
	}
	if err := <-called; err != nil {
		t.Error(err)
	}
}
