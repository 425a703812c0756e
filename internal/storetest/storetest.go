// Package storetest is what the tests of the layer store, and of what stands on it, have in common: the
// small roles that a test binary plays, a pool on memory with nodes made by FUSE, and short ways to
// check and to wait. It knows nothing of the store itself, whose own tests use it.
package storetest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mica/export/fuse"
	exporthelper "mica/export/helper"
	"mica/export/holder"
	"mica/layer/helper"
)

// Role is how a command of a role is called: the test binary itself, which plays it in PlayRole.
func Role(name string, args ...string) []string {
	return append([]string{"/proc/self/exe", "role-" + name}, args...)
}

// PlayRole ends the process after it has played a role, if it was started for that: those of mica's own
// small processes, or one of the test's, which gets the next argument. TestMain calls it first.
func PlayRole(own map[string]func(arg string) error) {
	if len(os.Args) < 2 {
		return
	}
	name, ok := strings.CutPrefix(os.Args[1], "role-")
	if !ok {
		return
	}
	arg := ""
	if len(os.Args) > 2 {
		arg = os.Args[2]
	}
	var err error
	switch play := own[name]; {
	case play != nil:
		err = play(arg)
	case name == "helper":
		err = helper.Run(context.Background(), os.Stdin, os.Stdout, nil)
	case name == "fuse-helper":
		err = exporthelper.Run(context.Background(), os.Stdin, os.Stdout, fuse.Calls, fuse.Errors)
	case name == "holder":
		err = holder.Run(context.Background(), arg)
	default:
		err = fmt.Errorf("unknown role")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// NeedRoot skips a test that cannot run here, loudly.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: mounting, FUSE and loop devices need root")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here: %v", p, err)
		}
	}
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("SKIPPED: mke2fs is not installed (package e2fsprogs)")
	}
}

// EachFS runs a test on every kind of base file system.
func EachFS(t *testing.T, fn func(t *testing.T, fs string)) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs.xfs"); fs == "xfs" && err != nil {
				t.Skip("SKIPPED: mkfs.xfs is not installed (package xfsprogs)")
			}
			fn(t, fs)
		})
	}
}

// Context ends with the test, or after a time in which everything a test waits for happens.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Logger is silent but with -v.
func Logger() *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	return slog.New(slog.NewTextHandler(io.Discard, nil))
}

// OK ends a test on an error.
func OK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Must returns a function that ends a test on an error, or hands on the value: Must[int](t)(f()).
func Must[T any](t testing.TB) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		OK(t, err)
		return v
	}
}

// WaitFor ends a test if something does not happen.
func WaitFor(t testing.TB, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

// UnmountIn takes away what is mounted below dir, where which says so.
func UnmountIn(dir string, which func(at string) bool) {
	text, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) > 1 && strings.HasPrefix(f[1], dir+"/") && which(f[1]) {
			if unix.Unmount(f[1], 0) != nil {
				unix.Unmount(f[1], unix.MNT_DETACH)
			}
		}
	}
}
