package e2e

import (
	"bytes"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// otherBuild is the program as another release.
func (b *box) otherBuild() string {
	b.Helper()
	path := b.path("mica-other")
	args := append(append([]string{"build"}, buildFlags...), "-ldflags", "-X main.release=9.8.7-other", "-o", path, "mica/cmd/mica")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		b.Fatalf("build another release: %v\n%s", err, out)
	}
	return path
}

// needResend skips where a killed daemon is an I/O error for its containers. There status says so.
func (b *box) needResend() {
	b.Helper()
	st := b.status()
	if st.Exports.Resend {
		return
	}
	if !strings.Contains(strings.Join(st.Notes, "\n"), "the death of the daemon is an I/O error") {
		b.Errorf("this kernel cannot resend FUSE requests, and status does not say what that means: %q", st.Notes)
	}
	b.Skip("SKIPPED: this kernel cannot resend FUSE requests: want Linux 6.9 or later")
}

// TestFioThroughKills runs fio with verification inside a mounted container, always in new files, so
// in blocks that are new, while the daemon is killed 40 times and started again, and is replaced
// by another build of the program, by a kill and in good order. fio sees no error and finds
// everything that it wrote; so does a program that never syncs what it writes.
func TestFioThroughKills(t *testing.T) {
	b := newBox(t, "fio")
	b.start()
	b.needResend()
	b.smallImage()
	b.mica("create", "small", "web", "--size", "1G")
	dir := b.mount("web")
	load := b.tool("sh", "-c", `n=0; while [ ! -e stop ]; do n=$((n+1)); "$@" --randseed=$n --direct=$((n%2)) >fio.out 2>&1 || { cat fio.out; exit 1; }; done; echo $n`,
		"sh", "fio", "--name=v", "--rw=randwrite", "--bsrange=4k-128k", "--numjobs=3", "--iodepth=8", "--size=12m", "--directory="+dir,
		"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_dump=0", "--group_reporting", "--fallocate=none",
		"--unlink=1", "--ioengine=libaio")
	var loadOut bytes.Buffer
	load.Stdout, load.Stderr = &loadOut, &loadOut
	b.background(load)

	// A file of holes, written directly and never synced.
	const span = 64 << 20
	file := filepath.Join(dir, "unsynced")
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(span); err != nil {
		t.Fatal(err)
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewSource(seed))
	w := b.startWriter("blocks", file, fmt.Sprint(seed), "0", fmt.Sprint(span), "nosync")

	other, taken, slowest := b.otherBuild(), 0, time.Duration(0)
	const rounds = 40
	for round := range rounds {
		w.wait(t, 1+rng.Intn(200))
		time.Sleep(time.Duration(rng.Intn(100)) * time.Millisecond)
		sig := syscall.SIGKILL
		switch round {
		case rounds / 2:
			b.program = other // by a kill
		case rounds/2 + 5:
			b.program, sig = "", syscall.SIGTERM // and back in good order
		}
		b.stop(sig)
		down := time.Now()
		b.start()
		slowest = max(slowest, time.Since(down))
		st := b.status()
		if j := st.Pool.Journal; j.State != "on" || j.Problem != "" || sig == syscall.SIGTERM && j.TakenOver > 0 {
			t.Errorf("round %d: journal %+v", round, j)
		} else if j.TakenOver > 0 {
			taken++
		}
		if want := b.program == other; strings.HasPrefix(st.Version, "9.8.7-other") != want {
			t.Errorf("round %d: the daemon is version %s", round, st.Version)
		}
	}
	w.wait(t, 5)
	b.writeFile("stop", nil)
	if err := load.Wait(); err != nil {
		t.Errorf("fio: %v\n%s", err, loadOut.String())
	}
	lines := w.stop(t)
	b.checkBlocks(f, seed, 0, span, lines)
	f.Close()
	t.Logf("%d kills, changes taken over after %d of them; %s runs of fio, %d writes never synced; longest write %v, longest start of a daemon %v",
		rounds-1, taken, strings.TrimSpace(loadOut.String()), len(lines), longest(lines).Round(time.Millisecond), slowest.Round(time.Millisecond))
	if taken < rounds/4 {
		t.Errorf("changes were taken over after %d of %d kills only: the test tests little", taken, rounds)
	}
	b.mica("umount", "web")
	node := b.mica("attach", "web")
	b.sh("e2fsck", "-fn", node)
	b.mica("detach", "web")
}
