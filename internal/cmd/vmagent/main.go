// Command vmagent is the first process of the test machine: it mounts what programs expect,
// inserts the kernel modules that travel in the initramfs, and runs the commands that its host
// sends (internal/vm/wire). It is built with CGO_ENABLED=0 and started by the kernel as /init.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mica/internal/vm/wire"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("vmagent:", err)
	}
	powerOff()
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	os.Setenv("HOME", "/tmp")
	os.Setenv("TMPDIR", "/tmp")
	if err := insertModules("/modules"); err != nil {
		return err
	}
	port, err := openPort(10 * time.Second)
	if err != nil {
		return err
	}
	return serve(port)
}

func mountAll() error {
	for _, m := range []struct{ source, target, fstype, data string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"tmpfs", "/run", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", ""},
		{"tmpfs", "/dev/shm", "tmpfs", ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// insertModules inserts dir/NNN-NAME.ko in the order of the file names.
func insertModules(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	for _, file := range files { // Glob sorts
		image, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		// A module that the hardware does not need (crc32c_intel) answers ENODEV.
		err = unix.InitModule(image, "")
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("insert %s: %w", filepath.Base(file), err)
		}
	}
	return os.RemoveAll(dir) // its memory is the guest's
}

// openPort waits for the virtio-serial port called wire.PortName.
func openPort(limit time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == wire.PortName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR, 0)
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio-serial port %q after %v", wire.PortName, limit)
		}
	}
}

// serve runs commands until the host says PowerOff or goes away.
func serve(port *os.File) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	w := wire.NewWriter(port)
	if err := w.Send(wire.Hello, 0, []byte(unix.ByteSliceToString(uts.Release[:]))); err != nil {
		return err
	}
	r := bufio.NewReaderSize(port, 64<<10)
	for {
		f, err := wire.Read(r)
		if err != nil {
			return fmt.Errorf("host: %w", err)
		}
		switch f.Type {
		case wire.PowerOff:
			return nil
		case wire.Start:
			go func() { w.SendJSON(wire.Exit, f.ID, runCommand(w, f)) }()
		}
	}
}

func runCommand(w *wire.Writer, f wire.Frame) wire.Status {
	var c wire.Command
	if err := json.Unmarshal(f.Payload, &c); err != nil || len(c.Args) == 0 {
		return wire.Status{Code: -1, Error: fmt.Sprintf("bad command: %v", err)}
	}
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Dir = c.Dir
	if c.Stdin != nil {
		cmd.Stdin = strings.NewReader(string(c.Stdin))
	}
	cmd.Stdout = frameWriter{w, wire.Stdout, f.ID}
	cmd.Stderr = frameWriter{w, wire.Stderr, f.ID}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return wire.Status{}
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return wire.Status{Code: 128 + int(ws.Signal())}
		}
		return wire.Status{Code: exit.ExitCode()}
	}
	return wire.Status{Code: -1, Error: err.Error()}
}

type frameWriter struct {
	w    *wire.Writer
	kind wire.Type
	id   uint32
}

var _ io.Writer = frameWriter{}

func (f frameWriter) Write(p []byte) (int, error) {
	if err := f.w.Send(f.kind, f.id, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// powerOff ends the machine. The emulator runs with -no-reboot, so a restart ends it too, and is
// the one way that needs no ACPI driver.
func powerOff() {
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
