package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func kernelName(id int) string { return "ublkb" + strconv.Itoa(id) }

func nodeOf(id int) string { return "/dev/ublkb" + strconv.Itoa(id) }

func charOf(id int) string { return "/dev/ublkc" + strconv.Itoa(id) }

func sysfsBlock(id int) string { return "/sys/block/ublkb" + strconv.Itoa(id) }

func sysfsChar(id int) string { return "/sys/class/ublk-char/ublkc" + strconv.Itoa(id) }

// NumberOf returns the number of a node such as "/dev/ublkb7".
func NumberOf(node string) (int, error) {
	s, ok := strings.CutPrefix(node, "/dev/ublkb")
	n, err := strconv.Atoi(s)
	if !ok || err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a ublk device", node)
	}
	return n, nil
}

// openChar opens /dev/ublkcN for the server. A predecessor that is dying, or udev, may have it
// open for a moment: the driver lets one process in.
func openChar(id int) (int, error) {
	if err := ensureNode(charOf(id), sysfsChar(id), unix.S_IFCHR); err != nil {
		return -1, err
	}
	for pause, deadline := time.Millisecond, time.Now().Add(5*time.Second); ; pause = min(2*pause, 50*time.Millisecond) {
		fd, err := openRetry(charOf(id), unix.O_RDWR)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return -1, fmt.Errorf("%s: %w", charOf(id), err)
		}
		<-time.After(pause)
	}
}

// ensureNode makes a device file that is missing from what sysfs says. On a host devtmpfs has made
// it before the driver's command has returned.
func ensureNode(path, sysfs string, kind uint32) error {
	want, err := deviceNumber(sysfs)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == kind && st.Rdev == want:
		return nil
	case err == nil:
		return fmt.Errorf("%s is not device %d:%d", path, unix.Major(want), unix.Minor(want))
	case err != unix.ENOENT:
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := unix.Mknod(path, kind|0o600, int(want)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s is missing and cannot be made: %w", path, err)
	}
	return nil
}

// deviceNumber reads the device number of a directory of sysfs.
func deviceNumber(sysfs string) (uint64, error) {
	b, err := os.ReadFile(sysfs + "/dev")
	if err != nil {
		return 0, err
	}
	maj, min, ok := strings.Cut(strings.TrimSpace(string(b)), ":")
	if ok {
		a, err1 := strconv.ParseUint(maj, 10, 32)
		i, err2 := strconv.ParseUint(min, 10, 32)
		if err1 == nil && err2 == nil {
			return unix.Mkdev(uint32(a), uint32(i)), nil
		}
	}
	return 0, fmt.Errorf("%s/dev says %q: want MAJOR:MINOR", sysfs, b)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
