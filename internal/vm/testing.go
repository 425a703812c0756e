package vm

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"mica/internal/vm/wire"
)

// Require skips the test, loudly, where no machine can be had.
func Require(t testing.TB) {
	t.Helper()
	if _, err := findKit(); err != nil {
		skipped.Add(1)
		t.Skipf("real kernel: %v", err)
	}
}

// Start boots a machine for a test and closes it at the end of the test. A kernel oops or
// warning in its console fails the test. Skips where no machine can be had.
func Start(t testing.TB, c Config) *Machine {
	t.Helper()
	Require(t)
	begin := time.Now()
	m, err := Boot(context.Background(), c)
	if errors.Is(err, context.DeadlineExceeded) {
		// On a busy host an emulated processor can lose its timer while the kernel starts. Nothing of
		// the test has begun.
		t.Logf("once more: %v", err)
		m, err = Boot(context.Background(), c)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("test machine: Linux %s, up in %.1f s", m.Release, time.Since(begin).Seconds())
	t.Cleanup(func() {
		m.Close()
		if bad := Complaints(m.Console()); len(bad) > 0 {
			t.Errorf("the guest's kernel complained:\n%s", m.console.tail(60))
		}
	})
	return m
}

// Build compiles a main package for the guest and returns its path.
func Build(t testing.TB, pkg string) string { return buildFor(t, "build", pkg) }

// BuildTest compiles a package's tests for the guest and returns the path of the program.
func BuildTest(t testing.TB, pkg string) string { return buildFor(t, "test", pkg) }

func buildFor(t testing.TB, verb, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	if err := build(context.Background(), out, verb, pkg); err != nil {
		t.Fatal(err)
	}
	return out
}

// commandTimeout bounds MustRun and Input.
const commandTimeout = 5 * time.Minute

// MustRun runs a program in the guest and returns what it printed on standard output. Any other
// end than exit status 0 fails the test.
func (m *Machine) MustRun(t testing.TB, args ...string) []byte {
	t.Helper()
	return m.Input(t, nil, args...)
}

// Input is MustRun with bytes on standard input.
func (m *Machine) Input(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	res, err := m.Run(ctx, wire.Command{Args: args, Stdin: stdin})
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != 0 {
		t.Fatalf("guest command %q: exit status %d\nstdout: %s\nstderr: %s\nconsole:\n%s",
			args, res.Code, lastBytes(res.Stdout, 4000), lastBytes(res.Stderr, 4000), m.console.tail(10))
	}
	return res.Stdout
}

// BuildTo and BuildTestTo compile into a file, for use outside a test.
func BuildTo(ctx context.Context, out, pkg string) error { return build(ctx, out, "build", pkg) }

func BuildTestTo(ctx context.Context, out, pkg string) error { return build(ctx, out, "test", pkg) }

var skipped atomic.Int64

// PrintSkipped prints one line that counts the tests that Require skipped; call it at the end of
// a TestMain.
func PrintSkipped() {
	if n := skipped.Load(); n > 0 {
		_, err := findKit()
		fmt.Printf("SKIPPED %d tests that need a real kernel: %v\n", n, err)
	}
}
