package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/daemon/api"
	"mica/daemon/client"
	"mica/internal/testbox"
)

// A box is a place for a daemon with its own ROOT and RUN, and the program to run there.
type box struct {
	*testing.T
	dir, root, run, exe string
	config              string   // file; "": none
	flags               []string // further ones of serve
	serve               *exec.Cmd
	daemon              *testbox.Daemon // that of serve
	log                 bytes.Buffer
}

// newBox makes a box in memory. At the end of the test everything in it is taken down.
func newBox(t *testing.T) *box {
	testbox.Need(t)
	dir, err := os.MkdirTemp("/dev/shm", "mica-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := &box{T: t, dir: dir, root: filepath.Join(dir, "root"), run: filepath.Join(dir, "run"), exe: exe}
	t.Cleanup(b.takeDown)
	return b
}

// command makes a command of the program, as a process of its own.
func (b *box) command(args ...string) *exec.Cmd {
	c := exec.Command(b.exe)
	c.Args = append([]string{"mica"}, args...)
	// Under the race detector a process sleeps for a second before it ends; every command would.
	c.Env = append(os.Environ(), "MICA_RUN="+b.run, "GORACE=atexit_sleep_ms=0")
	c.Dir = b.dir
	return c
}

// mica runs a command that must succeed, and returns what it printed without the last newline.
func (b *box) mica(args ...string) string {
	b.Helper()
	out, stderr, code := b.try(args...)
	if code != 0 {
		b.Fatalf("mica %s: exit status %d\n%s\ndaemon:\n%s", strings.Join(args, " "), code, stderr, b.logText())
	}
	return strings.TrimSuffix(out, "\n")
}

// fails runs a command that must fail with exit status 1, and returns what it said.
func (b *box) fails(args ...string) string {
	b.Helper()
	out, stderr, code := b.try(args...)
	if code != 1 {
		b.Fatalf("mica %s: exit status %d, want 1\n%s%s", strings.Join(args, " "), code, out, stderr)
	}
	return stderr
}

func (b *box) try(args ...string) (stdout, stderr string, code int) {
	b.Helper()
	return testbox.Run(b, b.command(args...))
}

// asJSON runs a command with --json and decodes what it prints.
func asJSON[T any](b *box, args ...string) (v T) {
	b.Helper()
	return testbox.Decode[T](b, args, b.mica(append(args, "--json")...))
}

func (b *box) client() *client.Client { return client.New(b.run) }

// start starts the daemon and waits until it answers.
func (b *box) start() {
	b.Helper()
	args := []string{"serve", "--root", b.root, "--run", b.run}
	if b.config != "" {
		args = append(args, "--config", b.config)
	}
	b.daemon = testbox.Start(b, b.command(append(args, b.flags...)...), filepath.Join(b.dir, "log"), b.run)
	b.serve = b.daemon.Cmd
}

// stop ends the daemon with a signal and waits for it. The exit code is returned, -1 for a kill.
func (b *box) stop(sig os.Signal) int {
	b.Helper()
	code := b.daemon.Stop(b, sig)
	b.serve = nil
	return code
}

func (b *box) waitEnd() int {
	b.Helper()
	code := b.daemon.WaitEnd(b)
	b.serve = nil
	return code
}

func (b *box) logText() string {
	t, _ := os.ReadFile(filepath.Join(b.dir, "log"))
	return string(t)
}

// takeDown leaves no mount, node, process or file behind, whatever the test did.
func (b *box) takeDown() {
	if b.Failed() {
		b.Logf("daemon:\n%s", b.logText())
	}
	for _, m := range mountsBelow(b.dir) {
		if !strings.HasPrefix(m, filepath.Join(b.run, "fuse")) {
			unix.Unmount(m, unix.MNT_DETACH)
		}
	}
	if b.serve != nil {
		if _, stderr, code := b.try("shutdown"); code != 0 {
			b.Errorf("shutdown at the end of the test: %s", stderr)
			b.serve.Process.Kill()
		}
		select {
		case <-b.daemon.Exited:
		case <-time.After(30 * time.Second):
			b.Errorf("the daemon does not end")
			b.serve.Process.Kill()
		}
	}
	testbox.QuitHolder(b.run)
	if text := b.logText(); strings.Contains(text, "DATA RACE") || strings.Contains(text, "panic") {
		b.Errorf("the daemon:\n%s", text)
	}
	for _, m := range mountsBelow(b.dir) {
		b.Errorf("still mounted: %s", m)
		unix.Unmount(m, unix.MNT_DETACH)
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.Error(err)
	}
}

func mountsBelow(dir string) []string { return testbox.Mounts(dir) }

// A file is one entry of a layer.
type file struct {
	name string
	body []byte // nil and a name that ends in /: a directory
}

// layerTar makes the tar of a layer.
func layerTar(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		if strings.HasSuffix(f.name, "/") {
			h.Mode, h.Typeflag = 0o755, tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// imageTar makes an OCI archive of one image with these layers, named "test:1" in it.
func imageTar(t *testing.T, layers ...[]byte) []byte {
	t.Helper()
	digest := func(b []byte) string { h := sha256.Sum256(b); return "sha256:" + hex.EncodeToString(h[:]) }
	blobs := []file{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	blob := func(media string, b []byte) map[string]any {
		d := digest(b)
		blobs = append(blobs, file{"blobs/sha256/" + d[7:], b})
		return map[string]any{"mediaType": media, "digest": d, "size": len(b)}
	}
	toJSON := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var descriptors []any
	var diffIDs []string
	for _, l := range layers {
		descriptors = append(descriptors, blob("application/vnd.oci.image.layer.v1.tar", l))
		diffIDs = append(diffIDs, digest(l))
	}
	config := blob("application/vnd.oci.image.config.v1+json", toJSON(map[string]any{
		"os": "linux", "architecture": "amd64", "config": map[string]any{"Cmd": []string{"/bin/sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}}))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", toJSON(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descriptors}))
	manifest["annotations"] = map[string]string{"org.opencontainers.image.ref.name": "test:1"}
	blobs = append(blobs, file{"index.json", toJSON(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})})
	return layerTar(t, blobs...)
}

// pattern is n bytes that do not repeat in a block.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// testImage writes a small two-layer image into the box and returns its path.
func (b *box) testImage() string {
	b.Helper()
	path := filepath.Join(b.dir, "image.tar")
	low := layerTar(b.T, file{"etc/", nil}, file{"etc/hostname", []byte("low\n")}, file{"etc/motd", []byte("hello\n")},
		file{"big", pattern(1, 8<<20)})
	high := layerTar(b.T, file{"etc/", nil}, file{"etc/hostname", []byte("high\n")}, file{"etc/.wh.motd", []byte{}})
	if err := os.WriteFile(path, imageTar(b.T, low, high), 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

func (b *box) read(path string) string {
	b.Helper()
	t, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	return string(t)
}

func (b *box) write(path, text string) {
	b.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = io.WriteString(f, text)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		b.Fatal(err)
	}
}

// settle waits until what was removed is freed, and returns the pool.
func (b *box) settle() api.Pool {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		st := asJSON[api.Status](b, "status")
		if len(st.Store.Queue) == 0 && st.Pool.DataFreeing == 0 && st.Store.BaseReady {
			return st.Pool
		}
		if time.Now().After(deadline) {
			b.Fatalf("the queue does not empty: %+v, %d blocks being freed", st.Store.Queue, st.Pool.DataFreeing)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// eventually waits until a condition holds.
func (b *box) eventually(what string, cond func() bool) {
	b.Helper()
	testbox.Eventually(b, what, cond)
}

// holderPID is the process that keeps the descriptors.
func (b *box) holderPID() string {
	st := asJSON[api.Status](b, "status")
	return fmt.Sprint(st.Exports.HolderPID)
}
