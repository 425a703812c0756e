package e2e

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary plays the programs that write to containers, as processes of their own: one
// that waits for a daemon which is not there can be left waiting.
const writerRole = "writer-role"

func runWriter(args []string) int {
	var err error
	switch args[0] {
	case "append":
		err = appendLines(args[1])
	case "blocks":
		seed, _ := strconv.ParseInt(args[2], 10, 64)
		off, _ := strconv.ParseInt(args[3], 10, 64)
		length, _ := strconv.ParseInt(args[4], 10, 64)
		err = writeBlocks(args[1], seed, off, length, len(args) == 6 && args[5] == "nosync")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// appendLines appends numbered lines to a file, syncs each and then prints its number, until
// the standard input ends.
func appendLines(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	end := inputEnd()
	for i := 0; ; i++ {
		select {
		case <-end:
			return f.Close()
		default:
		}
		if _, err := fmt.Fprintf(f, "%d\n", i); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return err
		}
		fmt.Println(i)
	}
}

func inputEnd() <-chan struct{} {
	end := make(chan struct{})
	go func() {
		var b [1]byte
		os.Stdin.Read(b[:])
		close(end)
	}()
	return end
}

// An op is one write of a blocks writer: whole sectors that hold their own place and the number
// of the write.
type op struct {
	off    int64
	length int
}

const sector = 512

// nextOp makes the next write: often small, sometimes a whole pool block and more.
func nextOp(rng *rand.Rand, off, length int64) op {
	n := 1 << rng.Intn(9) // sectors: 512 bytes to 128 KiB
	if rng.Intn(2) == 0 {
		n = 1 + rng.Intn(2*n)
	}
	at := rng.Int63n(length/sector - int64(n))
	return op{off + at*sector, n * sector}
}

func fillOp(b []byte, o op, number uint64) {
	for i := 0; i < o.length; i += sector {
		binary.LittleEndian.PutUint64(b[i:], uint64(o.off)+uint64(i))
		binary.LittleEndian.PutUint64(b[i+8:], number)
		for j := 16; j < sector; j += 8 {
			binary.LittleEndian.PutUint64(b[i+j:], (uint64(o.off)+uint64(i))*31+number*uint64(j))
		}
	}
}

// writeBlocks makes numbered random writes to a block device or a file inside a range, syncs each
// unless told not to, and then prints "begin end" in nanoseconds of the monotonic clock, until the
// standard input ends.
func writeBlocks(path string, seed, off, length int64, noSync bool) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewSource(seed))
	end := inputEnd()
	for number := uint64(1); ; number++ {
		select {
		case <-end:
			return f.Close()
		default:
		}
		o := nextOp(rng, off, length)
		fillOp(mem, o, number)
		begin := monotonic()
		if _, err := f.WriteAt(mem[:o.length], o.off); err != nil {
			return err
		}
		if !noSync {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		fmt.Println(begin, monotonic())
	}
}

func monotonic() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// A writer is a process in the writer role, and the lines that it has printed.
type writer struct {
	cmd   *exec.Cmd
	stdin *os.File
	mu    sync.Mutex
	lines []string
	more  chan struct{}
	ended chan struct{} // the output has ended
}

func (b *box) startWriter(args ...string) *writer {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	w := &writer{cmd: b.tool(self, append([]string{writerRole}, args...)...), more: make(chan struct{}, 1), ended: make(chan struct{})}
	w.cmd.Stderr = os.Stderr
	r, in, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	w.stdin, w.cmd.Stdin = in, r
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	b.background(w.cmd)
	r.Close()
	b.Cleanup(func() { in.Close() })
	go func() {
		defer close(w.ended)
		for s := bufio.NewScanner(out); s.Scan(); {
			w.mu.Lock()
			w.lines = append(w.lines, s.Text())
			w.mu.Unlock()
			select {
			case w.more <- struct{}{}:
			default:
			}
		}
	}()
	return w
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.lines)
}

// wait waits until the writer has done n writes more.
func (w *writer) wait(t *testing.T, n int) {
	t.Helper()
	want, limit := w.count()+n, time.After(60*time.Second)
	for w.count() < want {
		select {
		case <-w.more:
		case <-w.ended:
			if w.count() < want {
				t.Fatal("a writer ended: a write failed")
			}
		case <-limit:
			t.Fatal("a writer hangs")
		}
	}
}

// stop lets the writer finish what it is at, and returns its lines.
func (w *writer) stop(t *testing.T) []string {
	t.Helper()
	w.stdin.Close()
	select {
	case <-w.ended:
	case <-time.After(60 * time.Second):
		w.cmd.Process.Signal(syscall.SIGKILL)
		t.Fatal("a writer does not end")
	}
	if err := w.cmd.Wait(); err != nil {
		t.Fatalf("a writer failed: %v", err)
	}
	return w.lines
}
