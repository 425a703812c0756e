// Package exporttest is what every exporter must do, as tests: sizes and alignment, read-only
// devices, zeros that read back as zeros, flushes that mean flush, concurrent requests, detaching
// what is in use, servers that are killed in the middle of writes and replaced without an error,
// links that never lead to another's data.
//
// A package that implements export.Exporter has
//
//	func TestMain(m *testing.M) { exporttest.Main(m, driver) }
//	func TestConformance(t *testing.T) { exporttest.Run(t, driver) }
//
// Its test program plays the roles of the server, the helper and the holder too. It needs root and
// what the exporter needs; for kernels that this host does not have it runs in the test machine.
package exporttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"mica/export"
)

// A Driver is an exporter under test.
type Driver struct {
	// Available says why the exporter cannot work here; nil if it can.
	Available func() error
	// New makes an exporter with everything that makes it survive.
	New func(o Options) (export.Exporter, error)
	// Roles are what New's commands start: the test program with one of these names as its first
	// argument, and further ones.
	Roles map[string]func(args []string) error
	// Left lists what the exporter has left in the kernel: nodes, by any run directory below dir.
	Left func(dir string) []string
	// TakeAway does to a node what an administrator can do behind the exporter's back.
	TakeAway func(node string) error

	// End ends what New has started beside the exporter, such as a holder; may be nil.
	End func(o Options)

	// What differs, with reason.
	NoResize   bool          // this kernel cannot; Resize says so with dev.ErrUnsupported
	NoENOSPC   bool          // the kernel makes EIO of every error
	Pause      time.Duration // longest pause of a request after the server was replaced; 0: a second
	DiscardIs0 bool          // discards are zeroes to this transport
}

// Options are where an exporter lives.
type Options struct {
	Dir string   // run directory Dir/run, links Dir/links
	Exe []string // the test program: Exe + role + arguments
	Log *slog.Logger
	// LinkDir is where links are, if not in Dir/links.
	LinkDir string
	// Patience is how long a detach waits for openers; 0: the exporter's default.
	Patience time.Duration
}

// Run is the directory of RUN.
func (o Options) Run() string { return filepath.Join(o.Dir, "run") }

// Links is the directory of links.
func (o Options) Links() string {
	if o.LinkDir != "" {
		return o.LinkDir
	}
	return filepath.Join(o.Dir, "links")
}

// Role is the command that starts a role.
func (o Options) Role(name string, args ...string) []string {
	return append(append(append([]string{}, o.Exe...), name), args...)
}

func options(dir string) Options {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if os.Getenv("MICA_TEST_LOG") != "" {
		log = slog.Default()
	}
	return Options{Dir: dir, Exe: []string{"/proc/self/exe"}, Log: log}
}

// Main is TestMain: it plays a role if the first argument names one, and runs the tests otherwise.
func Main(m *testing.M, d Driver) {
	if len(os.Args) > 1 {
		role := d.Roles[os.Args[1]]
		switch os.Args[1] {
		case "suite-serve":
			role = func(args []string) error { return serve(d, args) }
		case "suite-churn":
			role = func(args []string) error { return churn(d, args) }
		case "suite-hold":
			role = hold
		}
		if role != nil {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// Run runs the suite.
func Run(t *testing.T, d Driver) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: block devices need root")
	}
	if err := d.Available(); err != nil {
		t.Skipf("SKIPPED here, runs in the test machine (test/kernel): %v", err)
	}
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Driver)
	}{
		{"sizes", testSizes}, {"refused", testRefused}, {"dirty bytes", testDirtyBytes}, {"alignment", testAlignment}, {"resize", testResize},
		{"read-only", testReadOnly}, {"zeroes", testZeroes}, {"flush", testFlush}, {"forced writes", testForced},
		{"no garbage", testNoGarbage}, {"concurrent", testConcurrent}, {"inline", testInline}, {"errors", testErrors}, {"waiting writes", testWaiting},
		{"busy", testBusy}, {"mounted", testMounted}, {"detach goes on", testDetachGoesOn}, {"links", testLinks},
		{"reused minor", testReuse}, {"taken away", testTakenAway}, {"restart", testRestart}, {"kill", testKill},
		{"killed while idle", testKillIdle}, {"drop", testDrop}, {"churn", testChurn},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, d) })
	}
}

// A rig is an exporter in this process.
type rig struct {
	t testing.TB
	d Driver
	o Options
	e export.Exporter
}

// newRig makes one.
func newRig(t testing.TB, d Driver) *rig {
	t.Helper()
	r := &rig{t: t, d: d, o: ground(t, d)}
	r.open()
	return r
}

// ground is a directory for an exporter. At the end of the test nothing of it may be left.
func ground(t testing.TB, d Driver) Options {
	t.Helper()
	o := options(dirOnMemory(t))
	t.Cleanup(func() {
		if left := d.Left(o.Dir); len(left) > 0 {
			t.Errorf("left in the kernel: %q", left)
		}
		if marks, _ := os.ReadDir(filepath.Join(o.Links(), ".nodes")); len(marks) > 0 {
			t.Errorf("marks are left: %v", marks)
		}
		if d.End != nil {
			d.End(o)
		}
	})
	return o
}

func (r *rig) open() {
	r.t.Helper()
	var err error
	if r.e, err = r.d.New(r.o); err != nil {
		r.t.Fatal(err)
	}
	e := r.e
	r.t.Cleanup(func() {
		if err := e.Close(); err != nil {
			r.t.Errorf("close: %v", err)
		}
	})
}

// dirOnMemory is a directory that is gone after the test.
func dirOnMemory(t testing.TB) string {
	t.Helper()
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "mica-export-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// attach attaches for the length of the test.
func (r *rig) attach(name string, d device, o export.AttachOptions) export.Attachment {
	r.t.Helper()
	a, err := r.e.Attach(within(r.t, time.Minute), name, d, o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { r.detach(a) })
	return a
}

// detach detaches; the device may be open for another moment.
func (r *rig) detach(a export.Attachment) {
	r.t.Helper()
	if err := a.Detach(within(r.t, time.Minute)); err != nil {
		r.t.Errorf("detach: %v", err)
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// number reads a number from the environment.
func number(name string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return def
}

// missing reports whether there is nothing at path.
func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}
