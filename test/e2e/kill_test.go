package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKilledUnderLoad kills the daemon again and again under load. Mounted containers go on: fio
// on a file that is there sees no error and verifies everything; programs that write to new
// blocks of a device see no error either, and every write that was acknowledged is there in the
// end, whether it was synced or not.
func TestKilledUnderLoad(t *testing.T) {
	b := newBox(t, "fio", "nbdinfo")
	b.start()
	if !b.status().Exports.Resend {
		t.Skip("SKIPPED: this kernel cannot resend FUSE requests: want Linux 6.9 or later")
	}
	b.smallImage()
	b.mica("create", "small", "web")
	dir := b.mount("web")
	// fio overwrites blocks that are the container's own, over and over.
	file := filepath.Join(dir, "file")
	b.endFio(b.background(b.fio(8, 0, "--filename="+file, "--ioengine=libaio", "--direct=1")))
	b.sh("sync", "-f", file)
	b.figures()
	load := b.tool("sh", "-c", `n=0; while [ ! -e stop ]; do n=$((n+1)); "$@" --randseed=$n >fio.out 2>&1 || { cat fio.out; exit 1; }; done; echo $n`,
		"sh", "fio", "--name=v", "--rw=randwrite", "--bsrange=512-64k", "--numjobs=4", "--iodepth=8", "--size=8m", "--offset_increment=8m",
		"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--verify_dump=0", "--group_reporting", "--filename="+file,
		"--ioengine=libaio", "--direct=1", "--allow_file_create=0")
	var loadOut bytes.Buffer
	load.Stdout, load.Stderr = &loadOut, &loadOut
	b.background(load)

	const writers, span = 3, int64(96 << 20)
	b.mica("create", "small", "raw")
	node := b.mica("attach", "raw")
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	var all []*writer
	for i := range int64(writers) {
		args := []string{"blocks", node, fmt.Sprint(seed + i), fmt.Sprint(i * span), fmt.Sprint(span)}
		if i == 1 {
			args = append(args, "nosync")
		}
		all = append(all, b.startWriter(args...))
	}
	b.mica("create", "small", "vm")
	uri := b.mica("attach", "vm", "--as", "nbd")
	rng := rand.New(rand.NewSource(seed))
	for round := range 10 {
		for _, w := range all {
			w.wait(t, 1+rng.Intn(60))
		}
		b.stop(syscall.SIGKILL)
		if round%3 == 2 { // and again, before or while it takes up its predecessor's work
			b.killAtStart(time.Duration(rng.Intn(150)) * time.Millisecond)
		}
		b.start()
		if got := strings.TrimSpace(b.sh("nbdinfo", "--size", uri)); got != "536870912" {
			t.Errorf("the NBD export has %s bytes after a restart", got)
		}
	}
	for _, w := range all {
		w.wait(t, 5)
	}
	b.writeFile("stop", nil)
	if err := load.Wait(); err != nil {
		t.Errorf("fio: %v\n%s", err, loadOut.String())
	}
	t.Logf("%s runs of fio over 10 kills", strings.TrimSpace(loadOut.String()))
	total := 0
	device, err := os.OpenFile(node, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range all {
		lines := w.stop(t)
		b.checkBlocks(device, seed+int64(i), int64(i)*span, span, lines)
		total += len(lines)
	}
	device.Close()
	t.Logf("%d acknowledged writes, all there", total)
	b.mica("detach", "raw", "vm")
	b.mica("umount", "web")
	node = b.mica("attach", "web")
	b.sh("e2fsck", "-fn", node)
	b.mica("detach", "web")
}

// killAtStart starts the daemon and kills it a moment later.
func (b *box) killAtStart(after time.Duration) {
	b.Helper()
	c := b.background(b.command(b.serveArgs()...))
	time.Sleep(after)
	c.Process.Kill()
	c.Wait()
}

// checkBlocks compares a device or a file with what a blocks writer wrote: each sector holds the last
// write to it that was acknowledged.
func (b *box) checkBlocks(device *os.File, seed, off, length int64, lines []string) {
	b.Helper()
	last := map[int64]uint64{} // by sector: number of the last write to it
	rng := rand.New(rand.NewSource(seed))
	for i := range lines {
		o := nextOp(rng, off, length)
		for at := o.off; at < o.off+int64(o.length); at += sector {
			last[at] = uint64(i + 1)
		}
	}
	mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(mem)
	want := make([]byte, sector)
	bad := 0
	for at := off; at < off+length; at += int64(len(mem)) {
		if _, err := device.ReadAt(mem, at); err != nil {
			b.Fatal(err)
		}
		for i := int64(0); i < int64(len(mem)); i += sector {
			number := last[at+i]
			if number == 0 {
				continue // never written
			}
			got := mem[i : i+sector]
			fillOp(want, op{at + i, sector}, number)
			if !bytes.Equal(got, want) {
				if bad++; bad < 10 {
					b.Errorf("sector at %d holds write %d, want write %d", at+i, binary.LittleEndian.Uint64(got[8:]), number)
				}
			}
		}
	}
	if bad > 0 {
		b.Errorf("%d sectors hold something else than what was acknowledged", bad)
	}
}

// longest is the longest of a blocks writer's writes.
func longest(lines []string) (most time.Duration) {
	for _, l := range lines {
		var begin, end int64
		if _, err := fmt.Sscan(l, &begin, &end); err == nil {
			most = max(most, time.Duration(end-begin))
		}
	}
	return most
}
