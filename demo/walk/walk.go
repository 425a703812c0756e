package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	units "github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// A walk is one run of the demo. The first error ends it: later commands do nothing.
type walk struct {
	ctx       context.Context
	bin       string
	dir, run  string
	daemon    *exec.Cmd
	blockSize int64
	err       error
	promises  int
	broken    []string
}

// mountPoints are where the demo mounts containers, below its directory.
var mountPoints = []string{"one", "two", "three", "fork"}

// numbers are the pool's own.
type numbers struct {
	used int64 // data blocks
	host int64 // bytes that the data file really occupies
}

func (n numbers) since(o numbers, blockSize int64) string {
	return fmt.Sprintf("%+d blocks of %s in use, %+.1f MiB on the host", n.used-o.used, size(blockSize), float64(n.host-o.host)/mib)
}

func size(n int64) string {
	return units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB"})
}

func (w *walk) title(format string, args ...any) { fmt.Printf("\n== "+format+"\n", args...) }

func (w *walk) say(format string, args ...any) {
	if w.err == nil {
		fmt.Printf("   "+format+"\n", args...)
	}
}

// promise says what was found; if ok is false the demo goes on and fails in the end.
func (w *walk) promise(ok bool, format string, args ...any) {
	if w.err != nil {
		return
	}
	w.promises++
	text := fmt.Sprintf(format, args...)
	if ok {
		fmt.Printf("   ok: %s\n", text)
		return
	}
	fmt.Printf("   BROKEN: %s\n", text)
	w.broken = append(w.broken, text)
}

// serve starts the daemon and waits until it answers.
func (w *walk) serve() error {
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(w.dir, "daemon.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Printf("$ mica serve --root %s --run %s &\n", w.dir, w.run)
	w.daemon = exec.Command(w.bin, "serve", "--root", w.dir, "--run", w.run)
	w.daemon.Stdout, w.daemon.Stderr = log, log
	w.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is for the walk
	if err := w.daemon.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		ready, err := w.baseReady()
		if ready {
			break
		} else if time.Now().After(deadline) || w.ctx.Err() != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("the daemon is not ready: %v\n%s", err, text)
		}
	}
	w.numbers()
	return w.err
}

// baseReady asks the daemon whether it has made the empty file system that every image starts from.
func (w *walk) baseReady() (bool, error) {
	var s struct {
		Store struct {
			Ready bool   `json:"base_ready"`
			Error string `json:"base_error"`
		} `json:"store"`
	}
	out, err := w.output("status", "--json")
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err == nil && s.Store.Error != "" {
		err = errors.New(s.Store.Error)
	}
	return err == nil && s.Store.Ready, err
}

// end takes down what is still there, then lets two checkers look at the closed pool.
func (w *walk) end() error {
	if w.daemon == nil || w.daemon.Process == nil {
		return nil
	}
	w.ctx = context.Background()
	for _, d := range append([]string{"overlay/merged"}, mountPoints...) {
		if d = filepath.Join(w.dir, d); exists(d) {
			syscall.Unmount(d, 0)
		}
	}
	failed := w.err != nil
	w.err = nil
	w.title("The pool, closed, before two independent checkers")
	w.mica("shutdown")
	err := w.err
	if err != nil {
		w.daemon.Process.Signal(syscall.SIGTERM)
	}
	if e := w.daemon.Wait(); e != nil {
		err = errors.Join(err, fmt.Errorf("the daemon: %w", e))
	}
	if failed {
		return err
	}
	w.err = nil
	w.shell("thin_check " + filepath.Join(w.dir, "pool/metadata"))
	w.mica("thin", "check", filepath.Join(w.dir, "pool"))
	return errors.Join(err, w.err)
}

func (w *walk) command(args ...string) *exec.Cmd {
	c := exec.CommandContext(w.ctx, w.bin, args...)
	c.Env = append(os.Environ(), "MICA_RUN="+w.run)
	return c
}

// output runs a command and returns what it printed.
func (w *walk) output(args ...string) ([]byte, error) {
	var stderr bytes.Buffer
	c := w.command(args...)
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("mica %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, err
}

// mica runs a command as a user would see it.
func (w *walk) mica(args ...string) { w.visible("mica "+strings.Join(args, " "), w.command(args...)) }

// mount mounts a container on a directory, which is made.
func (w *walk) mount(name, dir string) {
	if w.err == nil {
		w.err = os.MkdirAll(dir, 0o755)
	}
	w.mica("mount", name, dir)
}

// shell runs a line of shell as a user would see it.
func (w *walk) shell(line string) { w.visible(line, exec.CommandContext(w.ctx, "/bin/sh", "-c", line)) }

func (w *walk) visible(line string, c *exec.Cmd) {
	if w.err != nil {
		return
	}
	fmt.Printf("$ %s\n", line)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	if err := c.Run(); err != nil {
		w.err = fmt.Errorf("%s: %w", line, err)
	}
}

func (w *walk) quietly(line string) {
	if w.err != nil {
		return
	}
	if out, err := exec.CommandContext(w.ctx, "/bin/sh", "-c", line).CombinedOutput(); err != nil {
		w.err = fmt.Errorf("%s: %w: %s", line, err, out)
	}
}

// settleTime bounds how long freed blocks may take to become free: a commit a second, and a
// punch.
const settleTime = 15 * time.Second

// numbers asks the pool, after everything written has reached it and freed blocks are free.
func (w *walk) numbers() numbers {
	if w.err != nil {
		return numbers{}
	}
	w.sync()
	for deadline := time.Now().Add(settleTime); ; time.Sleep(50 * time.Millisecond) {
		out, err := w.output("status", "--json")
		var s struct {
			Pool struct {
				BlockSize int64 `json:"block_size"`
				Used      int64 `json:"data_used"`
				Freeing   int64 `json:"data_freeing"`
				Host      int64 `json:"host_bytes"`
			} `json:"pool"`
		}
		if err == nil {
			err = json.Unmarshal(out, &s)
		}
		if err != nil {
			w.err = err
			return numbers{}
		}
		w.blockSize = s.Pool.BlockSize
		if s.Pool.Freeing == 0 || time.Now().After(deadline) {
			return numbers{s.Pool.Used, s.Pool.Host}
		}
	}
}

// sync writes out what the mounted containers hold back. Not sync(2): other file systems of this
// machine are none of our business.
func (w *walk) sync() {
	for _, d := range mountPoints {
		f, err := os.Open(filepath.Join(w.dir, d))
		if err != nil {
			continue
		}
		if err := unix.Syncfs(int(f.Fd())); err != nil && w.err == nil {
			w.err = fmt.Errorf("sync %s: %w", f.Name(), err)
		}
		f.Close()
	}
}

// settle waits until background removal has brought usage back to what it was.
func (w *walk) settle(want numbers) {
	for deadline := time.Now().Add(settleTime); w.err == nil && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if w.numbers().used <= want.used {
			return
		}
	}
}

// containers lists the names of all containers.
func (w *walk) containers() []string {
	if w.err != nil {
		return nil
	}
	out, err := w.output("ls", "--json")
	var list []struct {
		Name string `json:"name"`
	}
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	w.err = err
	var names []string
	for _, c := range list {
		names = append(names, c.Name)
	}
	return names
}

// writer appends numbered lines to a file until stop, which returns how many there are.
func (w *walk) writer(path string) (stop func() int) {
	var end atomic.Bool
	done := make(chan int)
	go func() {
		n := 0
		defer func() { done <- n }()
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return
		}
		defer f.Close()
		for !end.Load() {
			if _, err := fmt.Fprintf(f, "line %d\n", n); err != nil {
				return
			}
			n++
			time.Sleep(time.Millisecond)
		}
	}()
	time.Sleep(100 * time.Millisecond)
	return func() int { end.Store(true); return <-done }
}

func inOrder(log string) bool {
	for i, l := range strings.Split(strings.TrimSuffix(log, "\n"), "\n") {
		if l != fmt.Sprintf("line %d", i) {
			return false
		}
	}
	return true
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

func fileSize(path string) int64 {
	if i, err := os.Stat(path); err == nil {
		return i.Size()
	}
	return 0
}
