package ublk

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/helper"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "role-helper" {
		if err := helper.Run(context.Background(), os.Stdin, os.Stdout, Calls, Errors); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestSmoke(t *testing.T) {
	if err := Available(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	e, err := New(Options{RunDir: dir + "/run", LinkDir: dir + "/links", HelperCommand: []string{"/proc/self/exe", "role-helper"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("features %x", e.feats)
	d := dev.NewMem(16 << 20)
	begin := time.Now()
	a, err := e.Attach(context.Background(), "x", d, export.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(a.Node(), a.Link(), time.Since(begin))
	f, err := os.OpenFile(a.Link(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	if _, err := f.WriteAt(buf, 4096); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	got := make([]byte, 1<<20)
	if _, err := d.ReadAt(got, 4096); err != nil || string(got) != string(buf) {
		t.Error("differs", err)
	}
	if err := a.Detach(context.Background()); err == nil {
		t.Error("detached while open")
	} else {
		t.Log(err)
	}
	f.Close()
	begin = time.Now()
	if err := a.Detach(context.Background()); err != nil {
		t.Error(err)
	}
	t.Log(time.Since(begin))
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}
