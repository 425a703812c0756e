package space

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/dev"
	"mica/engine"
	"mica/engine/user"
	"mica/export"
	"mica/export/fuse"
	"mica/internal/trial"
	"mica/layer/helper"
	"mica/thin"
)

// TestWriteBackWaits: a program writes a file through the page cache, far more than the pool has room
// for. Write-back then waits as a whole: no write of it is refused, the program sees no error, files
// that are there can be read meanwhile, and once the pool has grown all of the file is there.
func TestWriteBackWaits(t *testing.T) {
	needRoot(t)
	for _, p := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here", p)
		}
	}
	const size, mib = 512 << 20, 160
	dir := shm(t)
	meta, data := dev.NewMem(4<<20), dev.NewMem(40<<20)
	must(t, thin.Format(meta, thin.FormatOptions{DataBlockSize: blockSize, DataBlocks: 40 << 20 / blockSize}))
	p, err := user.New(meta, data, user.Options{NoSpaceTimeout: time.Hour, Logger: trial.Quiet})
	must(t, err)
	defer func() { must(t, p.Close()) }()
	must(t, p.CreateThin(ctx, 1))
	h, err := p.Open(ctx, 1, engine.OpenOptions{SizeBytes: size})
	must(t, err)
	defer h.Close()
	e, err := fuse.New(fuse.Options{RunDir: filepath.Join(dir, "run"), HelperCommand: []string{"/proc/self/exe", "role-fuse-helper"}, Logger: trial.Quiet})
	must(t, err)
	defer e.Close()
	a, err := e.Attach(ctx, "wb", h, export.AttachOptions{})
	must(t, err)
	defer func() { must(t, a.Detach(context.Background())) }()
	mnt := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o700))
	must(t, os.Mkdir(filepath.Join(dir, "tmp"), 0o700))
	hc := &helper.Client{Command: []string{"/proc/self/exe", "role-helper"}, Dir: filepath.Join(dir, "tmp"), Timeout: time.Minute}
	must(t, hc.Mkfs(ctx, a.Node(), "ext4", "5b1e6f52-0000-4000-8000-000000000002"))
	command(t, "mount", a.Node(), mnt)
	unmounted := false
	defer func() {
		if !unmounted {
			p.GrowData(ctx, size+64<<20) // or the unmount would wait
			unix.Unmount(mnt, unix.MNT_DETACH)
		}
	}()
	content := make([]byte, mib<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	sum := sha256.Sum256(content)
	src := filepath.Join(dir, "src")
	must(t, os.WriteFile(src, content, 0o600))
	command(t, "dd", "if="+src, "of="+mnt+"/old", "bs=1M", "count=8", "conv=fsync", "status=none")

	var stderr bytes.Buffer
	w := exec.Command("dd", "if="+src, "of="+mnt+"/new", "bs=1M", "conv=fsync", "status=none")
	w.Stderr = &stderr
	must(t, w.Start())
	ended := make(chan error, 1)
	go func() { ended <- w.Wait() }()
	waiting := func() int {
		st, err := p.Status(ctx)
		must(t, err)
		return st.WaitingForSpace
	}
	eventually(t, "write-back waits", func() bool { return waiting() > 0 })
	// Reads of what is there, past the page cache.
	slowest := time.Duration(0)
	for i := range 20 {
		begin := time.Now()
		command(t, "dd", "if="+mnt+"/old", "of=/dev/null", "iflag=direct", "bs=64k", "count=1", fmt.Sprint("skip=", i*5), "status=none")
		slowest = max(slowest, time.Since(begin))
		time.Sleep(50 * time.Millisecond)
	}
	select {
	case err := <-ended:
		t.Fatalf("the writer ended although nothing was freed: %v: %s", err, stderr.String())
	default:
	}
	t.Logf("%d writes wait; the slowest of 20 reads took %v", waiting(), slowest)
	must(t, p.GrowData(ctx, size+64<<20))
	if err := <-ended; err != nil {
		t.Fatalf("the writer: %v: %s", err, stderr.String())
	}
	must(t, unmount(mnt)) // what the page cache has does not count
	command(t, "mount", a.Node(), mnt)
	out, err := exec.Command("sha256sum", mnt+"/new").Output()
	must(t, err)
	if got, _, _ := strings.Cut(string(out), " "); got != hex.EncodeToString(sum[:]) {
		t.Errorf("the file has digest %s, want %x", got, sum)
	}
	must(t, unmount(mnt))
	unmounted = true
}
