// Package testbox is what tests that drive the real program have in common: its commands, run as
// processes with a limit; a daemon that is started, waited for and ended; what is mounted.
package testbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mica/daemon/client"
	"mica/export/holder"
)

// Need skips a test that needs what an unprivileged container does not have, or a program.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, for mounts, loop devices and other users")
	}
	for _, f := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm"} {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("SKIPPED: needs %s: %v", f, err)
		}
	}
	for _, n := range append(programs, "mkfs.ext4") {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("SKIPPED: needs %s: %v", n, err)
		}
	}
}

// Limits of one command, and of a daemon's start and end.
const (
	CommandLimit = 2 * time.Minute
	DaemonLimit  = 60 * time.Second
)

// Run runs a command. One that hangs is made to show what all of its goroutines are at.
func Run(t testing.TB, c *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	c.Stdout, c.Stderr = &o, &e
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(CommandLimit, func() { c.Process.Signal(syscall.SIGQUIT) })
	defer timer.Stop()
	var exit *exec.ExitError
	if err := c.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), c.ProcessState.ExitCode()
}

// Decode reads what a command with --json printed.
func Decode[T any](t testing.TB, args []string, out string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("mica %s --json: %v in %q", strings.Join(args, " "), err, out)
	}
	return v
}

// A Daemon is one that was started.
type Daemon struct {
	Cmd    *exec.Cmd
	Exited chan error // gets its end
}

// Start starts a daemon, whose log is appended to a file, and waits until it answers in its directory RUN.
// If it does not, it has been ended when the test is.
func Start(t testing.TB, serve *exec.Cmd, log, run string) *Daemon {
	t.Helper()
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	serve.Stderr = f
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{Cmd: serve, Exited: make(chan error, 1)}
	go func() { d.Exited <- serve.Wait() }()
	c := client.New(run)
	defer c.Close()
	for deadline := time.Now().Add(DaemonLimit); ; {
		st, err := c.Status(context.Background())
		if err == nil && st.PID == serve.Process.Pid {
			return d
		}
		select {
		case err := <-d.Exited:
			t.Fatalf("the daemon ended: %v\n%s", err, Log(log))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			serve.Process.Kill()
			<-d.Exited
			t.Fatalf("the daemon does not answer: %v\n%s", err, Log(log))
		}
	}
}

// WaitEnd waits for the end of the daemon and returns its exit code, -1 after a signal.
func (d *Daemon) WaitEnd(t testing.TB) int {
	t.Helper()
	select {
	case <-d.Exited:
	case <-time.After(DaemonLimit):
		t.Fatal("the daemon does not end")
	}
	return d.Cmd.ProcessState.ExitCode()
}

// Stop ends the daemon with a signal and waits for it. The exit code is returned, -1 after a signal.
func (d *Daemon) Stop(t testing.TB, sig os.Signal) int {
	t.Helper()
	if err := d.Cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	return d.WaitEnd(t)
}

// QuitHolder ends the holder that a daemon with the directory RUN has left.
func QuitHolder(run string) {
	if c, err := holder.Dial(filepath.Join(run, "holder.sock")); err == nil {
		c.Quit(true)
		c.Close()
	}
}

// Log is the end of a log.
func Log(path string) string {
	text, _ := os.ReadFile(path)
	return string(text[max(0, len(text)-64<<10):])
}

// Mounts lists mount points below a directory, the innermost first.
func Mounts(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		if w := strings.Fields(line); len(w) > 4 && strings.HasPrefix(w[4], dir+"/") {
			list = append([]string{w[4]}, list...)
		}
	}
	return list
}

// Eventually waits until a condition holds.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come to it: %s", what)
		}
	}
}
