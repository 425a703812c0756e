package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"mica/export"
	"mica/internal/uring"

	"golang.org/x/sys/unix"
)

const controlPath = "/dev/ublk-control"

// A ctrlError is a control command that the driver refused.
type ctrlError struct {
	command string
	id      uint32
	errno   unix.Errno
}

func (e *ctrlError) Error() string {
	if e.id == anyID {
		return fmt.Sprintf("ublk %s: %v", e.command, e.errno)
	}
	return fmt.Sprintf("ublk device %d: %s: %v", e.id, e.command, e.errno)
}

func (e *ctrlError) Unwrap() error { return e.errno }

func openControl() (int, error) {
	fd, err := openRetry(controlPath, unix.O_RDWR)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.ENOENT):
		if _, serr := os.Stat("/sys/module/ublk_drv"); serr == nil {
			return -1, fmt.Errorf("%w: %s is missing, though the module ublk_drv is loaded: /dev is not the host's", export.ErrUnavailable, controlPath)
		}
		return -1, fmt.Errorf("%w: %s is missing: the module ublk_drv is not loaded (modprobe ublk_drv; Linux 6.5 or later)", export.ErrUnavailable, controlPath)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("%w: %s: %w: the module ublk_drv is not loaded (modprobe ublk_drv)", export.ErrUnavailable, controlPath, err)
	}
	return -1, fmt.Errorf("%w: %s: %w", export.ErrUnavailable, controlPath, err)
}

// command gives the driver a command and waits for its end. The thread is this call's own: the
// driver may sleep in it.
func command(op uint32, c ctrlCmd) error {
	fd, err := openControl()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, err := uring.New(uring.Options{Entries: 2, Wide: true})
	if err != nil {
		return fmt.Errorf("%w: %w", export.ErrUnavailable, err)
	}
	defer r.Close()
	if err := r.Command(fd, op, 0, c.encode(uring.Address(c.buf))); err != nil {
		return err
	}
	var res int32
	for got := 0; got == 0; {
		if err := r.Enter(1); err != nil {
			return err
		}
		got = r.Reap(func(c uring.Completion) { res = c.Res })
	}
	runtime.KeepAlive(c.buf)
	if res < 0 {
		return &ctrlError{commandNames[op], c.id, unix.Errno(-res)}
	}
	return nil
}

// features asks what the driver can do.
func features() (uint64, error) {
	b := make([]byte, 8)
	err := command(cmdGetFeatures, ctrlCmd{id: anyID, buf: b})
	if err != nil && !errors.Is(err, export.ErrUnavailable) {
		// Drivers before Linux 6.5 do not know the command, and have no user copy.
		return 0, fmt.Errorf("%w: %w: the kernel is too old (user copy came with Linux 6.5)", export.ErrUnavailable, err)
	}
	return ne.Uint64(b), err
}

// Available says whether devices can be exported this way on this host. The error wraps
// export.ErrUnavailable and says what is missing.
func Available() error {
	f, err := features()
	if err != nil {
		return err
	}
	return checkFeatures(f)
}

func checkFeatures(have uint64) error {
	for _, f := range featNames {
		if have&f.bit == 0 {
			return fmt.Errorf("%w: the ublk driver has no %s: the kernel is too old (it came with Linux %s)", export.ErrUnavailable, f.what, f.since)
		}
	}
	return nil
}

func addDev(i *devInfo) error {
	b := i.encode()
	if err := command(cmdAddDev, ctrlCmd{id: i.id, buf: b}); err != nil {
		return err
	}
	i.decode(b)
	return nil
}

func getInfo(id int) (devInfo, error) {
	b := make([]byte, devInfoLen)
	err := command(cmdGetDevInfo, ctrlCmd{id: uint32(id), buf: b})
	var i devInfo
	i.decode(b)
	return i, err
}

func setParams(id int, p *params) error {
	return command(cmdSetParams, ctrlCmd{id: uint32(id), buf: p.encode()})
}

func startDev(id, pid int) error {
	return command(cmdStartDev, ctrlCmd{id: uint32(id), data: uint64(pid)})
}

func stopDev(id int) error { return command(cmdStopDev, ctrlCmd{id: uint32(id)}) }

// delDev takes a device away, stopped or not, and waits until nobody has it open.
func delDev(id int) error { return command(cmdDelDev, ctrlCmd{id: uint32(id)}) }

// delDevAsync is delDev without the waiting.
func delDevAsync(id int) error { return command(cmdDelDevAsync, ctrlCmd{id: uint32(id)}) }

func startRecovery(id int) error { return command(cmdStartRecovery, ctrlCmd{id: uint32(id)}) }

func endRecovery(id, pid int) error {
	return command(cmdEndRecovery, ctrlCmd{id: uint32(id), data: uint64(pid)})
}

func updateSize(id int, sectors int64) error {
	return command(cmdUpdateSize, ctrlCmd{id: uint32(id), data: uint64(sectors)})
}

// devices lists the numbers of all ublk devices of the host.
func devices() []int {
	list, _ := os.ReadDir("/sys/class/ublk-char")
	var ids []int
	for _, e := range list {
		if s, ok := strings.CutPrefix(e.Name(), "ublkc"); ok {
			if n, err := strconv.Atoi(s); err == nil {
				ids = append(ids, n)
			}
		}
	}
	return ids
}

func openRetry(path string, mode int) (int, error) {
	for {
		fd, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
