package peer

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strconv"
)

// answers tells whether somebody accepts connections on a Unix socket.
func answers(socket string) bool {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// onSocket starts a server that makes a socket.
func onSocket(ctx context.Context, socket, name string, args ...string) (*Server, error) {
	os.Remove(socket)
	p, err := start(name, args...)
	if err != nil {
		return nil, err
	}
	s := &Server{URI: "nbd+unix:///?socket=" + socket, proc: p}
	s.onStop(p.stop)
	if err := p.until(ctx, func() bool { return answers(socket) }); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// NBDKitFile is nbdkit with its file plugin.
func NBDKitFile(ctx context.Context, file, socket string) (*Server, error) {
	return onSocket(ctx, socket, "nbdkit", "--foreground", "--exit-with-parent", "--unix", socket, "file", file)
}

// QemuNBD is qemu-nbd on an image of a format ("raw", "qcow2"), with up to eight clients.
func QemuNBD(ctx context.Context, file, format, socket string) (*Server, error) {
	return onSocket(ctx, socket, "qemu-nbd", "--socket="+socket, "--format="+format, "--persistent", "--shared=8", "--discard=unmap", file)
}

// Qcow2 makes an empty qcow2 image of size bytes.
func Qcow2(ctx context.Context, file string, size int64) error {
	return run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", file, strconv.FormatInt(size, 10))
}

// Qcow2Over makes a qcow2 image of size bytes over another, which it does not open.
func Qcow2Over(ctx context.Context, file, backing string, size int64) error {
	return run(ctx, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", file, strconv.FormatInt(size, 10))
}

func run(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return &runError{name, out, err}
	}
	return nil
}

type runError struct {
	name string
	out  []byte
	err  error
}

func (e *runError) Error() string { return e.name + ": " + e.err.Error() + ": " + string(e.out) }
func (e *runError) Unwrap() error { return e.err }
