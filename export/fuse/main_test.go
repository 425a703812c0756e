package fuse

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mica/dev"
	"mica/export"
	"mica/export/exporttest"
	"mica/export/helper"
	"mica/export/holder"
	"mica/export/loop"

	"golang.org/x/sys/unix"
)

// The test binary plays the roles of the small processes too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case "role-holder":
			err = holder.Run(context.Background(), os.Args[2])
		case "role-helper":
			err = helper.Run(context.Background(), os.Stdin, os.Stdout, Calls, Errors)
		case "role-late":
			err = helper.Run(context.Background(), os.Stdin, os.Stdout, lateCalls, nil)
		case "role-churn":
			err = churnRole(os.Args[2])
		case "role-serve":
			err = serveRole(os.Args[2], os.Args[3], os.Args[4:])
		default:
			exporttest.Main(m, conformance)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// needRoot skips a test that cannot run here, loudly.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: FUSE and loop devices need root")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(p); err != nil {
			t.Skipf("SKIPPED: no %s here: %v", p, err)
		}
	}
}

// shmDir is a directory on memory that is gone after the test.
func shmDir(t testing.TB) string {
	t.Helper()
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "mica-fuse-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

type setup struct {
	t   testing.TB
	dir string
	o   Options
	e   *Exporter
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// newSetup makes an exporter with helper and links, and with a holder if asked.
func newSetup(t testing.TB, withHolder bool) *setup {
	t.Helper()
	needRoot(t)
	s := &setup{t: t, dir: shmDir(t)}
	s.o = Options{
		RunDir: filepath.Join(s.dir, "run"), LinkDir: filepath.Join(s.dir, "links"),
		HelperCommand: []string{"/proc/self/exe", "role-helper"}, Logger: quiet(),
	}
	if withHolder {
		s.useHolder(t)
	}
	var err error
	if s.e, err = New(s.o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.e.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *setup) useHolder(t testing.TB) {
	s.o.HolderSocket = filepath.Join(s.dir, "holder.sock")
	s.o.HolderCommand = []string{"/proc/self/exe", "role-holder", s.o.HolderSocket}
	t.Cleanup(func() {
		if c, err := holder.Dial(s.o.HolderSocket); err == nil {
			if err := c.Quit(false); err != nil {
				t.Errorf("holder at the end: %v", err)
				c.Quit(true)
			}
			c.Close()
		}
	})
}

func (s *setup) attach(name string, d dev.Device, o export.AttachOptions) export.Attachment {
	s.t.Helper()
	a, err := s.e.Attach(ctx(s.t), name, d, o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := a.Detach(context.Background()); err != nil {
			s.t.Error(err)
		}
	})
	return a
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return c
}

// run runs a command and returns its output; a failure ends the test.
func run(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := tryRun(argv...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return out
}

func tryRun(argv ...string) (string, error) {
	c, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	out, err := exec.CommandContext(c, argv[0], argv[1:]...).CombinedOutput()
	return string(out), err
}

func needTool(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("SKIPPED: %s is not installed", n)
		}
	}
}

// boundTo lists the loop devices on files below dir, also of mounts that were detached lazily.
func boundTo(dir string) []int {
	var list []int
	for _, n := range loop.Find(func(string) bool { return true }) {
		fd, err := unix.Open(fmt.Sprintf("/dev/loop%d", n), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		info, err := unix.IoctlLoopGetStatus64(fd)
		if err == nil && strings.HasPrefix(unix.ByteSliceToString(info.File_name[:]), dir) {
			list = append(list, n)
		}
		unix.Close(fd)
	}
	return list
}

func mount(t testing.TB, node, dir string, o ...string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, append(append([]string{"mount"}, o...), node, dir)...)
	t.Cleanup(func() {
		if unix.Unmount(dir, 0) == nil {
			t.Logf("%s was still mounted", dir)
		}
	})
}

func unmountFS(t testing.TB, dir string) {
	t.Helper()
	run(t, "umount", dir)
}

// tries gives a device a Trier that does everything at once: the fast path.
type tries struct {
	dev.Device
	dev.Zeroer
	dev.Extenter
}

func inline(d interface {
	dev.Device
	dev.Zeroer
	dev.Extenter
}) dev.Device {
	return tries{d, d, d}
}

func (d tries) TryReadAt(p []byte, off int64) error {
	_, err := d.Device.ReadAt(p, off)
	return err
}

func (d tries) TryWriteAt(p []byte, off int64) error {
	_, err := d.Device.WriteAt(p, off)
	return err
}
