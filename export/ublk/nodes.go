package ublk

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"mica/export/node"

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
	if err := node.Ensure(charOf(id), sysfsChar(id), unix.S_IFCHR); err != nil {
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
